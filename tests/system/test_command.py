"""Mistakes, failing disks and signals end in one line and a documented status."""

import errno
import os
import signal
import threading

import pytest

from mlfsic_jax.system.command import cli_errors, defer_signals
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
