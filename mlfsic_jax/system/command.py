"""Mistakes and interruptions end a command with one line and a non-zero status, never with a traceback."""

import argparse
import atexit
import contextlib
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import expand, reason

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Parser(argparse.ArgumentParser):
    """A parser of flags ``--name=value`` that reports a wrong flag in one line.

    ``~`` at the start of a value is the home folder: shells expand it only where a word begins.
    """

    def __init__(self, module: str, description: str):
        """``module`` is the one that ``python -m`` runs; ``--help`` prints the description unwrapped."""
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(f"python -m {module}", description=description, **options)
        guard_streams()

    def parse_known_args(self, *given, **options):
        found, rest = super().parse_known_args(*given, **options)
        with cli_errors("nothing was done"):
            for name, value in list(vars(found).items()):
                setattr(found, name, [*map(expand_home, value)] if isinstance(value, list) else expand_home(value))
        return found, rest

    def print_help(self, file=None) -> None:
        with cli_errors("nothing was done"):
            print(self.format_help(), end="", file=file)  # argparse would hide errors

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}")


def expand_home(value: Any) -> Any:
    """A text that starts with ``~`` as the path that it is; anything else as it is."""
    return str(expand(value)) if isinstance(value, str) and value.startswith("~") else value


def guard_streams() -> None:
    """Lets a command end quietly where its output is closed, or nobody reads it any more.

    A closed standard output or error is opened to nowhere: another file would take its number, and get the messages.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            while os.open(os.devnull, os.O_RDWR) < number:  # those before it may be closed too
                pass
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, it stays open
    atexit.register(_drop_unwritable)


def prepare_jax(cache_dir: str | os.PathLike[str] | None = None) -> None:
    """Keeps compiled programs in ``cache_dir``, and silences warnings about accelerators that are not there."""
    import jax

    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    if cache_dir is not None:
        compiled = expand(cache_dir).absolute() / "compiled"
        there = next(place for place in (compiled, *compiled.parents) if place.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):  # it is made when there is something to keep
            print(f"compiled programs are not kept: {there} cannot be written", file=sys.stderr, flush=True)
            return
        jax.config.update("jax_compilation_cache_dir", str(compiled))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # most here take less than JAX's 1.0


@contextlib.contextmanager
def cli_errors(interrupted: str, signals: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Ends the program with one line after a user's mistake, a disk error, a missing device, SIGINT or SIGTERM.

    The exit status is 1, or 128 plus the signal's number: 130 after SIGINT, 143 after SIGTERM. ``interrupted`` is told
    then. Where nobody reads the output any more, as after ``| head``, the status is 141, as of SIGPIPE, and nothing is
    told. ``signals`` are those to handle; on several hosts JAX handles SIGTERM itself.
    """
    with _handled(_interrupt, signals):
        try:
            yield
            if sys.stdout:
                sys.stdout.flush()  # what cannot be written is told here
        except (InputError, OSError) as error:
            if _comes_of_no_reader(error):
                sys.exit(128 + signal.SIGPIPE)
            if isinstance(error, InputError):
                sys.exit(f"error: {error}")
            where = f"{error.filename}: " if error.filename else ""
            sys.exit(f"error: {where}{error.strerror or error}; what was written before is kept: {interrupted}")
        except KeyboardInterrupt as error:
            with contextlib.suppress(OSError):
                print(f"\ninterrupted: {interrupted}", file=sys.stderr)
            sys.exit(128 + (error.args[0] if error.args else signal.SIGINT))
        except (RuntimeError, AssertionError):  # JAX raises the latter for a platform whose plugin is missing
            if lacking := _lacking_device():
                sys.exit(f"error: {lacking}")
            raise


def run_main(main: Callable[[], Any]) -> None:
    """Runs a command's ``main``; one that was interrupted ends at once then.

    Threads that still compute, or write a cache, would crash while the interpreter takes itself apart.
    """
    try:
        main()
    except SystemExit as end:
        if end.code in [128 + number for number in SIGNALS]:
            _drop_unwritable()
            os._exit(end.code)
        raise


def _comes_of_no_reader(error: BaseException | None) -> bool:
    """Whether an error, or one that it reports, comes of output that nobody reads, not of another pipe or socket."""
    while error is not None and not isinstance(error, BrokenPipeError):
        error = error.__cause__ or error.__context__
    streams = select.poll()
    for number in (1, 2):
        streams.register(number, 0)
    return error is not None and any(events & select.POLLERR for _, events in streams.poll(0))


def _drop_unwritable() -> None:
    """Flushes both streams, and sends nowhere what cannot be written: the interpreter would end with status 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _lacking_device() -> str:
    """Why JAX can compute nothing, or "" if it can or was not asked to."""
    jax = sys.modules.get("jax")
    try:
        if jax:
            jax.devices()
    except (RuntimeError, AssertionError) as error:
        why = f" ({reason(error)})" if str(error) else ""
        asked = f"JAX finds no device for JAX_PLATFORMS={jax.config.jax_platforms} on this machine{why}"
        return f"{asked}: unset it, or install JAX for that device"
    return ""


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
        with contextlib.suppress(OSError):
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
