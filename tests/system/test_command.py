"""Mistakes, failing disks, closed outputs and signals end in one line or none, and a documented status."""

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mlfsic_jax.system.command import Parser, cli_errors, defer_signals
from mlfsic_jax.system.errors import InputError


def ended(action, capsys):
    """The status and the line of a command that does ``action``."""
    with pytest.raises(SystemExit) as end, cli_errors("the same command goes on"):
        action()
    code = end.value.code
    return (1, code) if isinstance(code, str) else (code, capsys.readouterr().err)


def raising(error):
    def action():
        raise error

    return action


def kill(number):
    return lambda: os.kill(os.getpid(), number)


def test_a_mistake_is_its_message(capsys):
    assert ended(raising(InputError("no such file: a.csv")), capsys) == (1, "error: no such file: a.csv")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.ENODEV])
def test_a_disk_that_fails_is_one_line_with_the_path(capsys, number):
    status, line = ended(raising(OSError(number, os.strerror(number), "runs/x/results.json")), capsys)
    assert status == 1
    assert line.startswith(f"error: runs/x/results.json: {os.strerror(number)}; what was written before is kept")
    assert "\n" not in line


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_status_tells_the_signal(capsys, number, status):
    before = signal.getsignal(number)
    assert ended(kill(number), capsys) == (status, "\ninterrupted: the same command goes on\n")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_held_back_until_the_end(capsys, number, status):
    seen = []

    def action():
        with defer_signals("finishing") as asked:
            seen.append(asked())
            kill(number)()
            seen.append(asked())

    assert ended(action, capsys)[0] == status
    assert seen == [False, True]


def test_a_second_signal_does_not_wait(capsys):
    seen = []

    def action():
        with defer_signals("finishing"):
            kill(signal.SIGTERM)()
            kill(signal.SIGINT)()
            seen.append("not reached")

    assert ended(action, capsys)[0] == 143
    assert seen == []


def test_the_note_is_printed_when_the_signal_comes(capfd):
    with pytest.raises(KeyboardInterrupt), defer_signals("finishing the step"):
        kill(signal.SIGINT)()
        assert capfd.readouterr().err == "\nfinishing the step\n"


def test_signals_that_somebody_else_took_are_left_alone():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with defer_signals("finishing") as asked:
            kill(signal.SIGTERM)()
            assert not asked()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_hold_nothing_back():
    asked = []

    def work():
        with defer_signals("finishing") as received:
            asked.append(received())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False]


def test_a_tilde_is_the_home_folder_in_every_flag(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser("x", "y")
    parser.add_argument("--out")
    parser.add_argument("--images", nargs="+", action="extend")
    parser.add_argument("--n", type=int, default=1)
    found = parser.parse_args(["--out=~/a.csv", "--images", "~/p/*.jpg", "b~/c.jpg", "--images", "~"])
    assert vars(found) == {"out": "/home/me/a.csv", "images": ["/home/me/p/*.jpg", "b~/c.jpg", "/home/me"], "n": 1}
    assert parser.parse_args(["--out=~nobody.of.that.name/x"]).out == "~nobody.of.that.name/x"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without an entry or HOME
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--out=~/a.csv"])
    assert end.value.code == "error: ~/a.csv: this user has no home folder: write the path without ~, or set HOME"


PROGRAM = """
import sys
from mlfsic_jax.system.command import Parser, cli_errors
from mlfsic_jax.system.errors import InputError
parser = Parser("x", "describes it")
parser.add_argument("what", nargs="?")
what = parser.parse_args().what
with cli_errors("again"):
    if what == "stderr":
        print("progress", file=sys.stderr, flush=True)
    if what == "mistake":
        raise InputError("a mistake")
    if what == "reported":
        try:
            print("a line", flush=True)
        except OSError as error:
            raise InputError("cannot write the cache") from error
    if what == "elsewhere":
        raise InputError("no connection") from BrokenPipeError()
    print("a line")
    if what == "file":
        with open("found.txt", "w") as file:
            print("in the file", file=file, flush=True)
            print("progress", file=sys.stderr, flush=True)
            sys.stderr.isatty()
"""


def run(what, unbuffered="", **streams):
    """The process of PROGRAM, ended, and what it said, where that was not given to another stream."""
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run([sys.executable, "-c", PROGRAM, *what], env=environment, text=True, **streams)


@pytest.fixture
def unread():
    """The number of a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_ends_it_quietly(unread, unbuffered):
    for what in ([], ["--help"], ["reported"], ["file"]):
        done = run(what, unbuffered, stdout=unread)
        assert done.returncode == 141 and done.stderr == ("progress\n" if what == ["file"] and not unbuffered else "")
    assert run(["stderr"], unbuffered, stdout=unread, stderr=unread).returncode == 141
    done = run(["mistake"], unbuffered, stdout=unread)
    assert (done.returncode, done.stderr) == (1, "error: a mistake\n")
    done = run(["elsewhere"], unbuffered)
    assert (done.returncode, done.stderr) == (1, "error: no connection\n")
    assert run(["mistake"], unbuffered, stdout=unread, stderr=unread).returncode == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_output_is_told(unbuffered):
    with open("/dev/full", "w") as full:
        done = run([], unbuffered, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device; what was written before is kept: again\n"


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(closed):
    environment = os.environ | {"PROGRAM": PROGRAM}
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "$PROGRAM" file {closed}'],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "" if ">&- 2" in closed[4:] else "a line\n", "")
    assert Path("found.txt").read_text() == "in the file\n"


@pytest.mark.parametrize("platform", ["cuda", "nowhere"])
def test_a_device_that_is_not_there_is_one_line(platform):
    if platform == "cuda" and any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        pytest.skip("this machine may have CUDA")
    command = [sys.executable, "-m", "mlfsic_jax.main", "--config=configs/demo.py:small"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": platform}, capture_output=True, text=True)
    (line,) = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 1 and line.startswith(f"error: JAX finds no device for JAX_PLATFORMS={platform} on this")
    with pytest.raises(RuntimeError, match="of ours"), cli_errors("again"):
        raise RuntimeError("of ours")


@pytest.mark.parametrize("status", [0, 1, 130, 143])
def test_after_an_interruption_the_process_ends_at_once(status):
    program = (
        "import atexit, sys; from mlfsic_jax.system.command import run_main\n"
        "atexit.register(print, 'taken apart'); print('written', end=' ')\n"
        f"run_main(lambda: sys.exit({status}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == status and done.stderr == ""
    assert done.stdout == ("written " if status > 100 else "written taken apart\n")
