"""The whole method in minutes on generated scenes: Conv-4-64 trained end to end from random weights.

python -m mlfsic_jax.main --config=configs/demo.py

``:small`` shrinks everything until it runs in a minute and says nothing: to try the notebooks, and in tests.
"""

from mlfsic_jax.run import config as defaults

VARIANTS = ("", "small")


def get_config(arg: str = ""):
    """``arg``: one of VARIANTS."""
    if arg not in VARIANTS:
        raise ValueError(f"configs/demo.py has no variant {arg!r}: choose {', '.join(VARIANTS[1:])}, or none")
    config = defaults.default()
    config.workdir = "runs/demo"
    config.data.name = "scenes"
    config.data.image_size = 48
    config.data.images_per_split = (800, 300, 400)
    config.labels.embedding = "dataset"
    config.backbone = "conv4"
    config.backbone_weights = ""
    config.train_backbone = True
    config.model.d_joint = 128
    config.model.d_dynamic = 16
    config.train.epochs = 10
    config.train.warmup_epochs = 1
    config.train.n_query = 3
    config.train.learning_rate = 2e-3
    config.train.validate_every = 2
    config.train.validation_episodes = 30
    config.eval.sweep_episodes = 100
    if arg == "small":
        config.workdir = "runs/demo_small"
        config.shots = (1,)
        config.data.image_size = 32
        config.data.images_per_split = (80, 60, 60)
        config.model.d_joint = 16
        config.model.n_heads = 2
        config.model.d_dynamic = 4
        config.ridge.n_components = 16
        config.train.epochs = 2
        config.train.episodes_per_epoch = 2
        config.train.n_query = 1
        config.train.validation_episodes = 4
        config.eval.episodes = 6
        config.eval.sweep_episodes = 4
        config.eval.n_query = 2
    return config.lock()
