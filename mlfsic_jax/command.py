"""What all commands share: a mistake ends in one line and a non-zero exit, never in a traceback."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

from mlfsic_jax.errors import InputError


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
def one_line_errors(interrupted: str) -> Iterator[None]:
    """Ends the program with one line after a user's mistake, or an interruption, which ``interrupted`` comments."""
    try:
        yield
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted: {interrupted}")
