"""Labels photos by names and a few examples: python -m mlfsic_jax.predict --labels="cat,dog" --images=DIR ...

The labels are the user's own. --labels names them, --support has examples of each, or both. As functions:

    import mlfsic_jax

    model = mlfsic_jax.load()  # out of the box; or a training run, or a folder of mlfsic_jax.export
    few = mlfsic_jax.fit(model, ["a.jpg", "b.jpg", "c.jpg"], [["sofa"], ["sofa", "cat"], ["bird"]])
    print(few.note)
    found = few.predict(["d.jpg"])  # found.probabilities, found.label_names, found.labels

The command ends with status 0 when every photo was predicted; 1 after a user's mistake, nothing is written then; 3 when
some photos could not be read: each has a line on standard error, the others stand in the written file. Killed or
interrupted, it leaves a journal beside --out, from which the same command goes on.
"""

import argparse
import csv
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mlfsic_jax.data.folder import read_csv
from mlfsic_jax.data.tables import odd_labels
from mlfsic_jax.methods import METHODS
from mlfsic_jax.run import journal, label_studio
from mlfsic_jax.run.classifier import Classifier, fit, labels_above, predict_each
from mlfsic_jax.run.labels import cell_writer, parse_labels
from mlfsic_jax.run.photos import find_photos
from mlfsic_jax.run.ready import QUALITIES, load
from mlfsic_jax.system import parallel
from mlfsic_jax.system.command import Parser, cli_errors, prepare_jax, run_main
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import Streamed, atomic, write_json
from mlfsic_jax.system.progress import track
from mlfsic_jax.system.untrusted import expand, reported

UNREADABLE = 3  # exit status
_ENDINGS = {"csv": ".csv", "json": ".json", "label-studio": ".json"}  # of --out, by --format


def run(flags: argparse.Namespace) -> int:
    """The command; returns how many photos could not be read. After a mistake (``InputError``) nothing was written."""
    out = expand(flags.out)
    kind = flags.format or out.suffix.removeprefix(".")
    if _ENDINGS.get(kind) != out.suffix:
        raise InputError(f"--out={flags.out} must end in {_ENDINGS.get(kind, '.csv or .json')}")
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise InputError(f"--out={flags.out} cannot be written: give a file in a folder that exists")
    if flags.support and os.path.realpath(expand(flags.support)) == os.path.realpath(out):
        raise InputError(f"--out={flags.out} is the file of --support, which would be lost: give another")
    labels, names, wordings = _labels(flags)
    if kind == "csv" and not {"file", "labels"}.isdisjoint(names):
        raise InputError("a label called file or labels cannot be told from a column: give an --out that ends in .json")
    photos = _shard(find_photos(flags.images), flags.shard)
    project = label_studio.prepare(names, photos, flags.image_root) if kind == "label-studio" else None
    options = {"quality": flags.quality, "data_dir": flags.data_dir, "fetch": flags.download}
    predictor = load(flags.workdir, flags.n_shot, **options)
    options = {"method": flags.method, "label_names": names, "vectors": flags.vectors, "wordings": wordings}
    classifier = fit(predictor, list(labels), list(labels.values()), **options)
    print(classifier.note, flush=True)
    made_from = journal.fingerprint(classifier, labels, wordings, flags.vectors)
    with journal.keep(out, made_from, photos, len(classifier.label_names)) as kept:
        unreadable = _predict(classifier, photos, kept)
        with reported(f"--out={flags.out} cannot be written", "give another", OSError):
            if project:
                config = label_studio.write(out, project, classifier, kept.rows())
            else:
                (_write_csv if kind == "csv" else _write_json)(out, classifier, kept.rows(), unreadable)
    beside = f", and {config} for the project's labelling configuration" if project else ""
    left_out = f", {len(unreadable)} unreadable photos left out" if unreadable else ""
    print(f"wrote {out}: {len(photos) - len(unreadable)} photos, {len(names)} labels{left_out}{beside}")
    return len(unreadable)


def _predict(classifier: Classifier, photos: Sequence[Path], kept: journal.Journal) -> list[tuple[Path, InputError]]:
    """Adds to the journal what it lacks; returns the photos that cannot be read, and why."""
    missing = kept.missing()
    if done := len(photos) - len(missing):
        print(f"going on: {done:,} of {len(photos):,} photos are done", flush=True)
    rows = predict_each(classifier, (photos[i] for i in missing))
    unreadable = []
    for i, row in zip(missing, track(rows, total=len(missing), description="predicting", unit="photos"), strict=True):
        if isinstance(row, InputError):
            unreadable.append((photos[i], row))
        else:
            kept.add(i, row)
    for _, error in unreadable:
        print(f"unreadable: {error}", file=sys.stderr)
    if len(unreadable) == len(photos):
        raise InputError(f"none of the {len(photos)} photos can be read")
    return unreadable


