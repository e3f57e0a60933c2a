"""Pascal VOC 2007 and 2012 from the official VOCdevkit folder."""

import pathlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from mlfsic_jax.data import prepared
from mlfsic_jax.data.splits import benchmark_labels
from mlfsic_jax.data.text import text_lines
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.progress import track
from mlfsic_jax.system.untrusted import reported, shown

LABEL_NAMES = benchmark_labels("voc")
DISPLAY_NAMES = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}
IMAGE_SETS = {"2007": ("train", "val", "test"), "2012": ("train", "val")}  # 2012's test annotations are not public
POLICY = "leakfree"
LAYOUT = (
    "Get VOC with: python -m mlfsic_jax.fetch voc, or from http://host.robots.ox.ac.uk/pascal/VOC/, and give the "
    "folder VOCdevkit, which holds VOC2007 and VOC2012, each with Annotations, ImageSets/Main and JPEGImages"
)


def scan(source: pathlib.Path) -> prepared.Source:
    """Lists the images of every year and set found; all their photos and annotations must exist.

    Images are named like ``"2007/000012"``. A label is positive if the image has an object of it that is not marked
    difficult; labels with difficult objects only are ignored in the choice of images.
    """
    years = tuple(year for year in IMAGE_SETS if (source / f"VOC{year}").is_dir())
    if not years:
        hint = f" (it looks like one year's folder: give {source.parent})" if (source / "ImageSets").is_dir() else ""
        hint = f" (give {source / 'VOCdevkit'})" if (source / "VOCdevkit").is_dir() else hint
        raise InputError(f"source {source} holds neither VOC2007 nor VOC2012{hint}. {LAYOUT}")

    found: dict[str, tuple[pathlib.Path, pathlib.Path]] = {}
    for year in years:
        folder = source / f"VOC{year}"
        for stem in _listed_images(folder, IMAGE_SETS[year]):
            found[f"{year}/{stem}"] = (folder / "JPEGImages" / f"{stem}.jpg", folder / "Annotations" / f"{stem}.xml")
    names = sorted(found)
    photos, annotation_paths = zip(*(found[name] for name in names), strict=True)
    for what, paths in (("photos", photos), ("annotations", annotation_paths)):
        if absent := prepared.missing(paths, source, f"{what} listed in ImageSets/Main"):
            raise InputError(f"{absent}. Finish the download, or take these images out of the lists")
    with reported("an annotation cannot be read", "unpack it again", OSError):
        annotations = [path.read_bytes() for path in annotation_paths]
    # The difficult flag can change without changing the size: annotations count by content.
    digest = prepared.digest([tuple(names), [prepared.stamp(photo) for photo in photos], *annotations])
    return prepared.Source(digest, "_".join(years), lambda: _read(years, names, photos, annotations))


def _read(
    years: Sequence[str], names: Sequence[str], photos: Sequence[pathlib.Path], annotations: Sequence[bytes]
) -> prepared.Contents:
    files = zip(names, photos, annotations, strict=True)
    examples = []
    for name, photo, annotation in track(files, total=len(names), description="reading VOC's files", unit="files"):
        examples.append(prepared.Example(name, photo, *_labels_of(annotation, name)))
    difficult = [len(example.ignored) for example in examples]
    notes = [
        f"Pascal VOC {' and '.join(years)}.",
        f"Labels with difficult objects only: {sum(difficult)}, in {sum(map(bool, difficult))} images. "
        "They are not positive and do not count in the choice of images.",
    ]
    return prepared.Contents(LABEL_NAMES, examples, notes)


def _listed_images(folder: pathlib.Path, image_sets: Sequence[str]) -> list[str]:
    main = folder / "ImageSets" / "Main"
    lists = [main / f"{name}.txt" for name in image_sets]
    if not any(path.is_file() for path in lists):
        wanted = ", ".join(path.name for path in lists)
        raise InputError(f"{main} holds none of {wanted}: unpack VOC again, or move {folder.name} away. {LAYOUT}")
    stems: list[str] = []
    for path in filter(pathlib.Path.is_file, lists):
        for number, line in text_lines(path, "unpack the list again"):
            stem = line.strip()
            if not re.fullmatch(r"\w{1,200}", stem, re.ASCII):
                raise InputError(f"{path}, line {number}: {stem[:40]!r} is not an image name; unpack the list again")
            stems.append(stem)
    if not stems:
        raise InputError(f"the image lists in {main} are empty: unpack them again")
    return stems


def _labels_of(annotation: bytes, name: str) -> tuple[list[str], list[str]]:
    """The labels with an object that is not marked difficult, and those with difficult objects only."""
    where, official = f"the annotation of {name}", "replace it with the official file"
    with reported(f"{where} is not valid XML", official, (UnicodeDecodeError, ElementTree.ParseError)):
        text = annotation.decode("utf-8-sig")
        # An annotation needs no DOCTYPE; with one, a few bytes can expand to gigabytes of entities.
        if "<!DOCTYPE" in text:
            raise InputError(f"{where} has a DOCTYPE, which VOC's never have: {official}")
        root = ElementTree.fromstring(text)
    if root.tag != "annotation":
        raise InputError(f"{where} is a {shown(root.tag)}, not an <annotation>: {official}")
    easy, difficult = set(), set()
    for thing in root.findall("object"):
        label = (thing.findtext("name") or "").strip()
        flag = (thing.findtext("difficult") or "0").strip()
        if label not in LABEL_NAMES:
            raise InputError(f"{where} names an object {shown(label)}, which is none of VOC's 20: correct the file")
        if flag not in ("0", "1"):
            raise InputError(f"{where}, object {label!r}: difficult is {shown(flag)}, expected 0 or 1")
        (difficult if flag == "1" else easy).add(label)
    return sorted(easy), sorted(difficult - easy)
