"""The real programs, killed at random moments and gone on with, ends with the bytes of one that was left in peace.

``bash launch/torture.sh`` runs these tests, at length by the environment variables MLFSIC_KILLS (how many in a row) and
MLFSIC_SOAK (training episodes). What CI has of them is in ``run/test_loop.py``, without processes.
"""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.own_photos import folder_run

pytestmark = pytest.mark.slow
KILLS, SOAK = (int(os.environ.get(name, default)) for name, default in (("MLFSIC_KILLS", 2), ("MLFSIC_SOAK", 4000)))
REPOSITORY = Path(__file__).parents[1]
SMALL = [
    *(sys.executable, "-m", "mlfsic_jax.main", f"--config={REPOSITORY / 'configs/demo.py'}:small"),
    *("--workdir=run", "--config.cache_dir=cache"),
]
FIELDS = [
    *("train.epochs=3", "train.episodes_per_epoch=4", "train.validate_every=1", "eval.episodes=8"),
    "eval.methods=('base','lcm')",
]
WRITTEN = ("results.json", "metrics.jsonl", "episodes_1shot.safetensors", "model_1shot.safetensors")
# What a kill waits for (None: nothing), and how many seconds it then waits at most.
MOMENTS = {
    "cache": ("cache/scenes-photos-*/manifest.json", 0.1),  # made once: only of a new run
    "anywhere": (None, 20.0),
    "training": ("run/checkpoints_1shot", 3.0),
    "checkpoint": ("run/checkpoints_1shot/*tmp*", 0.05),
    "commit": ("run/checkpoints_1shot/to_delete", 0.02),
    "evaluation": ("run/checkpoints_1shot/12/sha256.json", 3.0),
}


def start(folder, fields=FIELDS):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    command = [*SMALL, *(f"--config.{field}" for field in fields)]
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment)


def prepared(folder, compiled):
    """A folder for a run that need not compile again what others did."""
    shutil.copytree(compiled, folder / "cache" / "compiled")
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder).wait(600) == 0, (folder / "output.txt").read_text()
    return folder


def wait_for(moment, folder, program, rng):
    """Returns when it is time for a kill, or the program has ended: whether it has said anything by then."""
    written = os.path.getsize(folder / "output.txt")
    sign, seconds = MOMENTS[moment]
    seen = {str(path) for path in folder.glob(sign)} if sign else set()
    if moment != "checkpoint":  # of which each run writes several
        seen = set()
    while sign and program.poll() is None and not {str(path) for path in folder.glob(sign)} - seen:
        time.sleep(0.002)
    deadline = time.monotonic() + rng.uniform(0, seconds)
    while program.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    return os.path.getsize(folder / "output.txt") > written


@pytest.mark.parametrize("seed", [int(os.environ.get("MLFSIC_SEED", 0))])
def test_a_program_that_is_killed_again_and_again_ends_the_same(undisturbed, tmp_path, seed, capsys):
    rng = random.Random(seed)
    kills, rounds = dict.fromkeys(MOMENTS, 0), 0
    while sum(kills.values()) < KILLS:
        folder = prepared(tmp_path / f"round_{rounds}", undisturbed / "cache" / "compiled")
        rounds += 1
        while True:
            program = start(folder)
            new = not (folder / "run").exists()
            moment = "cache" if new and rng.random() < 0.5 else rng.choice([*MOMENTS][0 if new else 1 :])
            number = signal.SIGKILL
            if sum(kills.values()) < KILLS:
                begun = wait_for(moment, folder, program, rng)
                if begun:  # before, it is Python that is interrupted while it starts
                    number = rng.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT])
                if program.poll() is None:
                    program.send_signal(number)
                    kills[moment] += 1
            status = program.wait(600)
            output = (folder / "output.txt").read_text()
            assert "damaged" not in output, output[-3000:]
            if status == 0:
                break
            assert status == (-number if number == signal.SIGKILL else 128 + number), (status, moment, output[-3000:])
            if status > 0:
                assert "interrupted: the same command goes on" in output
                assert "Traceback" not in output, output[-3000:]
        for name in WRITTEN:
            assert (folder / "run" / name).read_bytes() == (undisturbed / "run" / name).read_bytes(), (name, kills)
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{sum(kills.values())} kills in {rounds} runs, all of which ended the same: {kills}")


def test_a_prediction_that_is_killed_again_and_again_ends_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, workdir = folder_run(tmp_path, ("ridge",))
    photos, rng = sorted(Path("photos/photos").iterdir()), random.Random(0)
    Path("mine").mkdir()
    for i in range(20_000):
        Path(f"mine/{i}.png").symlink_to(photos[i % len(photos)].absolute())
    Path("support.csv").write_text(f"file,labels\n{photos[0]},sea\n{photos[1]},kelp\n")
    command = [sys.executable, "-m", "mlfsic_jax.predict", f"--workdir={workdir}", "--support=support.csv"]
    command += ["--method=ridge", "--images=mine"]

    def begin(out):
        with open("output.txt", "ab") as output:
            return subprocess.Popen([*command, f"--out={out}"], stdout=output, stderr=output)

    assert begin("whole.json").wait(600) == 0, Path("output.txt").read_text()
    kills, size = 0, 0
    journal = Path("out.json.journal")
    while kills < max(KILLS // 4, 3):
        program = begin("out.json")
        while program.poll() is None and not (journal.exists() and journal.stat().st_size > size):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 1))
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        program.send_signal(number)
        if program.wait(600) == 0:
            break
        kills += 1
        assert program.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert not Path("out.json").exists()
        size = journal.stat().st_size
    assert kills and (Path("out.json").exists() or begin("out.json").wait(600) == 0)
    said = Path("output.txt").read_text()
    assert Path("out.json").read_bytes() == Path("whole.json").read_bytes() and "Traceback" not in said
    assert not journal.exists() and said.count("going on: ") >= kills
    with capsys.disabled():
        print(f"\n{kills} kills of a prediction, which ended the same")


def resident(program):
    """MB of memory that a process holds."""
    status = Path(f"/proc/{program.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_memory_stays_flat_over_many_episodes(undisturbed, tmp_path, capsys):
    folder = prepared(tmp_path / "soak", undisturbed / "cache" / "compiled")
    per_epoch = SOAK // 20
    program = start(folder, ["train.epochs=20", f"train.episodes_per_epoch={per_epoch}", *FIELDS[2:]])
    log, memory = folder / "run" / "metrics.jsonl", []
    while program.poll() is None:
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) > len(memory):
            memory += [resident(program)] * (len(lines) - len(memory))
        time.sleep(0.02)
    assert program.returncode == 0, (folder / "output.txt").read_text()[-3000:]
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 20 * per_epoch
    # By the fifth epoch everything is compiled and the allocator has its arenas.
    with capsys.disabled():
        print(f"\n{20 * per_epoch} episodes; MB after each epoch: {[round(m) for m in memory]}")
    # Medians: a checkpoint that is written while memory is looked at adds 50 MB for a moment.
    assert statistics.median(memory[-5:]) < statistics.median(memory[5:10]) + 40
