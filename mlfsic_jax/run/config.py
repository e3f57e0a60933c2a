"""All fields of a run: their defaults and rules are those of the dataclasses here, in ``core`` and in ``methods``.

``configs/*.py`` start from ``default()`` and show what matters for their dataset.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from mlfsic_jax.backbones import BACKBONES
from mlfsic_jax.core.lcm import LCMOptions
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.core.options import OptionError, one_of, positive, require
from mlfsic_jax.data import DATASETS, laso_episodes
from mlfsic_jax.data.splits import POLICIES
from mlfsic_jax.data.words import EMBEDDINGS
from mlfsic_jax.methods import METHODS, Method
from mlfsic_jax.system.errors import InputError


@dataclasses.dataclass(frozen=True)
class Data:
    """``config.data``: the photos and how they are split."""

    name: str = "voc"
    source: str = ""  # the dataset's official folder
    prepared_dir: str = ""  # the prepared copy; empty: in cache_dir
    policy: str = ""  # which images a split may use: leakfree, exclusive, COCO's laso; empty: the dataset's usual one
    episodes: str = ""  # under policy laso: the folder of LaSO's published episodes; empty: drawn at random
    split: str = ""  # of the labels; empty: the published one; "auto": random; or a JSON file
    image_size: int = 0  # 0: the backbone's own
    images_per_split: tuple[int, ...] = (1200, 400, 600)  # generated data only
    seed: int = 0  # of generated data, and of an automatic split

    def __post_init__(self):
        policies = (*POLICIES, "laso") if self.name == "coco" else POLICIES
        require(
            self,
            name=one_of(self.name, DATASETS),
            policy=(self.policy in ("", *policies), f"must be empty or one of {', '.join(policies)}"),
            episodes=(
                not self.episodes or (self.policy == "laso" and not self.split),
                "must be empty unless data.policy is laso and data.split empty",
            ),
            split=(not self.split or self.name != "scenes", "generated data have their own split"),
            image_size=(self.image_size == 0 or self.image_size >= 32, "must be 0 or at least 32"),
        )


@dataclasses.dataclass(frozen=True)
class Words:
    """``config.labels``: the labels' word vectors."""

    embedding: str = "glove"  # see data.words.EMBEDDINGS; "dataset": generated data bring theirs
    vectors: str = ""  # empty: the embedding's usual file in data_dir

    def __post_init__(self):
        require(self, embedding=one_of(self.embedding, (*EMBEDDINGS, "dataset")))


