"""Predictions as tasks of Label Studio, in which people correct them."""

import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np

from mlfsic_jax import __version__
from mlfsic_jax.run.classifier import Classifier, labels_above
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import Streamed, atomic
from mlfsic_jax.system.untrusted import label_name, photo_path, shown

_QUESTION, _PHOTO = "choice", "image"  # names in the labelling configuration, as in Label Studio's own template
_NO_XML = {"\ufffe", "\uffff"}


class Project(NamedTuple):
    """What Label Studio needs to know before there are predictions."""

    config: str  # its labelling configuration, XML
    addresses: dict[Path, str]  # photo -> where Label Studio's server shows it


def prepare(label_names: Sequence[str], photos: Iterable[Path], image_root: str | os.PathLike[str] | None) -> Project:
    """The labelling configuration of these labels, and the addresses of photos below the folder that a server serves.

    ``InputError`` when no folder is given, when Label Studio could not show a photo from there, and when the name of a
    label or photo could not be read from Label Studio's exports.
    """
    if not image_root:
        served = "the folder that Label Studio serves, its LOCAL_FILES_DOCUMENT_ROOT"
        raise InputError(f"Label Studio's tasks name photos below {served}: give it as --image_root=FOLDER")
    addresses = {photo: address(_inside(photo, Path(image_root))) for photo in photos}
    return Project(_config(label_names), addresses)


def write(out: Path, project: Project, classifier: Classifier, rows: Iterable[tuple[Path, np.ndarray]]) -> Path:
    """Writes a task per photo, (path, float [C]), and beside it the labelling configuration, whose path it returns.

    A prediction's score is the probability of what it says about its least certain label. ``OSError`` when a file
    cannot be written.
    """
    config = out.with_suffix(".xml")
    with atomic(out) as tasks_part, atomic(config) as config_part, open(tasks_part, "w") as file:
        json.dump(Streamed(_task(classifier, project.addresses[photo], row) for photo, row in rows), file, indent=1)
        config_part.write_text(project.config, encoding="utf-8")
    return config


def task(address: str, decided: Sequence[str] | None, proposed: Mapping[str, Any] | None) -> dict[str, Any]:
    """A task for the photo at an address, with the labels that people ``decided`` and a ``prediction``, or without."""
    annotations = {} if decided is None else {"annotations": [{"result": _result(decided)}]}
    predictions = {} if proposed is None else {"predictions": [proposed]}
    return {"data": {_PHOTO: address}, **annotations, **predictions}


def prediction(label_names: Sequence[str], score: float, model: str) -> dict[str, Any]:
    """The labels that a model proposes for a photo. Label Studio sorts tasks by ``score``."""
    version = f"mlfsic_jax {__version__}, {model}"
    return {"model_version": version, "score": round(score, 4), "result": _result(label_names)}


def _result(label_names: Sequence[str]) -> list[dict[str, Any]]:
    choices = {"from_name": _QUESTION, "to_name": _PHOTO, "type": "choices"}
    return [choices | {"value": {"choices": list(label_names)}}] if label_names else []


def _task(classifier: Classifier, address: str, row: np.ndarray) -> dict[str, Any]:
    score = float(np.where(row > classifier.thresholds, row, 1 - row).min())
    model = f"{classifier.method}, {classifier.trained.n_shot}-shot"
    return task(address, None, prediction(labels_above(classifier, row), score, model))


def address(inside: str) -> str:
    """Where Label Studio's server shows the photo at this path below the folder that it serves."""
    if "\\" in inside:
        raise InputError(f"photo {inside}: the backslash would be read as a folder: rename the photo")
    return f"/data/local-files/?d={quote(inside)}"


def _inside(photo: Path, root: Path) -> str:
    """The path of a photo below ``root``, as it is written or, where links lead there, as it really is."""
    for path, top in ((photo.absolute(), root.absolute()), map(Path, map(os.path.realpath, (photo, root)))):
        if path.is_relative_to(top) and ".." not in (inside := path.relative_to(top)).parts:
            break
    else:
        raise InputError(f"photo {photo} lies outside of --image_root={root}: give the folder that Label Studio serves")
    if len(inside.parts) == 1:
        way_out = "Label Studio shows only photos of sub-folders, so give the folder above"
        raise InputError(f"photo {photo} lies directly in --image_root={root}: {way_out}")
    return str(photo_path(str(inside), "--images", root))


def _config(label_names: Sequence[str]) -> str:
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name=_PHOTO, value=f"${_PHOTO}")
    choices = ElementTree.SubElement(view, "Choices", name=_QUESTION, toName=_PHOTO, choice="multiple")
    for name in label_names:
        if _NO_XML.intersection(label_name(name, "--labels")):
            raise InputError(f"--labels: the label {shown(name)} contains a character that XML lacks: remove it")
        # Label Studio replaces $WORD in a value by a field of the task, but not in what it stores and shows instead.
        literal = {"alias": name, "html": html.escape(name, quote=False)} if "$" in name else {}
        ElementTree.SubElement(choices, "Choice", value=name, **literal)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"
