"""Mistakes and interruptions end a command with one line and a non-zero status, never with a traceback."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mlfsic_jax.system.errors import InputError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Parser(argparse.ArgumentParser):
    """A parser of flags ``--name=value`` that reports a wrong flag in one line."""

    def __init__(self, module: str, description: str):
        """``module`` is the one that ``python -m`` runs; ``--help`` prints the description unwrapped."""
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(f"python -m {module}", description=description, **options)

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}")


def prepare_jax(cache_dir: str | os.PathLike[str] | None = None) -> None:
    """Keeps compiled programs in ``cache_dir``, and silences warnings about accelerators that are not there."""
    import jax

    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    if cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", str(Path(cache_dir).absolute() / "compiled"))


@contextlib.contextmanager
def cli_errors(interrupted: str, signals: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Ends the program with one line after a user's mistake, a disk error, SIGINT or SIGTERM.

    The exit status is 1, or 128 plus the signal's number: 130 after SIGINT, 143 after SIGTERM. ``interrupted`` is told
    then. ``signals`` are those to handle; on several hosts JAX handles SIGTERM itself.
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

    Prints ``note`` when a signal arrives, and yields a function that tells whether one has. The block then ends with
    ``KeyboardInterrupt(number)``. Only the main thread can handle signals: in other threads nothing is deferred.
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