@dataclasses.dataclass(frozen=True)
class Training:
    """``config.train``: training by episodes."""

    epochs: int = 200
    warmup_epochs: int = 10
    episodes_per_epoch: int = 10  # rounded up to whole steps
    episodes_per_step: int = 1  # whose gradients are averaged; 0: one per device
    n_query: int = 4
    learning_rate: float = 1e-4
    schedule: str = "cosine"  # after warm-up: "cosine" to zero, or "constant"
    gamma: float = 1.0  # weight of the query loss
    validate_every: int = 1  # epochs between two validations, each of which writes a checkpoint
    validation_episodes: int = 50

    def __post_init__(self):
        fields = ("epochs", "episodes_per_epoch", "n_query", "validate_every", "validation_episodes", "learning_rate")
        require(
            self,
            **positive(self, *fields),
            episodes_per_step=(self.episodes_per_step >= 0, "must be at least 0"),
            warmup_epochs=(0 <= self.warmup_epochs < self.epochs, "must be below train.epochs"),
            schedule=one_of(self.schedule, ("cosine", "constant")),
        )


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """``config.pretrain``: the backbone as a classifier of the train labels."""

    epochs: int = 40
    warmup_epochs: int = 1
    batch_size: int = 64
    learning_rate: float = 1e-4

    def __post_init__(self):
        warmup = (0 <= self.warmup_epochs < self.epochs, "must be below pretrain.epochs")
        require(self, **positive(self, "epochs", "batch_size", "learning_rate"), warmup_epochs=warmup)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """``config.eval``: the episodes that the results are means of."""

    episodes: int = 200
    n_query: int = 4
    sweep_episodes: int = 200  # validation episodes on which theta is chosen
    methods: tuple[str, ...] = ()  # see methods.METHODS; empty: all that take no minutes

    def __post_init__(self):
        several, known = "must be at least 2, for an interval", METHODS.keys() >= set(self.methods)
        require(
            self,
            episodes=(self.episodes >= 2, several),
            sweep_episodes=(self.sweep_episodes >= 2, several),
            **positive(self, "n_query"),
            methods=(known, f"some of {', '.join(METHODS)}; empty for those that take no minutes"),
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """The fields of no section."""

    seed: int = 0
    workdir: str = "runs/default"  # checkpoints, metrics.jsonl, results.json
    cache_dir: str = "cache"  # local features or resized photos, prepared datasets, compiled programs
    data_dir: str = "data"  # downloaded weights and word vectors
    shots: tuple[int, ...] = (1, 5)  # K; one model is trained for each
    backbone: str = "resnet50"  # see backbones.BACKBONES
    backbone_weights: str = "published"  # those in data_dir; or a file; empty: random, for one that is trained
    train_backbone: bool = False  # False: frozen, local features cached; True: trained end to end from photos
    # A trained backbone keeps the batch statistics of its weights: for small episodes, and for files whose batch norm
    # is folded into the convolutions, which statistics of their own would undo.
    freeze_batch_norm: bool = False
    augment: bool = True  # of the photos, when the backbone is trained
    compute_dtype: str = ""  # of the backbone: "float32", "bfloat16", or empty: bfloat16 on GPU and TPU

    def __post_init__(self):
        whole = len(self.shots) > 0 and all(isinstance(k, int) and k > 0 for k in self.shots)
        once = len(set(self.shots)) == len(self.shots)
        rule = "a frozen backbone needs weights: give their file, or set config.train_backbone=True"
        weights = bool(self.backbone_weights) or self.train_backbone
        published = self.backbone_weights != "published"
        if weights and self.backbone in BACKBONES and not BACKBONES[self.backbone].files:
            rule = f"{self.backbone} has no published weights: give a file, or leave it empty and train it"
            weights = published
        require(
            self,
            shots=(whole and once, "each number once" if whole else "whole numbers above 0"),
            backbone=one_of(self.backbone, tuple(BACKBONES)),
            backbone_weights=(weights, rule),
            compute_dtype=(self.compute_dtype in ("", "float32", "bfloat16"), "must be empty, float32 or bfloat16"),
        )


_SECTIONS = {"data": Data, "labels": Words, "train": Training, "pretrain": Pretraining, "eval": Evaluation}
# Fields of methods' sections that concern training, not the method.
_ALSO = {"lcm": {"during_training": False, "training_threshold": 0.53}, "ridge": {"fit_on": ("train",)}}
_FIT_ON = (("train",), ("train", "validation"))  # the latter for deployment: then nothing is left to choose on


def default() -> ConfigDict:
    """The paper's setting where the paper says it, else our choice; docs/findings.md has what others do."""
    fields = _defaults(Run) | {name: _defaults(section) for name, section in _SECTIONS.items()}
    model = _defaults(BaseModel()).items()
    fields["model"] = {name: value for name, value in model if name not in ("backbone", "parent", "name")}
    for method in METHODS.values():
        if len(method.sections) == 1 and method.sections[0] not in fields:
            fields[method.sections[0]] = _defaults(method) | _ALSO.get(method.sections[0], {})
    return ConfigDict(fields)


def create_model(config: ConfigDict, backbone: nn.Module | None = None) -> BaseModel:
    """The model of ``config.model``; with a backbone it takes photos, without one local features."""
    return BaseModel(**config.model, backbone=backbone)


def create_methods(config: ConfigDict, n_shot: int, names: tuple[str, ...] = ()) -> dict[str, Method]:
    """Methods with the options of the config, in the order of ``METHODS``: ``names``, or ``config.eval.methods``.

    ``n_shot`` is K, for methods that are trained by episodes.
    """
    wanted = names or tuple(config.eval.methods) or [name for name, m in METHODS.items() if not m.on_request]
    known = {"model": create_model(config), "n_shot": n_shot, "n_query": config.train.n_query}
    methods = {}
    for name in (name for name in METHODS if name in wanted):
        fields, own = {field.name for field in dataclasses.fields(METHODS[name])}, _defaults(METHODS[name])
        options = {field: known[field] for field in fields & known.keys()}
        for section in METHODS[name].sections:
            options |= {field: _plain(value) for field, value in config[section].items() if field in own}
        methods[name] = dataclasses.replace(METHODS[name], **options)
    return methods


def lcm_options(config: ConfigDict) -> LCMOptions:
    """How LCM runs during training."""
    return LCMOptions(**{field.name: config.lcm[field.name] for field in dataclasses.fields(LCMOptions)})


def validate(config: ConfigDict) -> None:
    """``InputError`` where the fields cannot work, naming all mistakes, one a line."""
    mistakes: dict[str, str] = {}

    def check(sections: tuple[str, ...], make: Callable, /, *args: Any, **options: Any) -> None:
        try:
            make(*args, **options)
        except OptionError as error:
            for field, rule in error.mistakes.items():
                section = next((name for name in sections if field in config[name]), "")
                value = (config[section] if section else config)[field]
                mistakes[f"{section}.{field}" if section else field] = f"{_plain(value)!r}: {rule}"

    check((), Run, **{field.name: config[field.name] for field in dataclasses.fields(Run)})
    for name, section in _SECTIONS.items():
        check((name,), section, **_plain(config[name].to_dict()))
    check(("model",), create_model, config)
    if not any(field.startswith("model.") for field in mistakes):
        for name, method in METHODS.items():
            check(method.sections, create_methods, config, 1, (name,))
    if not config.model.cm_loss and config.train.gamma <= 0:
        rule = "must be above 0 where model.cm_loss is False: nothing would be trained"
        mistakes["train.gamma"] = f"{config.train.gamma!r}: {rule}"
    if config.data.episodes and config.eval.episodes != laso_episodes.RUNS:
        rule = f"must be {laso_episodes.RUNS}, the number of LaSO's, where data.episodes is set"
        mistakes["eval.episodes"] = f"{config.eval.episodes!r}: {rule}"
    if config.data.episodes and not {*laso_episodes.SHOTS} >= {*config.shots}:
        mistakes["shots"] = f"{tuple(config.shots)!r}: must be (1,), (5,) or (1, 5) where data.episodes is set"
    if tuple(config.ridge.fit_on) not in _FIT_ON:
        mistakes["ridge.fit_on"] = f"{config.ridge.fit_on!r}: ('train',) or ('train', 'validation')"
    if mistakes:
        raise InputError("\n".join(f"config.{field} = {what}" for field, what in mistakes.items()))


def _defaults(options: Any) -> dict[str, Any]:
    """The fields of a dataclass that a config may set, with their values; for a class, their defaults."""
    fields = [field.name for field in dataclasses.fields(options) if not field.metadata.get("fixed")]
    return {name: getattr(options, name) for name in fields}


def _plain(value: Any) -> Any:
    """Tuples in the place of lists, so that options can be hashed."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, (list, tuple)) else value
