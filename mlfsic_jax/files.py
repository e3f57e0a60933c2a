"""Writing files so that neither a crash nor a second process leaves half of one."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


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


def write_json(path: pathlib.Path, value) -> None:
    """Writes beside, then renames: a reader never sees half a file."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1))
    os.replace(part, path)


def write_tree(path: pathlib.Path, tree: Mapping[str, Any]) -> None:
    """Nested dicts of arrays as a .safetensors file with keys such as ``params/joint/a_text/kernel``."""
    from flax import traverse_util

    write_arrays(path, traverse_util.flatten_dict(dict(tree), sep="/"))


def write_arrays(path: pathlib.Path, arrays: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """A .safetensors file, written beside and renamed: a reader never sees half of it."""
    from safetensors.numpy import save

    part = path.with_suffix(".part")
    # Not save_file, whose files only their owner may read.
    part.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))
    os.replace(part, path)
