"""PASCAL VOC 2007 + 2012, the paper's sizes: 224x224, GloVe 300, 200 episodes, 1 and 5 shots.

``python -m mlfsic_jax.main --config=configs/voc.py`` with

- (no variant): ResNet-50, frozen. Not run here: needs VOC 2007 + 2012 and torchvision's weights.
- ``:cpu``: MobileNetV2, frozen, 400 steps a model. On 2 CPU cores and 4,285 of the 5,011 photos of VOC 2007 train+val:
  about 6 minutes with the cache; Ma-AP at 1 / 5 shots: base 57.8 / 62.8, lcm 58.2 / 67.1, ridge 64.1 / 79.4,
  region_word_ridge 66.4 / 79.3.
- ``:anchored``: as ``:cpu``, but Base starts at the plain prototypes: base 61.5 / 70.4, lcm 61.4 / 71.3.
- ``:deploy``: as ``:cpu``, the closed-form model fitted on validation labels too. On the same photos region_word_ridge
  67.5 / 79.6.
- ``:lite0``: as ``:cpu``, on EfficientNet-Lite0 at 320 pixels, the backbone of the model out of the box.
- ``:paper``: the literal reading of the paper, trained end to end. Not run here: needs what the first one needs, and an
  accelerator.
- ``:finetune``: ResNet-50 trained end to end with our settings. Needs an accelerator; run with Conv-4-64, in tests.
"""

from mlfsic_jax.run import config as defaults

VARIANTS = ("", "cpu", "anchored", "deploy", "lite0", "paper", "finetune")


def get_config(arg: str = ""):
    """``arg``: one of VARIANTS."""
    if arg not in VARIANTS:
        raise ValueError(f"configs/voc.py has no variant {arg!r}: choose one of {', '.join(VARIANTS[1:])}, or none")
    config = defaults.default()
    config.workdir = f"runs/voc_{arg}" if arg else "runs/voc"
    config.data.name = "voc"
    config.data.source = "data/VOCdevkit"  # where ``python -m mlfsic_jax.fetch voc`` puts it
    # Train images have no validation or novel label, validation images no novel one; other labels are ignored.
    config.data.policy = "leakfree"
    if arg in ("cpu", "anchored", "deploy", "lite0"):
        config.backbone = "mobilenet_v2"
        # On validation labels d_d = 64 is no better and 200 epochs hardly are, see docs/findings.md.
        config.model.d_dynamic = 16
        config.train.epochs = 40
        config.train.warmup_epochs = config.train.get_ref("epochs") // 20
        config.train.validate_every = 5
        if arg == "anchored":
            config.model.anchor = True
        elif arg == "deploy":
            config.ridge.fit_on = ("train", "validation")
        elif arg == "lite0":
            config.backbone, config.data.image_size = "efficientnet_lite0", 320
    elif arg == "paper":
        config.train_backbone = True
        config.freeze_batch_norm = True
        config.model.skip = False
        config.lcm.score_scaling = "none"
        config.lcm.thresholds = (0.65,)
        config.train.learning_rate = 1e-3
        config.train.schedule = "constant"
    elif arg == "finetune":
        config.train_backbone = True
        config.freeze_batch_norm = True
    return config.lock()
