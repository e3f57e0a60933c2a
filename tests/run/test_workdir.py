"""A workdir belongs to one run, and says where its results come from."""

import json
import os
import re
import struct

import jax
import numpy as np
import pytest

import mlfsic_jax
from mlfsic_jax.run.experiment import train_and_evaluate
from mlfsic_jax.run.workdir import MetricsLog, claim, open_workdir
from mlfsic_jax.system.errors import InputError
from tests.tiny import longer


def test_two_runs_in_one_workdir_are_refused(undisturbed):
    folder, _ = undisturbed
    with (
        open_workdir(folder / "run"),
        pytest.raises(InputError, match=rf"another run has the workdir .*run: .*choose another.*{os.getpid()}"),
    ):
        train_and_evaluate(longer(folder), folder / "run")


def test_a_workdir_of_another_run_is_refused(undisturbed):
    folder, _ = undisturbed
    with pytest.raises(InputError, match=r"other settings, train.learning_rate \(there 0.002, now 0.1\)"):
        train_and_evaluate(longer(folder, **{"train.learning_rate": 0.1}), folder / "run")


def test_a_run_that_failed_before_it_trained_gives_its_workdir_back(tmp_path):
    config = longer(tmp_path)
    for n_query in (50, 40):
        config.train.n_query = n_query  # of more images than there are
        with pytest.raises(InputError, match=r"lower n_shot or n_query \(of a run: config.shots, config.train.n_query"):
            train_and_evaluate(config, tmp_path / "run")


def test_a_workdir_with_a_saved_model_alone_is_kept(tmp_path):
    config = longer(tmp_path)
    claim(tmp_path, config, {"a": 1})
    (tmp_path / "backbone.safetensors").touch()
    with pytest.raises(InputError, match=r"other settings, a \(there 1, now 3\)"):
        claim(tmp_path, config, {"a": 3})


def test_hashes_are_told_by_their_first_digits(tmp_path):
    (tmp_path / "checkpoints_1shot/0").mkdir(parents=True)
    config = longer(tmp_path)
    claim(tmp_path, config, {"inputs": {"dataset": "0123abcd" * 8}})
    with pytest.raises(
        InputError, match=r"inputs.dataset \(there 0123abcd.., now 4567cdef..\): choose another workdir"
    ):
        claim(tmp_path, config, {"inputs": {"dataset": "4567cdef" * 8}})


def test_results_say_where_they_come_from(undisturbed):
    folder, results = undisturbed
    (provenance,) = [entry["provenance"] for entry in results]
    trained_with = json.loads((folder / "run" / "trained_with.json").read_text())
    assert provenance["inputs"] == trained_with["inputs"] and len(provenance["inputs"]["dataset"]) >= 12
    assert provenance["packages"]["jax"] == jax.__version__
    assert provenance["mlfsic_jax"]["version"] == mlfsic_jax.__version__
    assert re.fullmatch("[0-9a-f]{64}", provenance["mlfsic_jax"]["sha256"])


def test_a_line_cut_short_in_the_log_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"n_shot": 1, "step": 2}\n{"n_shot": 5, "step": 9}\n{"n_shot": 1, "step": 4}\n{"n_sh')
    MetricsLog(path, {"n_shot": 1}, after_step=2)
    assert path.read_text() == '{"n_shot": 1, "step": 2}\n{"n_shot": 5, "step": 9}\n'


def scalars(folder):
    """(name, step, value) of every scalar in an event file, whose format is length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.iterdir()
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack("<Q", content[at : at + 8])
        event = Event.FromString(content[at + 12 : at + 12 + length])
        yield from ((value.tag, event.step, value.simple_value) for value in event.summary.value)
        at += 16 + length


def test_tensorboard_has_the_lines_of_the_log(undisturbed):
    folder = undisturbed[0] / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = {(name, line["step"]): value for line in lines for name, value in line.items()}
    found = list(scalars(folder / "tensorboard" / "n_shot=1"))
    assert len(found) == 4 * 5  # validations, numbers
    for name, step, value in found:
        assert name not in ("n_shot", "step")
        np.testing.assert_allclose(value, expected[name, step], rtol=1e-6)


def test_a_resumed_run_writes_no_step_twice_for_tensorboard(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", {"n_shot": 1}, after_step=0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float(step)})
    log = MetricsLog(tmp_path / "metrics.jsonl", {"n_shot": 1}, after_step=1)
    log.write({"step": 2, "loss": 7.0})
    assert list(scalars(tmp_path / "tensorboard" / "n_shot=1")) == [("loss", 1, 1.0), ("loss", 2, 7.0)]
