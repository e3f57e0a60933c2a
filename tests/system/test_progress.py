"""Progress lines in a log, and a bar on a terminal."""

import io

from mlfsic_jax.system import progress


def test_a_log_gets_lines_at_the_start_every_twenty_seconds_and_at_the_end(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])

    def six_seconds_each():
        for i in range(10):
            clock[0] += 6.0
            yield i

    items = list(progress.track(six_seconds_each(), total=10, description="reading", unit="photos"))

    captured = capsys.readouterr()
    assert items == list(range(10))
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "reading: 0/10 photos",
        "reading: 4/10 photos, 0.167 photos/s, 0:36 left",
        "reading: 8/10 photos, 0.167 photos/s, 0:12 left",
        "reading: 10/10 photos, 0.167 photos/s, took 1:00",
    ]


def test_nothing_to_do_says_nothing(capsys):
    assert list(progress.track([], total=0, description="reading", unit="photos")) == []
    assert capsys.readouterr().err == ""


def test_hours_are_shown_when_there_are_any():
    assert progress._duration(59.6) == "1:00"
    assert progress._duration(3 * 3600 + 62) == "3:01:02"


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(progress.track(range(3), total=3, description="reading", unit="photos")) == [0, 1, 2]
    assert "reading: 100%" in terminal.getvalue() and "3/3" in terminal.getvalue()
