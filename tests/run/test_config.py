"""The configs, the fields that choose the papers' ablations, and mistakes in them."""

import importlib
from pathlib import Path

import pytest

from configs import demo
from mlfsic_jax.core.lcm import SELECTIONS
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.core.prototypes import ATTENTIONS
from mlfsic_jax.run import config as defaults
from mlfsic_jax.system.errors import InputError

ABLATIONS = [
    *({"model.attention": name} for name in ATTENTIONS),
    *({"lcm.selection": name} for name in SELECTIONS),
    {"model.dynamic": False},
    {"model.attention": "standard", "model.dynamic": False},
    {"model.cm_loss": False},
    {"model.cm_loss": False, "model.query_loss_on": "both"},
    {"model.query_top": 12},
    {"model.attention": "global", "model.anchor": True},
    *({"model.n_heads": n, "model.d_joint": d} for n, d in ((1, 512), (16, 512), (6, 510), (12, 516), (14, 518))),
]

LASO = {"data.name": "coco", "data.policy": "laso", "data.episodes": "LaSO"}


@pytest.mark.parametrize("fields", [*ABLATIONS, LASO | {"eval.episodes": 10, "shots": (5,)}], ids=str)
def test_ablations_are_valid(fields):
    config = defaults.default().lock()
    config.update_from_flattened_dict(fields)
    defaults.validate(config)


def test_the_fields_of_the_model_are_those_of_the_config():
    fields = {name for name in BaseModel.__dataclass_fields__ if name not in ("backbone", "parent", "name")}
    model = defaults.default().model
    assert set(model) == fields
    assert BaseModel(**model) == BaseModel()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model.attention": "cross"},
            "config.model.attention = 'cross': must be one of channelwise, standard, global, simple, simple_local, "
            "low_rank, none",
        ),
        (
            {"model.attention": "none", "model.dynamic": False},
            "config.model.dynamic = False: must be True where attention is none: there is nothing else to make "
            "prototypes of",
        ),
        (
            {"model.attention": "simple", "model.anchor": True},
            "config.model.attention = 'simple': must be channelwise, standard or global where anchor is True",
        ),
        ({"model.query_loss_on": "support"}, "config.model.query_loss_on = 'support': must be one of query, both"),
        ({"model.query_top": -1}, "config.model.query_top = -1: must be at least 0"),
        (
            {"lcm.selection": "rho"},
            "config.lcm.selection = 'rho': must be one of momentum, taylor, exact, importance, low_importance",
        ),
        (
            {"model.cm_loss": False, "train.gamma": 0.0},
            "config.train.gamma = 0.0: must be above 0 where model.cm_loss is False: nothing would be trained",
        ),
        (
            {"data.name": "coco", "data.episodes": "LaSO", "eval.episodes": 10},
            "config.data.episodes = 'LaSO': must be empty unless data.policy is laso and data.split empty",
        ),
        (
            LASO | {"eval.episodes": 10, "data.split": "auto"},
            "config.data.episodes = 'LaSO': must be empty unless data.policy is laso and data.split empty",
        ),
        (LASO, "config.eval.episodes = 200: must be 10, the number of LaSO's, where data.episodes is set"),
        (
            LASO | {"eval.episodes": 10, "shots": (1, 3)},
            "config.shots = (1, 3): must be (1,), (5,) or (1, 5) where data.episodes is set",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(fields, message):
    config = defaults.default().lock()
    config.update_from_flattened_dict(fields)
    with pytest.raises(InputError) as caught:
        defaults.validate(config)
    assert str(caught.value) == message


def variants(name):
    return getattr(importlib.import_module(f"configs.{name}"), "VARIANTS", ("",))


CONFIGS = [path.stem for path in Path(demo.__file__).parent.glob("*.py")]


@pytest.mark.parametrize("name, arg", [(name, arg) for name in CONFIGS for arg in variants(name)])
def test_configs_are_valid(name, arg):
    module = importlib.import_module(f"configs.{name}")
    assert f"configs/{name}.py" in module.__doc__
    config = module.get_config(arg)
    defaults.validate(config)
    with pytest.raises(AttributeError, match="epoch"):
        config.train.epoch = 3  # locked: a mistyped field is an error


def test_unknown_variants_are_refused():
    for name in CONFIGS:
        with pytest.raises(ValueError, match="no variant 'gpu'"):
            importlib.import_module(f"configs.{name}").get_config("gpu")


def test_all_mistakes_in_a_config_are_named_at_once():
    config = demo.get_config()
    config.update_from_flattened_dict({"model.n_heads": 7, "backbone": "vgg", "train.epochs": 0, "shots": ()})
    with pytest.raises(InputError) as caught:
        defaults.validate(config)
    for field in ("model.d_joint", "backbone = 'vgg'", "train.epochs", "shots"):
        assert f"config.{field}" in str(caught.value)
