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
    grid = {"ridge.regulariser": (0.01, 1), "logistic.inverse_regulariser": (1,)}
    ridge_sweep.sweep(config(), ("ridge", "logistic"), grid)
    title, columns, *rows = capsys.readouterr().out.splitlines()
    assert title == "Ma-AP %, 2 validation episodes, * marks the default"
    assert re.split("  +", columns) == ["setting", "ridge, 1-shot", "logistic, 1-shot"]
    found = {cells[0]: [float(x) for x in cells[1:]] for cells in (re.split("  +", row) for row in rows)}
    assert list(found) == ["regulariser 0.01", "regulariser 1 *", "inverse_regulariser 1"]
    assert found["regulariser 0.01"][1] == found["regulariser 1 *"][1]  # the field of another method
    assert found["inverse_regulariser 1"][0] == found["regulariser 1 *"][0]
    assert all(0 < value <= 100 for values in found.values() for value in values)


def test_every_field_of_the_grid_has_the_default_among_its_values():
    usual = config(**{"ridge.n_components": default().ridge.n_components})
    for field, values in ridge_sweep.GRID.items():
        assert sum(label.endswith(" *") for label, _ in ridge_sweep.settings(usual, {field: values})) == 1


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("lcm", {}, "--method=lcm needs a model trained by episodes"),
        ("ridge", {"train_backbone": True}, "needs a frozen backbone"),
        ("ridge", {"ridge.regulariser": -1}, "config.ridge.regulariser = -1"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(name, changes, complaint):
    with pytest.raises(InputError, match=re.escape(complaint)):
        ridge_sweep.sweep(config(**changes), (name,))


def test_a_value_that_cannot_be_is_told_before_anything_is_loaded():
    with pytest.raises(InputError, match=re.escape("config.ridge.regulariser = -1")):
        ridge_sweep.sweep(config(), ("ridge",), {"ridge.regulariser": (1, -1)})
