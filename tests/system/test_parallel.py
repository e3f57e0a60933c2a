"""One device, four devices, two processes of two devices: the same losses, evaluated numbers and checkpoints.

Each run is a program of its own, as the number of devices is fixed when JAX starts. The backbone is trained, so batch
norm has to be averaged over devices, and dropout and augmentation have to draw the same for the same episode.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.parallel import cores, prefetch, prefetch_batches
from tests.conftest import UNOPTIMISED
from tests.tiny import TINY, share_compiled

FIELDS = TINY | {
    "lcm.during_training": True,
    "train.episodes_per_epoch": 8,
    "train.episodes_per_step": 4,
    "train.validation_episodes": 5,
    "eval.episodes": 6,
    "eval.sweep_episodes": 5,
    "eval.methods": ("region_word_ridge", "base", "lcm"),
}


def command(workdir, cache, **fields):
    fields = FIELDS | {"cache_dir": cache} | fields
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, "-m", "mlfsic_jax.main", "--config=configs/demo.py", f"--workdir={workdir}", *flags]


def environment(n_devices, **more):
    # Many host devices on few cores need more threads than there are cores, or they wait for each other for ever.
    # Not at XLA's optimisation level 0, which rounds by the number of episodes on a device; Adam magnifies that.
    flags = UNOPTIMISED.replace("level=0", "level=1") + f" --xla_force_host_platform_device_count={n_devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": "32"} | more


def run(arguments, **env):
    done = subprocess.run(arguments, env=environment(**env), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(workdir):
    (entry,) = json.loads((workdir / "results.json").read_text())
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return entry, log


def assert_same_training(actual, expected):
    """Sums over episodes and devices in another order: float32, after four steps of Adam."""
    (entry, log), (expected_entry, expected_log) = actual, expected
    assert len(log) == len(expected_log) == 2
    for line, expected_line in zip(log, expected_log, strict=True):
        assert line.keys() == expected_line.keys()
        for name in ("cm_loss", "query_loss"):
            np.testing.assert_allclose(line[name], expected_line[name], rtol=1e-4)
        # Ranks of single queries, of which there are few here, flip where two scores differ in the last digits.
        np.testing.assert_allclose(line["validation_macro_ap"], expected_line["validation_macro_ap"], atol=0.01)
    value, expected_value = (e["methods"]["base"]["macro_ap"]["mean"] for e in (entry, expected_entry))
    np.testing.assert_allclose(value, expected_value, atol=0.01)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    share_compiled(folder / "cache")
    out = run(command(folder / "one", folder / "cache"), n_devices=1)
    assert "each of the" not in out
    return folder


def test_reading_ahead_keeps_the_order_and_passes_errors_on():
    read, reading, another = [], threading.Semaphore(0), threading.Event()

    def slowly(i):
        if i == 0:
            another.wait(timeout=60)
        read.append(i)
        another.set()
        reading.release()
        return 10 // (4 - i)

    results = prefetch(slowly, range(6), readers=3, ahead=3)
    assert [next(results), next(results)] == [2, 3]
    for _ in range(3):
        assert reading.acquire(timeout=60)  # without being asked
    assert read[0] != 0  # side by side
    assert [next(results), next(results)] == [5, 10]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_an_interruption_waits_for_what_has_begun_only():
    begun, go_on = [], threading.Event()

    def wait(i):
        begun.append(i)
        assert i == 0 or go_on.wait(timeout=60)
        return i

    results = prefetch(wait, range(9), readers=2, ahead=9)
    assert next(results) == 0
    while len(begun) < 3:  # the second and the third
        time.sleep(0.01)
    threading.Timer(0.2, go_on.set).start()
    results.close()
    assert sorted(begun) == [0, 1, 2]


def test_batches_are_computed_side_by_side_in_their_order():
    both = threading.Barrier(min(2, cores()), timeout=60)

    def total(batch):
        if batch[0] < 8:
            both.wait()
        return batch

    assert list(prefetch_batches(total, iter(range(9)), 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert list(prefetch_batches(total, [], 4)) == []


@pytest.mark.slow  # as are two processes of two devices
def test_four_devices_are_one_device(one_device):
    run(command(one_device / "four", one_device / "cache"), n_devices=4)
    assert_same_training(results(one_device / "four"), results(one_device / "one"))


def test_four_devices_evaluate_the_checkpoint_of_one_the_same(one_device):
    shutil.copytree(one_device / "one", one_device / "again")
    (one_device / "again" / "results.json").unlink()
    run(command(one_device / "again", one_device / "cache"), n_devices=4)
    entry, expected = (results(one_device / name)[0] for name in ("again", "one"))
    for field in ("methods", "paired", "validation", "theta", "chance", "calibration_error"):
        assert_close(entry[field], expected[field], field)


def assert_close(actual, expected, where):
    """To 1e-6: every image and episode is computed on one device, whichever that is."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name in expected:
            assert_close(actual[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list):
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_close(a, e, f"{where}[{i}]")
    else:
        # The calibration's optimiser stops when its loss hardly falls.
        np.testing.assert_allclose(actual, expected, atol=1e-3 if "calibration" in where else 1e-6, err_msg=where)


@pytest.mark.parametrize(("number", "process"), [(None, "0"), ("two", "0"), ("2", "5"), ("2", None)])
def test_a_run_of_several_that_is_described_in_part_is_refused(monkeypatch, number, process):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    for name, value in (("JAX_NUM_PROCESSES", number), ("JAX_PROCESS_ID", process)):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="JAX_COORDINATOR_ADDRESS is set, with JAX_NUM_PROCESSES="):
        parallel.start()


