"""The whole method in minutes on generated scenes: Conv-4-64 trained end to end from random weights.

python -m mlfsic_jax.main --config=configs/demo.py
"""

from mlfsic_jax import config as defaults


def get_config(arg: str = ""):
    """No variants."""
    if arg:
        raise ValueError(f"configs/demo.py has no variant {arg!r}")
    config = defaults.default()
    config.workdir = "runs/demo"
    config.data.name = "scenes"
    config.data.image_size = 64
    config.data.images_per_split = (800, 300, 400)
    config.labels.embedding = "dataset"
    config.backbone = "conv4"
    config.backbone_weights = ""
    config.train_backbone = True
    config.model.d_joint = 128
    config.model.d_dynamic = 16
    config.train.epochs = 13
    config.train.warmup_epochs = 1
    config.train.n_query = 3
    config.train.learning_rate = 2e-3
    config.train.validate_every = 2
    config.train.validation_episodes = 30
    config.eval.sweep_episodes = 100
    return config.lock()
