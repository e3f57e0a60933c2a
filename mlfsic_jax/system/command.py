"""What all commands share: mistakes and interruptions end in one line and a non-zero exit, never in a traceback."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from mlfsic_jax.system.errors import InputError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Parser(argparse.ArgumentParser):
    """Flags as ``--name=value``; a wrong one is told in one line."""

    def __init__(self, module: str, description: str):
        """For ``python -m module``; ``--help`` prints the description as it is written."""
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"python -m {module}", description=description, formatter_class=as_written, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}")


@contextlib.contextmanager
def cli_errors(interrupted: str, signals: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Ends the program with one line after a user's mistake, a disk that fails, SIGINT or SIGTERM.

    The exit status is 1, or 128 and the signal's number: 130 after SIGINT, 143 after SIGTERM.

    Args:
      interrupted: what a user may want to know after an interruption.
      signals: those of the two that nobody else has taken, as JAX takes SIGTERM on several hosts.
    """
    with _handled(_interrupt, signals):
        try:
            yield
        except InputError as error:
            sys.exit(f"error: {error}")
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            sys.exit(f"error: {where}{error.strerror or error}; what was written before is kept: {interrupted}")
        except KeyboardInterrupt as error:
            print(f"\ninterrupted: {interrupted}", file=sys.stderr)
            sys.exit(128 + (error.args[0] if error.args else signal.SIGINT))


@contextlib.contextmanager
def defer_signals(note: str) -> Iterator[Callable[[], bool]]:
    """Within it SIGINT and SIGTERM wait until they suit: what it yields says whether one has come.

    A second one interrupts at once. One that was held back takes place at the end. Outside of the main thread, where
    signals cannot be handled, nothing is held back.

    Args:
      note: is printed when a signal comes.

    Raises:
      KeyboardInterrupt: with the signal's number.
    """
    received: list[int] = []

    def hold(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt(number)
        received.append(number)
        os.write(2, f"\n{note}\n".encode())  # not print, in whose middle the signal may have come

    with _handled(hold, SIGNALS):
        try:
            yield lambda: bool(received)
        except KeyboardInterrupt:
            if not received:
                raise
    if received:
        raise KeyboardInterrupt(received[0])


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], signals: Sequence[int]) -> Iterator[None]:
    """Signals go to ``handler``, but for those that are ignored; in other threads than the main one none does."""
    in_main = threading.current_thread() is threading.main_thread()
    ours = [number for number in signals if in_main and signal.getsignal(number) is not signal.SIG_IGN]
    before = [(number, signal.signal(number, handler)) for number in ours]
    try:
        yield
    finally:
        for number, former in before:
            signal.signal(number, former)
