"""NUS-WIDE, 52 / 12 / 17 of its 81 concepts, the paper's sizes: frozen ResNet-50, 224x224, GloVe 300, 200 episodes.

``python -m mlfsic_jax.main --config=configs/nus_wide.py``

Not run here: needs NUS-WIDE's ground truth, image list and photos, and torchvision's weights. It
was run on made-up photos in the official layout, in tests.
"""

from mlfsic_jax.run import config as defaults


def get_config(arg: str = ""):
    """No variants."""
    if arg:
        raise ValueError(f"configs/nus_wide.py has no variant {arg!r}")
    config = defaults.default()
    config.workdir = "runs/nus_wide"
    config.data.name = "nus_wide"
    config.data.source = "data/nus_wide"
    config.data.policy = "leakfree"  # train images have no validation or novel label, validation images no novel one
    return config.lock()
