"""Mistakes and interruptions end a command with one line and a non-zero status, never with a traceback."""

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
    """A parser of flags ``--name=value`` that reports a wrong flag in one line."""

    def __init__(self, module: str, description: str):
        """``module`` is the one that ``python -m`` runs; ``--help`` prints the description unwrapped."""
        unwrapped = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"python -m {module}", description=description, formatter_class=unwrapped, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}")


@contextlib.contextmanager
def cli_errors(interrupted: str, signals: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Ends the program with one line after a user's mistake, a disk error, SIGINT or SIGTERM.

    The exit status is 1, or 128 plus the signal's number: 130 after SIGINT, 143 after SIGTERM.

    Args:
      interrupted: what to tell the user after an interruption.
      signals: which of the two to handle; on several hosts JAX handles SIGTERM itself.
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
    """Defers SIGINT and SIGTERM to the end of the block; a second signal interrupts it at once.

    Only the main thread can handle signals: in other threads nothing is deferred.

    Args:
      note: printed when a signal arrives.

    Yields:
      A function that tells whether a signal has arrived.

    Raises:
      KeyboardInterrupt: with the signal's number.
    """
    received: list[int] = []

    def hold(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt(number)
        received.append(number)
        os.write(2, f"\n{note}\n".encode())  # print is not reentrant

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
    """Sends signals to ``handler``, except ignored ones; does nothing outside of the main thread."""
    in_main = threading.current_thread() is threading.main_thread()
    ours = [number for number in signals if in_main and signal.getsignal(number) is not signal.SIG_IGN]
    before = [(number, signal.signal(number, handler)) for number in ours]
    try:
        yield
    finally:
        for number, former in before:
            signal.signal(number, former)
