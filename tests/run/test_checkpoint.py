"""A checkpoint is what was written, or it is not used."""

import errno
import hashlib
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax.run import checkpoint
from mlfsic_jax.run.checkpoint import Checkpoints
from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError


def state(step):
    return {"params": jnp.arange(3000.0) + step, "step": jnp.asarray(step)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Steps 1 to 4, of which 2 is the best."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    checkpoints = Checkpoints(folder, metric="ap")
    for step, ap in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3)):
        checkpoints.save(step, parallel.replicate(state(step)), {"ap": ap})
    checkpoints.close()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def restored(folder):
    checkpoints = Checkpoints(folder, metric="ap")
    steps = checkpoints.latest(), checkpoints.best()
    values = [checkpoints.restore(step, state(0)) for step in steps]
    for step, value in zip(steps, values, strict=True):
        np.testing.assert_array_equal(value["params"], state(step)["params"])
    checkpoints.close()
    return steps


def payload(folder, step):
    """The largest file of a step, which holds the parameters."""
    return max((folder / str(step)).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_the_two_newest_and_the_best_are_kept_with_their_checksums(folder, capsys):
    assert {path.name for path in folder.iterdir()} == {*"234"}
    for step in "234":
        noted = json.loads((folder / step / "sha256.json").read_text())
        assert len(noted) > 5
        for name, digest in noted.items():
            assert hashlib.sha256((folder / step / name).read_bytes()).hexdigest() == digest
    assert restored(folder) == (4, 2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, lambda path: path.unlink()])
@pytest.mark.parametrize(("step", "left"), [(4, (3, 2)), (2, (4, 4))])
def test_a_damaged_step_is_reported_and_the_next_best_is_used(folder, capsys, damage, step, left):
    path = payload(folder, step)
    damage(path)
    assert restored(folder) == left
    line = (
        f"checkpoint {folder / str(step)} is damaged ({path.relative_to(folder / str(step))} is not what was written)"
    )
    assert capsys.readouterr().out.startswith(line)
    assert (folder / f"damaged_{step}").is_dir() and not (folder / f"{step}").exists()
    assert restored(folder) == left
    assert capsys.readouterr().out == ""  # told once


@pytest.mark.parametrize("damage", [lambda path: path.write_text("{"), lambda path: path.write_text("[]"), Path.unlink])
def test_a_step_without_its_checksums_is_not_trusted(folder, capsys, damage):
    damage(folder / "4" / "sha256.json")
    assert restored(folder) == (3, 2)
    assert "sha256.json is not what was written" in capsys.readouterr().out


def test_training_goes_on_after_a_damaged_step(folder):
    flip_a_bit(payload(folder, 4))
    checkpoints = Checkpoints(folder, metric="ap")
    assert checkpoints.latest() == 3
    checkpoints.save(4, parallel.replicate(state(4)), {"ap": 0.95})
    checkpoints.close()
    assert restored(folder) == (4, 4)


def test_a_step_is_committed_with_its_checksums_or_not_at_all(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpoints(folder, metric="ap")
    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(InputError, match=r"step 5 cannot be written to .*No space left on device.*goes on from"):
        checkpoints.save(5, parallel.replicate(state(5)), {"ap": 0.95})
        checkpoints.wait()
    monkeypatch.undo()
    assert not (folder / "5").exists()
    assert restored(folder) == (4, 2)


def test_a_disk_without_room_is_told_before_anything_is_written(folder, monkeypatch):
    checkpoints = Checkpoints(folder, metric="ap")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(InputError, match="step 5 cannot be written to .*needs 1 MB and the disk has 0 MB"):
        checkpoints.save(5, parallel.replicate(state(5)), {"ap": 0.95})
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {*"234"}
    assert restored(folder) == (4, 2)


def test_a_step_between_validations_is_never_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", metric="ap")
    checkpoints.save(1, parallel.replicate(state(1)), {"losses": [0.5, 0.25]})
    checkpoints.wait()
    assert (checkpoints.latest(), checkpoints.best()) == (1, None)
    assert checkpoints.metrics(1) == {"losses": [0.5, 0.25]}
    checkpoints.save(2, parallel.replicate(state(2)), {"ap": 0.0})
    checkpoints.save(3, parallel.replicate(state(3)), {"losses": [0.5]})
    checkpoints.close()
    assert restored(tmp_path / "run") == (3, 2)
