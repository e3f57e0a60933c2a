"""Prepares a dataset's photos for training, once: python -m mlfsic_jax.data.prepare --dataset=NAME --source=DIR.

Prints a data card and the photos that cannot be read. Run again after an interruption, it resumes. With --download it
first fetches the archives of VOC or COCO and what --embedding and --backbone name; without it nothing is fetched.
``python -m mlfsic_jax.fetch`` fetches files without preparing a dataset.
"""

import argparse
import pathlib
import types
from collections.abc import Sequence

from mlfsic_jax import data
from mlfsic_jax.backbones import BACKBONES
from mlfsic_jax.data import assets, download
from mlfsic_jax.data.splits import TooFewLabels
from mlfsic_jax.system.command import Parser, cli_errors, run_main
from mlfsic_jax.system.errors import InputError

_UNPACKED = {"voc": "VOCdevkit", "coco": "coco"}  # dataset -> its folder in the data folder after a download


def prepare(flags: argparse.Namespace) -> data.ImageDataset:
    """Downloads if asked to, makes or finishes the prepared copy, and prints its data card."""
    source = flags.source or str(pathlib.Path(flags.data_dir) / _UNPACKED.get(flags.dataset, flags.dataset))
    if flags.download:
        wanted = assets.find(_downloads(flags), assets.with_backbones(BACKBONES))
        download.fetch_and_unpack(wanted, flags.data_dir)
    split = flags.split or ("auto" if flags.dataset == "folder" else "")
    config = types.SimpleNamespace(**vars(flags) | {"name": flags.dataset, "source": source, "split": split})
    try:
        dataset = data.load(config)
    except TooFewLabels:  # what was read is worth seeing all the same
        config.split = "none"
        print(data.data_card(data.load(config)), flush=True)
        raise
    print(data.data_card(dataset))
    for why in dataset.unreadable.values():
        print(f"unreadable: {why}")
    if dataset.unreadable:
        print(f"{len(dataset.unreadable)} of {len(dataset.image_names)} photos cannot be read and will be left out")
    print(f"prepared in {flags.prepared_dir}")
    return dataset


def _downloads(flags: argparse.Namespace) -> list[str]:
    """Names of the assets that --download fetches."""
    names = [name for name in (flags.embedding, flags.backbone) if name]
    if flags.dataset in _UNPACKED:
        if flags.source:
            raise InputError(f"--download puts {flags.dataset} into --data_dir={flags.data_dir}: leave --source out")
        return [flags.dataset, *names]
    if not names:
        known = f"the archives of {' and '.join(_UNPACKED)}, --embedding and --backbone"
        raise InputError(f"--download knows {known}; {data.layout(flags.dataset)}")
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    with_weights = [name for name, spec in BACKBONES.items() if spec.files]
    parser = Parser("mlfsic_jax.data.prepare", __doc__)
    parser.add_argument("--dataset", required=True, choices=data.PHOTO_DATASETS)
    parser.add_argument("--source", default="", help="the dataset's folder; default: where --download puts it")
    parser.add_argument("--prepared_dir", default="cache/datasets", help="default cache/datasets, as in the configs")
    parser.add_argument("--policy", default="", help="leakfree, exclusive, or COCO's laso; default: the dataset's own")
    parser.add_argument("--split", default="", help="label split: a JSON file, or auto; default: the published one")
    parser.add_argument("--seed", type=int, default=0, help="for --split=auto")
    parser.add_argument("--download", action="store_true", help="fetch VOC or COCO, --embedding and --backbone first")
    parser.add_argument("--data_dir", default="data", help="where downloads go; default data")
    parser.add_argument("--embedding", choices=["glove"], help="with --download: also fetch GloVe 6B")
    parser.add_argument("--backbone", choices=with_weights, help="with --download: also fetch its published weights")
    flags = parser.parse_args(arguments)
    with cli_errors("the same command resumes"):
        prepare(flags)


if __name__ == "__main__":
    run_main(main)
