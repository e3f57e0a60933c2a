"""Your own photos: train on most of their labels, see how well the others are told apart from a few examples.

``python -m mlfsic_jax.main --config=configs/folder.py --config.data.source=DIR``

DIR holds labels.csv (columns file, labels; several labels as sand|sea), or one 0/1 column per label, or labels.json in
COCO's format, or one sub-folder per label. The labels are split at random (``--config.data.seed``), or as a JSON file
says: ``--config.data.split=split.json`` with {"train": [..], "validation": [..], "novel": [..]}.

MobileNetV2, frozen, for machines without an accelerator. Run on 5,074 COCO photos with 18 labels (docs/findings.md):
6 minutes on 2 CPU cores once the features are cached. To label photos with a finished model you need not train here,
see docs/own_photos.md.
"""

from mlfsic_jax.run import config as defaults


def get_config(arg: str = ""):
    """No variants."""
    if arg:
        raise ValueError(f"configs/folder.py has no variant {arg!r}")
    config = defaults.default()
    config.workdir = "runs/folder"
    config.data.name = "folder"
    config.data.source = "photos"
    config.data.split = "auto"
    config.data.policy = "leakfree"  # train images have no validation or novel label, validation images no novel one
    config.backbone = "mobilenet_v2"
    config.model.d_dynamic = 16  # this and the epochs as for VOC
    config.train.epochs = 40
    config.train.warmup_epochs = config.train.get_ref("epochs") // 20
    config.train.validate_every = 5
    return config.lock()
