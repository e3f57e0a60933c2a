"""NUS-WIDE from the official ground truth and image list, beside a folder of photos."""

import functools
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from mlfsic_jax.data import prepared
from mlfsic_jax.data.splits import benchmark_labels
from mlfsic_jax.data.text import text_lines
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import photo_path

LABEL_NAMES = benchmark_labels("nus_wide")
DISPLAY_NAMES: dict[str, str] = {}
PHOTO_FOLDERS = ("Flickr", "images", "Images", "image")
POLICY = "leakfree"
LAYOUT = (
    "NUS-WIDE's ground truth, Groundtruth/AllLabels and ImageList, comes from "
    "https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html; put the photos into a folder "
    "Flickr or images beside them and give the folder that holds all three"
)


def scan(source: pathlib.Path) -> prepared.Source:
    """Lists the photos found and the files of the ground truth.

    Images are named as in the image list, ``"actor/0001_2124494179"``. Photos lie under these names in one of the
    folders Flickr, images, Images, image, or, as in repackaged copies, directly in it as ``0001_2124494179.jpg``.
    """
    image_list = source / "ImageList" / "Imagelist.txt"
    truth = [source / "Groundtruth" / "AllLabels" / f"Labels_{label}.txt" for label in LABEL_NAMES]
    folders = [source / name for name in PHOTO_FOLDERS if (source / name).is_dir()]
    absent = [path for path in (image_list, *truth) if not path.is_file()]
    if absent:
        more = f" and {len(absent) - 1} more files" if len(absent) > 1 else ""
        raise InputError(f"{absent[0]}{more} missing. {LAYOUT}")
    if not folders:
        raise InputError(f"source {source} has no photo folder: expected one of {', '.join(PHOTO_FOLDERS)}. {LAYOUT}")
    found = _photos_under(folders[0])
    digest = prepared.digest([image_list, *truth, sorted(found.items())])
    return prepared.Source(digest, "all", functools.partial(_read, folders[0], image_list, truth, found))


def _photos_under(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Path below ``folder`` -> ``prepared.stamp``, of the files in it and one level down that are not empty."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                with os.scandir(entry) as inner:
                    found |= {f"{entry.name}/{file.name}": file.stat() for file in inner if file.is_file()}
            elif entry.is_file():
                found[entry.name] = entry.stat()
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items() if status.st_size}


def _read(
    folder: pathlib.Path, image_list: pathlib.Path, truth: Sequence[pathlib.Path], found: dict[str, tuple[int, int]]
) -> prepared.Contents:
    listed = [line.strip() for _, line in text_lines(image_list)]
    labels = np.stack([_column(path, len(listed)) for path in truth], axis=1)  # bool [I, 81]
    examples, skipped = [], 0
    for number, (line, row) in enumerate(zip(listed, labels, strict=True), 1):
        path = photo_path(line.replace("\\", "/"), f"{image_list}, line {number}", folder)
        photo = next((name for name in (str(path), path.name) if name in found), None)
        if photo is None:
            skipped += 1
            continue
        names = [LABEL_NAMES[c] for c in np.flatnonzero(row)]
        examples.append(prepared.Example(str(path.with_suffix("")), folder / photo, names))
    if not examples:
        raise InputError(f"none of the {len(listed)} photos of {image_list} is in {folder}. {LAYOUT}")
    notes = [f"NUS-WIDE: {skipped} of the {len(listed)} photos listed are not in {folder.name}/ and are left out."]
    return prepared.Contents(LABEL_NAMES, sorted(examples), notes)


def _column(path: pathlib.Path, n_images: int) -> np.ndarray:
    lines = [line.strip() for _, line in text_lines(path)]
    if len(lines) != n_images:
        raise InputError(f"{path} has {len(lines)} lines, but Imagelist.txt has {n_images}: get both again")
    wrong = [number for number, line in enumerate(lines, 1) if line not in ("0", "1")]
    if wrong:
        raise InputError(f"{path}, line {wrong[0]}: {lines[wrong[0] - 1][:20]!r}, expected 0 or 1; get the file again")
    return np.array([line == "1" for line in lines])
