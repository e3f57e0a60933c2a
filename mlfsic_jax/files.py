"""Writing files so that neither a crash nor a second process leaves half of one."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def lock(path: pathlib.Path, waiting_for: str) -> Iterator[None]:
    """Lets in one process at a time; the lock goes with the process, however that ends.

    Args:
      path: the lock file, made if it is not there.
      waiting_for: what a process that has to wait says.
    """
    import fcntl  # array_record has no Windows build, so neither has this package

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for {waiting_for}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