def _shard(photos: list[Path], shard: str | None) -> list[Path]:
    """The photos of ``--shard=i/n``: the i-th of every n; by default i and n are those of ``parallel.launched``.

    The processes do not join: none waits for another, or ends with it.
    """
    if not shard:
        shard = parallel.launched()
        if shard != "0/1":
            print(f"--shard={shard}, as this process was launched", flush=True)
    given = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
    i, n = map(int, given.groups()) if given else (0, 0)
    if i >= n:
        raise InputError(f"--shard={shard} must be i/n with i from 0 to n-1, such as 0/4")
    if i >= len(photos):
        raise InputError(f"--shard={shard} has none of the {len(photos)} photos: divide them among fewer")
    return photos[i::n]


def _labels(flags: argparse.Namespace) -> tuple[dict[Path, list[str]], list[str], dict[str, list[str]]]:
    """Support photo -> its labels, the names of all labels, and the wordings of some."""
    if not flags.support and not flags.labels:
        raise InputError('name the labels: --labels="cat,dog", or --support=FILE with examples of each, or both')
    names, wordings = parse_labels(flags.labels) if flags.labels else ([], {})
    for line in odd_labels(names):
        print(line, file=sys.stderr)
    if len(names) == 1 and " " in names[0]:
        print(f"--labels: {names[0]!r} was taken for one label: write commas between several", file=sys.stderr)
    if not flags.support:
        return {}, names, wordings
    table = expand(flags.support)
    if not table.is_file():
        why = "is a folder, give a table of its photos" if table.is_dir() else "no such file"
        raise InputError(f"--support={flags.support}: {why}; it has the columns file,labels, see the README")
    labels, given = read_csv(table, anywhere=True)
    if not labels:
        raise InputError(f"{table} names no photo: add lines such as a.jpg,sofa|cat")
    if absent := next((photo for photo in labels if not os.path.lexists(photo)), None):
        raise InputError(f"{table}: the photo {absent} is not there: paths in it are relative to its folder")
    return labels, names or given, wordings


def _write_csv(out: Path, classifier: Classifier, rows, _) -> None:
    # A photo's name need not be text in UTF-8: it is written byte for byte.
    options = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with atomic(out) as part, open(part, "w", **options) as file:
        writer = csv.writer(file)
        writer.writerow(["file", "labels", *classifier.label_names])
        as_text = cell_writer(classifier.label_names)
        for photo, row in rows:
            writer.writerow([photo, as_text(labels_above(classifier, row)), *(f"{p:.4f}" for p in row)])


def _write_json(out: Path, classifier: Classifier, rows, unreadable) -> None:
    def by_label(values) -> dict[str, float]:
        return dict(zip(classifier.label_names, map(float, values), strict=True))

    content = {
        "method": classifier.method,
        "n_shot": classifier.trained.n_shot,
        "thresholds": by_label(classifier.thresholds),
        "photos": Streamed(
            {"file": str(photo), "labels": labels_above(classifier, row), "probabilities": by_label(row)}
            for photo, row in rows
        ),
        "unreadable": [{"file": str(photo), "why": str(error)} for photo, error in unreadable],
    }
    write_json(out, content)


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags in, a file of predictions out."""
    parser = Parser("mlfsic_jax.predict", __doc__.splitlines()[0])
    parser.add_argument("--labels", help='names: "cat,dog,sofa"; several wordings of one as "dog = dog | puppy"')
    parser.add_argument("--support", help="examples: a CSV file of columns file,labels (sofa|cat), or a tool's export")
    parser.add_argument("--images", required=True, nargs="+", action="extend", help="a folder, files, or 'a/*.jpg'")
    parser.add_argument("--out", required=True, help="the .csv or .json file to write")
    parser.add_argument("--shard", help="i/n, from 0/n: only the i-th of every n photos; give each part its own --out")
    parser.add_argument("--format", choices=_ENDINGS, help="default: csv or json, by --out; label-studio: its tasks")
    parser.add_argument("--image_root", help="for label-studio: the folder that its server serves, above the photos'")
    parser.add_argument("--workdir", help="of a training run, or an exported folder; default: the model out of the box")
    parser.add_argument("--quality", choices=QUALITIES, default="standard", help="of the model out of the box")
    parser.add_argument("--download", action="store_true", help="fetch the model's files where they are missing")
    parser.add_argument("--data_dir", default="data", help="where those files are; default data")
    parser.add_argument("--method", choices=METHODS, help="default: the one that was best on validation labels")
    parser.add_argument("--n_shot", type=int, help="default: of the trained shot counts the nearest to the support's")
    parser.add_argument("--vectors", help="a further file of word vectors, for labels that the model has none for")
    parser.add_argument("--cache_dir", default="cache", help="where compiled programs are kept; default cache")
    flags = parser.parse_args(arguments)
    prepare_jax(flags.cache_dir)
    with cli_errors("the same command goes on with the photos that are left"):
        unreadable = run(flags)
    if unreadable:
        sys.exit(UNREADABLE)


if __name__ == "__main__":
    run_main(main)
