import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlfsic_jax
from configs import demo, voc
from mlfsic_jax.core.episodes import sample_episode
from mlfsic_jax.core.metrics import METRICS
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data.features import View
from mlfsic_jax.run import config as defaults
from mlfsic_jax.run import inputs, train
from mlfsic_jax.run.evaluate import METHODS
from mlfsic_jax.system.errors import InputError
from tests.tiny import acting, scenes

FIELDS = {"train.epochs": 4, "train.episodes_per_epoch": 2}


def tiny(folder, **changes):
    return scenes(folder, **FIELDS | changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    results = train.train_and_evaluate(tiny(folder), folder / "run")
    return folder, results


def without_paths(results):
    return [{k: v for k, v in r.items() if k != "config"} for r in json.loads(json.dumps(results))]


def test_a_whole_run_writes_its_results(undisturbed):
    folder, results = undisturbed
    written = json.loads((folder / "run" / "results.json").read_text())
    assert without_paths(written) == without_paths(results)
    (entry,) = written
    assert (entry["dataset"], entry["episodes"], entry["n_shot"]) == ("scenes", 4, 1)
    assert tuple(entry["methods"]) == METHODS
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


def test_nothing_is_compiled_after_the_first_epoch(undisturbed, monkeypatch):
    folder, _ = undisturbed
    compiled, at_save = [], []
    save = train.Checkpoints.save

    def count(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    def save_and_note(*args):
        at_save.append(len(compiled))
        save(*args)

    monkeypatch.setattr(train.Checkpoints, "save", save_and_note)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        train.train_and_evaluate(tiny(folder), folder / "counted")
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
    config = tiny(folder)

    def stop():
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", acting(train.train_step, at_step + 1, stop)[0])
        with pytest.raises(Stop):
            train.train_and_evaluate(config, workdir)
    assert without_paths(train.train_and_evaluate(config, workdir)) == without_paths(results)
    log = (workdir / "metrics.jsonl").read_text()
    assert log == (folder / "run" / "metrics.jsonl").read_text()  # no line twice, none lost


@pytest.mark.parametrize(("at_step", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (3, signal.SIGINT)])
def test_a_signal_writes_a_checkpoint_after_the_step_and_the_run_goes_on(
    undisturbed, monkeypatch, capsys, at_step, number
):
    folder, _ = undisturbed
    workdir = folder / f"asked_{at_step}"
    config = tiny(folder)
    asked, steps = acting(train.train_step, at_step, lambda: os.kill(os.getpid(), number))
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", asked)
        with pytest.raises(KeyboardInterrupt) as interrupt:
            train.train_and_evaluate(config, workdir)
        assert interrupt.value.args == (number,)
        assert len(steps) == at_step and (workdir / "checkpoints_1shot" / str(at_step) / "sha256.json").exists()
        train.train_and_evaluate(config, workdir)
        assert len(steps) == 8  # none twice
    assert f"continuing at epoch {at_step // 2} of 4" + ", step 1 of 2" * (at_step % 2) in capsys.readouterr().out
    for file in ("results.json", "metrics.jsonl", "episodes_1shot.safetensors"):
        there, here = ((folder / run / file).read_bytes() for run in ("run", workdir.name))
        assert there == here, file


def test_two_runs_in_one_workdir_are_refused(undisturbed):
    folder, _ = undisturbed
    with (
        train.open_workdir(folder / "run"),
        pytest.raises(InputError, match=rf"another run has the workdir .*run: .*choose another.*{os.getpid()}"),
    ):
        train.train_and_evaluate(tiny(folder), folder / "run")


def test_a_loss_that_is_not_finite_stops_the_run(undisturbed, monkeypatch):
    folder, _ = undisturbed
    workdir = folder / "not_finite"
    drawn = []
    read, step = train.read_batch, train.train_step

    def noted(split, support, query):
        drawn.append((support, query))
        return read(split, support, query)

    def poisoned(state, *args, **options):
        state, (cm, query_loss) = step(state, *args, **options)
        return state, (cm, jnp.where(state.step == 5, jnp.nan, query_loss))

    monkeypatch.setattr(train, "read_batch", noted)
    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(InputError) as error:
        train.train_and_evaluate(tiny(folder), workdir)
    message = str(error.value)
    assert re.match(r"1-shot: the loss of step 5 is \d+\.\d+, nan \(epoch 3; ", message), message
    assert f"the last good checkpoint is that of step 4 in {workdir / 'checkpoints_1shot'}" in message
    # What the message says draws the very episode.
    ((data,),) = [json.loads(found) for found in re.findall(r"uint32\((\[.*?\])\)", message)]
    labels = inputs.load(tiny(folder)).splits["train"].labels
    episode = sample_episode(jax.random.wrap_key_data(jnp.uint32(data)), labels, n_shot=1, n_query=1)
    np.testing.assert_array_equal(episode.support, drawn[4][0][0])
    np.testing.assert_array_equal(episode.query, drawn[4][1][0])


def test_parameters_that_are_not_finite_are_never_saved(undisturbed, monkeypatch):
    folder, _ = undisturbed
    workdir = folder / "parameters"
    step = train.train_step

    def poisoned(state, *args, **options):
        state, losses = step(state, *args, **options)
        spoilt = jax.tree.map(lambda x: jnp.where(state.step == 4, jnp.inf, x), state.params)
        return state._replace(params=spoilt), losses

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(InputError, match=r"the parameters after step 4 are not finite; the last good .* of step 2 in"):
        train.train_and_evaluate(tiny(folder), workdir)
    assert [path.name for path in (workdir / "checkpoints_1shot").iterdir()] == ["2"]


def test_results_say_where_they_come_from(undisturbed):
    folder, results = undisturbed
    (provenance,) = [entry["provenance"] for entry in results]
    trained_with = json.loads((folder / "run" / "trained_with.json").read_text())
    assert provenance["inputs"] == trained_with["inputs"] and len(provenance["inputs"]["dataset"]) >= 12
    assert provenance["packages"]["jax"] == jax.__version__
    assert provenance["mlfsic_jax"]["version"] == mlfsic_jax.__version__
    assert re.fullmatch("[0-9a-f]{64}", provenance["mlfsic_jax"]["sha256"])


def test_a_finished_run_is_not_trained_again(undisturbed, monkeypatch):
    folder, results = undisturbed
    monkeypatch.setattr(train, "train_step", lambda *args, **options: pytest.fail("trained again"))
    files = ("results.json", "episodes_1shot.safetensors", "model_1shot.safetensors")
    before = [(folder / "run" / file).read_bytes() for file in files]
    again = train.train_and_evaluate(tiny(folder), folder / "run")
    assert without_paths(again) == without_paths(results)
    assert [(folder / "run" / file).read_bytes() for file in files] == before


def test_a_workdir_of_another_run_is_refused(undisturbed):
    folder, _ = undisturbed
    with pytest.raises(InputError, match=r"other settings, train.learning_rate \(there 0.002, now 0.1\)"):
        train.train_and_evaluate(tiny(folder, **{"train.learning_rate": 0.1}), folder / "run")


def test_infeasible_episodes_are_refused_before_training(tmp_path):
    config = tiny(tmp_path, **{"data.images_per_split": (80, 60, 18), "eval.n_query": 4})
    with pytest.raises(InputError, match=r"novel split, 1-shot: .*(red|green|blue|purple) .*images"):
        train.train_and_evaluate(config, tmp_path / "run")


def test_a_line_cut_short_in_the_log_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"n_shot": 1, "step": 2}\n{"n_shot": 5, "step": 9}\n{"n_shot": 1, "step": 4}\n{"n_sh')
    train.MetricsLog(path, {"n_shot": 1}, after_step=2)
    assert path.read_text() == '{"n_shot": 1, "step": 2}\n{"n_shot": 5, "step": 9}\n'


def test_schedule_warms_up_then_decays():
    _, schedule = train.create_optimizer(0.5, 10, 50, "cosine")
    np.testing.assert_allclose([schedule(i) for i in (1, 5, 10)], [0.05, 0.25, 0.5], rtol=1e-6)
    np.testing.assert_allclose([schedule(i) for i in (30, 50)], [0.25, 0.0], atol=1e-7)  # half a cosine
    np.testing.assert_allclose(train.create_optimizer(0.5, 10, 50, "constant")[1](49), 0.5)


def test_train_step_is_adam_on_the_mean_loss_of_its_episodes():
    rng = np.random.default_rng(0)
    model = BaseModel(d_joint=4, n_heads=2, d_dynamic=5, n_dynamic=2, dropout=0.0)
    batch = train.Batch(
        *(rng.random((2, n, 1, 2, 3)).astype(np.float32) for n in (3, 4)),
        *(rng.random((2, n, 2)) < 0.7 for n in (3, 4)),
    )
    words = rng.normal(size=(2, 5)).astype(np.float32)
    split = View(lambda rows: batch.support[0, rows], batch.support_labels[0], words, ("a", "b"))
    optimizer = optax.adam(0.1)
    state = train.create_train_state(jax.random.key(0), model, split, optimizer)

    def loss(params):  # one episode after the other
        losses = []
        for episode in zip(*batch, strict=True):
            noise = {"dropout": jax.random.key(0)}
            cm, query = model.apply({"params": params}, *episode, words, method="losses", rngs=noise)
            losses.append(cm + 3.0 * query)
        return sum(losses) / 2

    # Adam's first step is lr * g / (|g| + eps).
    expected = jax.tree.map(lambda p, g: p - 0.1 * g / (jnp.abs(g) + 1e-8), state.params, jax.grad(loss)(state.params))
    before = jax.device_get(state.params)
    new, (cm, query) = train.train_step(
        state, jax.random.key(1), batch, words, model=model, optimizer=optimizer, gamma=3.0
    )
    np.testing.assert_allclose(cm + 3.0 * query, loss(before), rtol=1e-5)
    # float32; where a gradient is about zero its sign may be lost
    close = jax.tree.map(lambda a, b: float(np.isclose(a, b, atol=1e-4).mean()), new.params, expected)
    assert min(jax.tree.leaves(close)) > 0.95
    assert int(new.step) == 1


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


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--config=configs/demo.py", "--config.trian.epochs=3"], 'Did you mean "train" instead of "trian"'),
        (["--config=configs/demo.py", "--config.train.epoch=3"], 'Did you mean "epochs" instead of "epoch"'),
        (["--config=configs/demo.py", "--config.train.epochs=many"], "config.train.epochs=many"),
        (["--config=configs/demo.py", "--config.model.dropout=2"], "config.model.dropout = 2.0: must be in [0, 1)"),
        (["--config=configs/absent.py"], "configs/absent.py"),
        (["--config=configs/voc.py:gpu"], "no variant 'gpu': choose one of cpu, deploy, paper, finetune"),
        (["--config=configs/demo.py", "extra"], "unexpected argument 'extra'"),
        ([], "--config is missing"),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_line(arguments, complaint):
    done = subprocess.run([sys.executable, "-m", "mlfsic_jax.main", *arguments], capture_output=True, text=True)
    (line,) = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and complaint in line


def test_everything_missing_is_reported_at_once(tmp_path):
    config = voc.get_config("cpu")
    config.cache_dir = str(tmp_path)
    with pytest.raises(InputError) as caught:
        train.train_and_evaluate(config, tmp_path / "run")
    for part in ("config.data.source", "host.robots.ox.ac.uk", "config.labels.vectors", "glove.6B.zip", "torchvision"):
        assert part in str(caught.value)