def start_two(workdir, cache, **fields):
    """Two processes of two devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        subprocess.Popen(
            command(workdir, cache, **fields),
            env=environment(2, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(number)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


def finish(processes, status=0):
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [status] * 2, [err[-2000:] for _, err in outputs]
    return outputs


def test_two_processes_of_two_devices_are_one_device(one_device):
    outputs = finish(start_two(one_device / "processes", one_device / "cache"))
    assert "paired differences" in outputs[0][0] and "paired" not in outputs[1][0]
    assert_same_training(results(one_device / "processes"), results(one_device / "one"))


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(one_device):
    fields = {"train.epochs": 6}
    finish(start_two(one_device / "in_peace", one_device / "cache", **fields))
    workdir = one_device / "stopped"
    processes = start_two(workdir, one_device / "cache", **fields)
    while not (workdir / "checkpoints_1shot" / "2").exists():
        assert processes[0].poll() is None and processes[1].poll() is None
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    outputs = finish(processes, status=128 + signal.SIGTERM)
    assert "interrupted: the same command goes on" in outputs[0][1] and "Traceback" not in outputs[0][1]
    stopped_at = max(int(path.name) for path in (workdir / "checkpoints_1shot").iterdir())
    assert 2 < stopped_at < 12
    outputs = finish(start_two(workdir, one_device / "cache", **fields))
    assert f"continuing at epoch {stopped_at // 2} of 6" in outputs[0][0]
    assert (workdir / "metrics.jsonl").read_text() == (one_device / "in_peace" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_other_devices(one_device):
    """The first epoch on one device, the second on four: the numbers of one device all the way."""
    workdir = one_device / "mixed"
    stop = "from absl import app\nfrom mlfsic_jax.main import main, parse\n"
    stop += "from mlfsic_jax.run.checkpoint import Checkpoints\nsave = Checkpoints.save\n"
    stop += "def save_and_stop(self, *a): save(self, *a); self.wait(); raise KeyboardInterrupt\n"
    stop += "Checkpoints.save = save_and_stop\napp.run(main, flags_parser=parse)"
    arguments = command(workdir, one_device / "cache")
    arguments[1:3] = ["-c", stop]
    done = subprocess.run(arguments, env=environment(1), capture_output=True, text=True, timeout=600)
    assert done.returncode == 130 and "interrupted: the same command goes on" in done.stderr, done.stderr[-2000:]
    out = run(command(workdir, one_device / "cache"), n_devices=4)
    assert "continuing at epoch 1 of 2" in out
    assert_same_training(results(workdir), results(one_device / "one"))


@pytest.mark.slow
def test_episodes_that_cannot_be_shared_are_computed_by_every_device(one_device):
    fields = {"train.episodes_per_step": 1, "train.episodes_per_epoch": 2}
    run(command(one_device / "alone", one_device / "cache", **fields), n_devices=1)
    out = run(command(one_device / "everywhere", one_device / "cache", **fields), n_devices=2)
    assert "each of the 2 devices trains on every episode; to share them, set config.train.episodes_per_step" in out
    assert_same_training(results(one_device / "everywhere"), results(one_device / "alone"))
