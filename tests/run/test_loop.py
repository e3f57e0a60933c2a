"""Epochs that are interrupted, or go wrong."""

import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax.core.episodes import sample_episode
from mlfsic_jax.run import experiment, inputs
from mlfsic_jax.run.checkpoint import Checkpoints
from mlfsic_jax.run.experiment import train_and_evaluate
from mlfsic_jax.system.errors import InputError
from tests.tiny import acting, longer, without_paths


def test_nothing_is_compiled_after_the_first_epoch(undisturbed, monkeypatch):
    folder, _ = undisturbed
    compiled, at_save = [], []
    save = Checkpoints.save

    def count(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    def save_and_note(*args):
        at_save.append(len(compiled))
        save(*args)

    monkeypatch.setattr(Checkpoints, "save", save_and_note)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        train_and_evaluate(longer(folder), folder / "counted")
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert at_save[0] > 3
    assert at_save == at_save[:1] * 4


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("at_step", [1, 3, 6])
def test_a_run_stopped_at_any_step_and_resumed_ends_the_same(undisturbed, monkeypatch, at_step):
    folder, results = undisturbed
    workdir = folder / f"stopped_{at_step}"
    config = longer(folder)

    def stop():
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train_steps", acting(experiment.train_steps, at_step + 1, stop)[0])
        with pytest.raises(Stop):
            train_and_evaluate(config, workdir)
    assert without_paths(train_and_evaluate(config, workdir)) == without_paths(results)
    log = (workdir / "metrics.jsonl").read_text()
    assert log == (folder / "run" / "metrics.jsonl").read_text()  # no line twice, none lost


@pytest.mark.parametrize(("at_step", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (3, signal.SIGINT)])
def test_a_signal_writes_a_checkpoint_after_the_step_and_the_run_goes_on(
    undisturbed, monkeypatch, capsys, at_step, number
):
    folder, _ = undisturbed
    workdir = folder / f"asked_{at_step}"
    config = longer(folder)
    asked, steps = acting(experiment.train_steps, at_step, lambda: os.kill(os.getpid(), number))
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train_steps", asked)
        with pytest.raises(KeyboardInterrupt) as interrupt:
            train_and_evaluate(config, workdir)
        assert interrupt.value.args == (number,)
        assert len(steps) == at_step and (workdir / "checkpoints_1shot" / str(at_step) / "sha256.json").exists()
        train_and_evaluate(config, workdir)
        assert len(steps) == 8  # none twice
    assert f"continuing at epoch {at_step // 2} of 4" + ", step 1 of 2" * (at_step % 2) in capsys.readouterr().out
    for file in ("results.json", "metrics.jsonl", "episodes_1shot.safetensors"):
        there, here = ((folder / run / file).read_bytes() for run in ("run", workdir.name))
        assert there == here, file


def test_a_loss_that_is_not_finite_stops_the_run(undisturbed, monkeypatch):
    folder, _ = undisturbed
    workdir = folder / "not_finite"
    drawn = []
    read, step = experiment.read_batch, experiment.train_steps

    def noted(split, support, query):
        drawn.append((support, query))
        return read(split, support, query)

    def poisoned(state, *args, **options):
        state, losses = step(state, *args, **options)
        return state, losses.at[:, 1].set(jnp.where(state.step == 5, jnp.nan, losses[:, 1]))

    monkeypatch.setattr(experiment, "read_batch", noted)
    monkeypatch.setattr(experiment, "train_steps", poisoned)
    with pytest.raises(InputError) as error:
        train_and_evaluate(longer(folder), workdir)
    message = str(error.value)
    assert re.match(r"1-shot: the loss of step 5 is \d+\.\d+, nan \(epoch 3; ", message), message
    assert f"the last good checkpoint is that of step 4 in {workdir / 'checkpoints_1shot'}" in message
    # What the message says draws the very episode.
    ((data,),) = [json.loads(found) for found in re.findall(r"uint32\((\[.*?\])\)", message)]
    labels = inputs.load(longer(folder)).splits["train"].labels
    episode = sample_episode(jax.random.wrap_key_data(jnp.uint32(data)), labels, n_shot=1, n_query=1)
    np.testing.assert_array_equal(episode.support, drawn[4][0][0, 0])
    np.testing.assert_array_equal(episode.query, drawn[4][1][0, 0])


def test_parameters_that_are_not_finite_are_never_saved(undisturbed, monkeypatch):
    folder, _ = undisturbed
    workdir = folder / "parameters"
    step = experiment.train_steps

    def poisoned(state, *args, **options):
        state, losses = step(state, *args, **options)
        spoilt = jax.tree.map(lambda x: jnp.where(state.step == 4, jnp.inf, x), state.params)
        return state._replace(params=spoilt), losses

    monkeypatch.setattr(experiment, "train_steps", poisoned)
    with pytest.raises(InputError, match=r"the parameters after step 4 are not finite; the last good .* of step 2 in"):
        train_and_evaluate(longer(folder), workdir)
    assert [path.name for path in (workdir / "checkpoints_1shot").iterdir()] == ["2"]
