"""Progress of long loops: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 20.0


def track(iterable: Iterable[Item], *, total: int, description: str, unit: str) -> Iterator[Item]:
    """Yields the items of ``iterable``, ``total`` in all, and reports progress on standard error.

    On a terminal, a bar shows rate and time left. Otherwise a line is printed at the start, at the end, and at most
    every 20 s in between: ``description`` is the activity ("preparing VOC"), ``unit`` the items in plural ("photos").
    """
    if total == 0:
        return iter(iterable)
    if sys.stderr.isatty():
        return iter(tqdm(iterable, total=total, desc=description, unit=f" {unit}", dynamic_ncols=True))
    return _track_with_lines(iterable, total, description, unit)


def _track_with_lines(iterable: Iterable[Item], total: int, description: str, unit: str) -> Iterator[Item]:
    def report(done: int, ending: str) -> None:
        print(f"{description}: {done}/{total} {unit}{ending}", file=sys.stderr, flush=True)

    start = last = time.monotonic()
    done = 0
    report(done, "")
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and done < total:
            rate = done / (now - start)
            report(done, f", {rate:.3g} {unit}/s, {_duration((total - done) / rate)} left")
            last = now
    elapsed = time.monotonic() - start
    report(done, f", {done / max(elapsed, 1e-9):.3g} {unit}/s, took {_duration(elapsed)}")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
