"""To add a method takes a file and a line: the whole program takes it up by itself."""

import csv
import importlib
import json
import re
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import mlfsic_jax
from mlfsic_jax.methods import METHODS
from mlfsic_jax.paper import reproduce
from mlfsic_jax.report import write_report
from mlfsic_jax.run.experiment import train_and_evaluate
from mlfsic_jax.run.workdir import episodes_file
from mlfsic_jax.system.errors import InputError
from tests.tiny import scenes

FILE = '''
"""The nearest support image with the label, by the distance of pooled features."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from mlfsic_jax.core.options import positive, require
from mlfsic_jax.methods import Method
from mlfsic_jax.methods._training import pooled_features


@dataclasses.dataclass(frozen=True)
class Toy(Method):
    sections: ClassVar[tuple[str, ...]] = ("toy",)
    stores: ClassVar[tuple[str, ...]] = ("toy",)
    base: ClassVar[str] = "images"
    against: ClassVar[str] = "base"

    sharpness: float = 1.0

    def __post_init__(self):
        require(self, **positive(self, "sharpness"))

    def train(self, key, base):
        return {"spread": pooled_features(base).std(axis=0)}

    def fit(self, trained, images, labels, words):
        return {"support": images["pooled"], "labels": labels}

    def score(self, trained, state, images):
        difference = (images["pooled"][:, None] - state["support"]) / (trained["spread"] + 1e-3)
        near = jnp.exp(-self.sharpness * jnp.square(difference).mean(axis=-1))
        return jnp.where(state["labels"], near[..., None], 0).max(axis=1)
'''


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """A run with the toy method: its folder, its config and what it printed."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_method.py").write_text(FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(METHODS, "toy", importlib.import_module("toy_method").Toy())  # the line
        config = scenes(folder, **{"toy.sharpness": 0.5})
        train_and_evaluate(config, folder / "run")
        yield folder, config
        patch.delitem(sys.modules, "toy_method")


def test_it_is_evaluated(added, capsys):
    folder, config = added
    train_and_evaluate(config, folder / "run")  # nothing is left to train
    table = capsys.readouterr().out
    (entry,) = json.loads((folder / "run/results.json").read_text())
    assert list(entry["methods"])[-1] == "toy" and "toy-base" in entry["paired"]
    assert entry["config"]["toy"] == {"sharpness": 0.5}
    score = entry["methods"]["toy"]["macro_ap"]["mean"]
    assert f"{100 * score:.1f} ±" in next(line for line in table.splitlines() if line.startswith("  toy  "))
    assert "  toy - base  " in table
    values = load_file(episodes_file(folder / "run", 1))["toy.macro_ap"]
    np.testing.assert_allclose(values.mean(), score, atol=1e-6)


def test_its_options_have_their_rules(added):
    folder, config = added
    wrong = config.copy_and_resolve_references()
    wrong.toy.sharpness = -1.0
    with pytest.raises(InputError, match=r"config.toy.sharpness = -1.0: must be positive"):
        train_and_evaluate(wrong, folder / "wrong")


def test_it_labels_photos(added):
    folder, _ = added
    photos = [np.full((32, 32, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 200), (0, 200, 0))]
    few = mlfsic_jax.fit(mlfsic_jax.load(folder / "run"), photos, ["one", "two", []], method="toy")
    assert few.note.startswith("method toy: chosen by you (")
    np.testing.assert_allclose(few.predict(photos[:2]).probabilities.diagonal(), [1, 1], atol=1e-6)  # seen before
    assert (few.predict(photos[2]).probabilities < 1).all()


@pytest.mark.parametrize("episodes", [0, 1])
def test_it_stands_in_the_page(added, episodes):
    folder, _ = added
    page = write_report(folder / "run", folder / f"page{episodes}.html", episodes=episodes).read_text()
    assert '<th scope="row">toy</th>' in page and "toy − base" in page


def test_it_stands_in_a_table(added, monkeypatch):
    folder, config = added
    whole = reproduce.TABLES["demo"](config)
    rows = tuple(row for row in whole.rows if row.method in ("base", "toy") and row.runs == ({},))
    assert [row.name for row in rows] == ["Base", "toy"]
    monkeypatch.setitem(reproduce.TABLES, "demo", lambda config: whole._replace(rows=rows))
    text = reproduce.reproduce("demo", config, folder / "tables")
    (entry,) = json.loads((folder / "tables/base/results.json").read_text())
    with open(folder / "tables/demo.csv", newline="") as file:
        found = {(row["row"], row["metric"]): float(row["ours"]) for row in csv.DictReader(file)}
    mean = entry["methods"]["toy"]["macro_ap"]["mean"]
    np.testing.assert_allclose(found["toy", "macro_ap"], 100 * mean, atol=2e-4)
    assert re.search(rf"^\| toy +\| {100 * mean:.1f} ± ", text, re.MULTILINE)
