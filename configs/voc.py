"""PASCAL VOC 2007 + 2012, the paper's setting.

python -m mlfsic_jax.main --config=configs/voc.py            ResNet-50, frozen
python -m mlfsic_jax.main --config=configs/voc.py:cpu        MobileNetV2, frozen, fewer steps
python -m mlfsic_jax.main --config=configs/voc.py:paper      the literal reading of the paper
python -m mlfsic_jax.main --config=configs/voc.py:finetune   ResNet-50 trained end to end
"""

from mlfsic_jax import config as defaults

VARIANTS = ("", "cpu", "paper", "finetune")


def get_config(arg: str = ""):
    """``arg``: one of VARIANTS."""
    if arg not in VARIANTS:
        raise ValueError(f"configs/voc.py has no variant {arg!r}: choose one of {', '.join(VARIANTS[1:])}, or none")
    config = defaults.default()
    config.workdir = f"runs/voc_{arg}" if arg else "runs/voc"
    config.data.name = "voc"
    config.data.source = "data/VOCdevkit"
    config.labels.vectors = "data/glove.6B.300d.txt"
    config.backbone = "resnet50"
    config.backbone_weights = "data/resnet50-0676ba61.pth"
    if arg == "cpu":
        config.backbone = "mobilenet_v2"
        config.backbone_weights = "data/mobilenet_v2-b0353104.pth"
        config.train.epochs = 20
        config.train.warmup_epochs = 1
        config.train.validate_every = 2
    elif arg == "paper":
        config.model.skip = False
        config.lcm.score_scaling = "none"
        config.lcm.thresholds = (0.65,)
        config.train.learning_rate = 1e-3
        config.train.schedule = "constant"
    elif arg == "finetune":
        config.train_backbone = True
    return config.lock()
