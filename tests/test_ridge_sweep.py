"""The sweep on made-up features: what it prints, and what it refuses."""

import re

import numpy as np
import pytest

from mlfsic_jax import ridge_sweep
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data.features import View
from mlfsic_jax.run import inputs
from mlfsic_jax.run.config import default
from mlfsic_jax.system.errors import InputError


def config(**changes):
    fields = {"shots": (1,), "eval.sweep_episodes": 2, "eval.n_query": 2, "ridge.n_components": 4}
    config = default()
    config.update_from_flattened_dict(fields | changes)
    return config


def made_up(_):
    rng = np.random.default_rng(0)
    features, words = rng.random((40, 2, 2, 8), np.float32), rng.standard_normal((4, 5), np.float32)
    view = View(features.__getitem__, np.arange(40)[:, None] % 4 == np.arange(4), words, tuple("abcd"))
    return inputs.Inputs(BaseModel(), {"validation": view}, view, None, {})


def test_one_row_for_each_setting(monkeypatch, capsys):
    monkeypatch.setattr(inputs, "load", made_up)
    ridge_sweep.sweep(config(), ("ridge", "logistic"), ["ridge.regulariser=0.01,1", "logistic.inverse_regulariser=1"])
    title, columns, *rows = capsys.readouterr().out.splitlines()
    assert title == "Ma-AP %, 2 validation episodes, * marks the default"
    assert re.split("  +", columns) == ["setting", "ridge, 1-shot", "logistic, 1-shot"]
    found = {cells[0]: [float(x) for x in cells[1:]] for cells in (re.split("  +", row) for row in rows)}
    assert list(found) == ["regulariser 0.01", "regulariser 1 *", "inverse_regulariser 1"]
    assert found["regulariser 0.01"][1] == found["regulariser 1 *"][1]  # the field of another method
    assert found["inverse_regulariser 1"][0] == found["regulariser 1 *"][0]
    assert all(0 < value <= 100 for values in found.values() for value in values)


def test_every_option_of_the_grid_has_the_default_among_its_values():
    usual = config(**{"ridge.n_components": default().ridge.n_components})
    for option in ridge_sweep.GRID:
        assert sum(label.endswith(" *") for label, _ in ridge_sweep.settings(usual, option)) == 1


@pytest.mark.parametrize(
    ("names", "option", "complaint"),
    [
        (("lcm",), "lcm.scale=1", "--method=lcm needs a model trained by episodes"),
        (("ridge",), "ridge.beat=1", "--option=ridge.beat=1: give FIELD=VALUE,VALUE"),
        (("ridge",), "ridge.beta", "--option=ridge.beta: give FIELD=VALUE,VALUE"),
        (("ridge",), "ridge.regulariser=-1", "config.ridge.regulariser = -1"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(names, option, complaint):
    with pytest.raises(InputError, match=re.escape(complaint)):
        ridge_sweep.sweep(config(), names, [option])


def test_a_trained_backbone_is_refused():
    with pytest.raises(InputError, match="needs a frozen backbone"):
        ridge_sweep.sweep(config(train_backbone=True), ("ridge",), ridge_sweep.GRID)
