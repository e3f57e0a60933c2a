"""COCO 2014 train + val, 52 / 12 / 16 labels, the paper's sizes: 224x224, GloVe 300, 200 episodes, 1 and 5 shots.

``python -m mlfsic_jax.main --config=configs/coco.py`` with

- (no variant): ResNet-50, frozen. Not run here: needs COCO 2014 and torchvision's weights.
- ``:laso``: LaSO's protocol, 64 seen and 16 novel labels, 10 episodes of K images per label from train2014 with all of
  val2014's images of novel labels as queries; Inception-v3, which the papers call GoogleNet-v3. Not run here: needs the
  same. Its label counts were checked on COCO's real annotations, all else on made-up photos.
"""

from mlfsic_jax.run import config as defaults

VARIANTS = ("", "laso")


def get_config(arg: str = ""):
    """``arg``: one of VARIANTS."""
    if arg not in VARIANTS:
        raise ValueError(f"configs/coco.py has no variant {arg!r}: choose {', '.join(VARIANTS[1:])}, or none")
    config = defaults.default()
    config.workdir = f"runs/coco_{arg}" if arg else "runs/coco"
    config.data.name = "coco"
    config.data.source = "data/coco"  # where ``python -m mlfsic_jax.fetch coco`` puts it
    config.data.policy = "exclusive"  # images all of whose labels are of one split
    if arg == "laso":
        config.data.policy = "laso"
        config.backbone = "inception_v3"
        config.eval.episodes = 10
    return config.lock()
