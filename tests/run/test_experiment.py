"""A whole run: what it writes, and what it refuses before it begins."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from configs import voc
from mlfsic_jax.bench import made_up
from mlfsic_jax.core.metrics import METRICS
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.methods import METHODS
from mlfsic_jax.run import experiment
from mlfsic_jax.run.experiment import train_and_evaluate
from mlfsic_jax.system.errors import InputError
from tests.tiny import longer, without_paths


def test_a_whole_run_writes_its_results(undisturbed):
    folder, results = undisturbed
    written = json.loads((folder / "run" / "results.json").read_text())
    assert without_paths(written) == without_paths(results)
    (entry,) = written
    assert (entry["dataset"], entry["episodes"], entry["n_shot"]) == ("scenes", 4, 1)
    assert list(entry["methods"]) == [name for name, method in METHODS.items() if not method.on_request]
    for values in [*entry["methods"].values(), entry["paired"]["lcm-base"], entry["chance"]]:
        assert tuple(values) == METRICS
        assert all(np.isfinite([v["mean"], v["ci95"]]).all() for v in values.values())
    assert entry["config"]["train"]["epochs"] == 4
    sweep = {point["theta"]: point for point in entry["theta"]["sweep"]}
    assert sweep[0.5]["kept"] == 1
    assert sweep[0.5]["novel_macro_ap"] == entry["methods"]["base"]["macro_ap"]["mean"]
    assert sweep[0.5]["validation_macro_ap"] == entry["theta"]["base_validation_macro_ap"]
    best = max(point["validation_macro_ap"] for point in sweep.values())
    assert sweep[entry["theta"]["chosen"]]["validation_macro_ap"] == best
    assert sweep[entry["theta"]["chosen"]]["novel_macro_ap"] == entry["methods"]["lcm"]["macro_ap"]["mean"]
    log = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3, 4]
    assert all(line["n_shot"] == 1 and np.isfinite(line["cm_loss"]) for line in log)


def test_a_finished_run_is_not_trained_again(undisturbed, monkeypatch):
    folder, results = undisturbed
    monkeypatch.setattr(experiment, "train_steps", lambda *args, **options: pytest.fail("trained again"))
    files = ("results.json", "episodes_1shot.safetensors", "model_1shot.safetensors")
    before = [(folder / "run" / file).read_bytes() for file in files]
    again = train_and_evaluate(longer(folder), folder / "run")
    assert without_paths(again) == without_paths(results)
    assert [(folder / "run" / file).read_bytes() for file in files] == before


def test_infeasible_episodes_are_refused_before_training(tmp_path):
    config = longer(tmp_path, **{"data.images_per_split": (80, 60, 18), "eval.n_query": 4})
    with pytest.raises(InputError, match=r"novel split, 1-shot: .*(red|green|blue|purple) .*images"):
        train_and_evaluate(config, tmp_path / "run")


def test_everything_missing_is_reported_at_once(tmp_path):
    config = voc.get_config("cpu")
    config.cache_dir = str(tmp_path)
    with pytest.raises(InputError) as caught:
        train_and_evaluate(config, tmp_path / "run")
    fields = ("config.data.source", "config.labels.vectors", "config.backbone_weights")
    for part in (*fields, "host.robots.ox.ac.uk", "fetch voc", "fetch glove", "fetch mobilenet_v2"):
        assert part in str(caught.value)


def test_the_steps_of_a_call_are_those_of_single_steps(tmp_path, monkeypatch):
    """Cached features: as many steps a call as fit, and from any step on."""
    config = longer(tmp_path, **{"train.episodes_per_epoch": 5})
    features = np.arange(60 * 2 * 3, dtype=np.float16).reshape(60, 1, 2, 3)
    train = made_up.view(features.__getitem__, made_up.one_label_each(60, 3))
    run = SimpleNamespace(model=BaseModel(), splits={"train": train})

    def batches(n_steps, first):
        of_step = 3 * (1 + config.train.n_query) * features[0].nbytes
        monkeypatch.setattr(experiment, "_CALL_BYTES", n_steps * of_step)
        return list(experiment.Episodes(config, run, 1).batches(1, first))

    one, two = batches(0, 0), batches(2, 0)
    assert [batch.support.shape[:2] for batch in one] == [(1, 1)] * 5
    assert [batch.support.shape[:2] for batch in two] == [(1, 2), (1, 2), (1, 1)]
    for whole, parts in zip(zip(*two, strict=True), zip(*one, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(whole, axis=1), np.concatenate(parts, axis=1))
    for resumed, expected in zip(batches(2, 2), two[1:], strict=True):
        for got, there in zip(resumed, expected, strict=True):
            np.testing.assert_array_equal(got, there)
