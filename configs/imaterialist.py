"""iMaterialist (Fashion) 2019, 18 / 12 / 16 of its 46 classes: the paper's ResNet-50, 224x224, GloVe 300, 200 episodes.

``python -m mlfsic_jax.main --config=configs/imaterialist.py``

Not run here: needs Kaggle's train.csv, label_descriptions.json and train/, and torchvision's weights. It
was run on made-up photos in the official layout, in tests.
"""

from mlfsic_jax.run import config as defaults


def get_config(arg: str = ""):
    """No variants."""
    if arg:
        raise ValueError(f"configs/imaterialist.py has no variant {arg!r}")
    config = defaults.default()
    config.workdir = "runs/imaterialist"
    config.data.name = "imaterialist"
    config.data.source = "data/imaterialist"
    config.data.policy = "leakfree"  # train images have no validation or novel label, validation images no novel one
    return config.lock()
