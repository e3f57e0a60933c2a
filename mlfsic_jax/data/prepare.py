"""Prepares a dataset's photos for training, once: python -m mlfsic_jax.data.prepare --dataset=NAME --source=DIR.

It ends in a data card and a list of the photos that cannot be read. Run again, it goes on where it was stopped. With
--download the official archives of VOC or COCO are fetched first, and the word vectors and backbone weights that are
asked for; without it nothing is fetched.
"""

from __future__ import annotations

import argparse
import pathlib
import types
from collections.abc import Sequence

from mlfsic_jax import data
from mlfsic_jax.backbones import BACKBONES, published_files
from mlfsic_jax.data import download
from mlfsic_jax.system.command import Parser, cli_errors
from mlfsic_jax.system.errors import InputError

_UNPACKED = {"voc": "VOCdevkit", "coco": "coco"}  # dataset -> its folder in the data folder after a download


def prepare(flags: argparse.Namespace) -> data.ImageDataset:
    """Downloads where asked to, makes or finishes the prepared copy, and prints what it holds.

    Raises:
      InputError: the dataset cannot be downloaded, read or written.
    """
    source = flags.source or str(pathlib.Path(flags.data_dir) / _UNPACKED.get(flags.dataset, flags.dataset))
    if flags.download:
        download.fetch_and_unpack(_assets(flags), flags.data_dir)
    config = types.SimpleNamespace(
        name=flags.dataset,
        source=source,
        prepared_dir=flags.prepared_dir,
        policy=flags.policy,
        split=flags.split or ("auto" if flags.dataset == "folder" else ""),
        seed=flags.seed,
    )
    dataset = data.load(config)
    print(data.data_card(dataset))
    for why in dataset.unreadable.values():
        print(f"unreadable: {why}")
    if dataset.unreadable:
        print(f"{len(dataset.unreadable)} of {len(dataset.image_names)} photos cannot be read and will be left out")
    print(f"prepared in {flags.prepared_dir}")
    return dataset


def _assets(flags: argparse.Namespace) -> list[download.Asset]:
    """What --download, --embedding and --backbone ask for."""
    if flags.dataset not in _UNPACKED:
        raise InputError(f"--download knows the archives of {' and '.join(_UNPACKED)}; {data.layout(flags.dataset)}")
    if flags.source:
        raise InputError(f"--download puts {flags.dataset} into --data_dir={flags.data_dir}: leave --source out")
    assets = list(download.ASSETS[flags.dataset])
    if flags.embedding:
        assets += download.ASSETS["glove"]
    if flags.backbone:
        licence = BACKBONES[flags.backbone].pretrained
        assets += [download.weights(file.url, file.sha256, licence) for file in published_files(flags.backbone)]
    return assets


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    with_weights = [name for name, spec in BACKBONES.items() if spec.files]
    parser = Parser("mlfsic_jax.data.prepare", __doc__)
    parser.add_argument("--dataset", required=True, choices=data.PHOTO_DATASETS)
    parser.add_argument("--source", default="", help="the dataset's folder; default: where --download puts it")
    parser.add_argument("--prepared_dir", default="cache/datasets", help="default cache/datasets, as in the configs")
    parser.add_argument("--policy", default="", help="leakfree, exclusive, or COCO's laso; default: the dataset's own")
    parser.add_argument("--split", default="", help="of the labels: a JSON file, or auto; default: the published one")
    parser.add_argument("--seed", type=int, default=0, help="of --split=auto")
    parser.add_argument("--download", action="store_true", help="fetch the archives of VOC or COCO first")
    parser.add_argument("--data_dir", default="data", help="where downloads go; default data")
    parser.add_argument("--embedding", choices=["glove"], help="with --download: fetch GloVe 6B too")
    parser.add_argument("--backbone", choices=with_weights, help="with --download: fetch its published weights too")
    flags = parser.parse_args(arguments)
    with cli_errors("the same command goes on where it was stopped"):
        prepare(flags)


if __name__ == "__main__":
    main()
