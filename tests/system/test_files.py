"""Files are whole or absent, locked while in use, and refused once they have rotted."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from mlfsic_jax.system import files
from mlfsic_jax.system.errors import InputError

ARRAYS = {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.ones((), np.int64), "empty": np.zeros((0, 3))}


def test_arrays_are_read_as_they_were_written(tmp_path):
    files.write_arrays(tmp_path / "x.safetensors", ARRAYS, {"config": "{}"})
    arrays, metadata = files.read_arrays(tmp_path / "x.safetensors")
    assert metadata == {"config": "{}"} and arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype


def test_equal_arrays_make_equal_bytes(tmp_path):
    for name in ("x", "y"):
        files.write_arrays(tmp_path / name, ARRAYS, {"a": "1", "b": "2"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write_arrays(path, ARRAYS, {"config": "{}"})
    content = path.read_bytes()
    padding = content.index(b"}" + b" ") if b"} " in content else len(content)  # of the header, which says nothing
    for i in range(len(content)):
        changed = bytearray(content)
        changed[i] ^= 1 << i % 8
        path.write_bytes(changed)
        if content[i : i + 1] == b" " and i > padding:
            continue
        with pytest.raises(InputError, match=r"x\.safetensors is .*damaged .*run again the command"):
            files.read_arrays(path)
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"x\.safetensors is .*damaged"):
            files.read_arrays(path)


def test_a_file_of_another_origin_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="its checksum differs"):
        files.read_arrays(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="is missing"):
        files.read_arrays(tmp_path / "y.safetensors")


def test_what_cannot_be_written_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_json(path, [1])
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, [1, 2])
    assert path.read_text() == "[\n 1\n]"


def test_the_user_s_own_files_beside_are_left_alone(tmp_path):
    names = {
        "x.part",
        "x.json.part",
        ".x.json.part",
        ".x.json-mine.part",
        ".x.json.former",
        "x.json-0123456789abcdef.part",
    }
    for name in names:
        (tmp_path / name).write_text("mine")
    files.write_json(tmp_path / "x.json", [1])
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", *names}
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def test_a_block_that_fails_leaves_nothing_and_names_the_file(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("former")
    with pytest.raises(ZeroDivisionError), files.atomic(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(OSError) as full, files.atomic(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert full.value.filename == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.csv"] and path.read_text() == "former"
    with pytest.raises(FileNotFoundError) as absent, files.atomic(tmp_path / "gone" / "x.csv") as part:
        part.write_text("whole")
    assert absent.value.filename == str(tmp_path / "gone" / "x.csv")


def test_two_may_write_one_file_at_once(tmp_path):
    path = tmp_path / ("[x] é" * 40 + ".csv")
    with files.atomic(path) as slow:
        slow.write_text("slow")
        with files.atomic(path) as fast:
            fast.write_text("fast")
        assert path.read_text() == "fast"
    assert path.read_text() == "slow" and os.listdir(tmp_path) == [path.name]
    with files.atomic_folder(tmp_path / "y") as slow:
        (slow / "a").touch()
        with files.atomic_folder(tmp_path / "y") as fast:
            (fast / "b").touch()
        assert os.listdir(tmp_path / "y") == ["b"]
    assert os.listdir(tmp_path / "y") == ["a"] and len(os.listdir(tmp_path)) == 2


KILLED = """
import os, pathlib, shutil, signal, sys
from mlfsic_jax.system import files

def killing(function, at):
    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    calls = []
    return counted

path, when = pathlib.Path(sys.argv[1]), sys.argv[2]
os.rename = killing(os.rename, {"moving": 1, "swapping": 2}.get(when))
os.replace = killing(os.replace, {"replacing": 1}.get(when))
shutil.rmtree = killing(shutil.rmtree, {"clearing": 1}.get(when))
with (files.atomic_folder if path.is_dir() else files.atomic)(path) as part:
    (part / "name" if part.is_dir() else part).write_text("new")
    killing(print, 1 if when == "writing" else 0)()
"""


@pytest.mark.parametrize("when", ["writing", "moving", "swapping", "clearing"])
def test_a_folder_outlives_a_process_that_is_killed(tmp_path, when):
    path = tmp_path / "model"
    path.mkdir()
    (path / "name").write_text("former")
    killed = subprocess.run([sys.executable, "-c", KILLED, path, when])
    assert killed.returncode == -signal.SIGKILL
    left = [name for name in os.listdir(tmp_path) if name != "model"]
    assert 1 <= len(left) <= 2 and all(name.startswith(".model-") for name in left)
    with pytest.raises(ZeroDivisionError), files.atomic_folder(path):
        assert (path / "name").read_text() == ("new" if when == "clearing" else "former")
        raise ZeroDivisionError
    assert (path / "name").read_text() == ("new" if when == "clearing" else "former")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("when", ["writing", "replacing"])
def test_what_a_killed_process_left_is_removed_the_next_time(tmp_path, when):
    path = tmp_path / "model"
    path.write_text("former")
    assert subprocess.run([sys.executable, "-c", KILLED, path, when]).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2 and path.read_text() == "former"
    with files.atomic(path) as part:
        part.write_text("newest")
    assert os.listdir(tmp_path) == ["model"] and path.read_text() == "newest"


def test_a_folder_that_cannot_be_moved_stays(tmp_path, monkeypatch):
    path, rename = tmp_path / "model", os.rename
    path.mkdir()
    (path / "name").write_text("former")

    def fails_once(source, target):
        if target == path and source.suffix == ".part":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", fails_once)
    with pytest.raises(OSError), files.atomic_folder(path) as part:
        (part / "name").write_text("new")
    assert (path / "name").read_text() == "former" and os.listdir(tmp_path) == ["model"]


HOLD = "import sys, time, pathlib; from mlfsic_jax.system import files\n"
HOLD += "with files.lock(pathlib.Path(sys.argv[1]), 'x'): print('locked', flush=True); time.sleep(60)"


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    path = tmp_path / "run" / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(InputError, match=rf"^in use \(process {holder.pid} on .* is at work there\)$"):
        files.lock(path, refusal="in use").__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with files.lock(path, refusal="in use"):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
    with files.lock(path, refusal="in use"):
        pass
