"""A checkpoint is what was written, or it is not used."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax import files, parallel
from mlfsic_jax.checkpoint import Checkpoints


def state(step):
    return {"params": jnp.arange(3000.0) + step, "step": jnp.asarray(step)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Steps 1 to 4, of which 2 is the best."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    checkpoints = Checkpoints(folder, metric="ap")
    for step, ap in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3)):
        checkpoints.save(step, parallel.copy(state(step)), {"ap": ap})
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
    assert {path.name for path in folder.iterdir()} == {*"234", "2.sha256.json", "3.sha256.json", "4.sha256.json"}
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
    assert (folder / f"damaged_{step}").is_dir() and not (folder / f"{step}.sha256.json").exists()
    assert restored(folder) == left
    assert capsys.readouterr().out == ""  # told once


def test_damaged_checksums_condemn_their_step(folder, capsys):
    (folder / "4.sha256.json").write_text("{")
    assert restored(folder) == (3, 2)
    assert "4.sha256.json is not what was written" in capsys.readouterr().out


def test_a_step_whose_run_was_killed_before_its_checksums_is_used(folder):
    (folder / "4.sha256.json").unlink()
    assert restored(folder) == (4, 2)
    assert (folder / "4.sha256.json").exists()


def test_training_goes_on_after_a_damaged_step(folder):
    flip_a_bit(payload(folder, 4))
    checkpoints = Checkpoints(folder, metric="ap")
    assert checkpoints.latest() == 3
    checkpoints.save(4, parallel.copy(state(4)), {"ap": 0.95})
    checkpoints.close()
    assert restored(folder) == (4, 4)


def test_checksums_are_written_whole_or_not_at_all(folder, monkeypatch):
    (folder / "4.sha256.json").unlink()
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    checkpoints = Checkpoints(folder, metric="ap")
    with pytest.raises(KeyboardInterrupt):
        checkpoints.wait()
    assert not (folder / "4.sha256.json").exists()
