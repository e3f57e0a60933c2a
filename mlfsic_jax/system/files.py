"""Writing files so that neither a crash nor a second process leaves half of one, and none is read that has rotted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import reason

_METADATA = "json"  # the field of a .safetensors file that holds it, with the checksum
_AGAIN = "copy it again, or run again the command that wrote it"


@contextlib.contextmanager
def lock(path: pathlib.Path, waiting_for: str = "", refusal: str = "") -> Iterator[None]:
    """Lets in one process at a time; the lock goes with the process, however that ends.

    Args:
      path: the lock file, made if it is not there.
      waiting_for: what a process that has to wait says.
      refusal: why a process does not wait, if it should not.

    Raises:
      InputError: ``refusal``, and which process is in.
    """
    import fcntl  # array_record has no Windows build, so neither has this package

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if refusal:
                file.seek(0)
                raise InputError(f"{refusal} ({file.read() or 'another process'} is at work there)") from None
            print(f"waiting for {waiting_for}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def sha256(path: str | os.PathLike[str]) -> str:
    """The digest of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: pathlib.Path, value) -> None:
    """Writes beside, then renames: a reader never sees half a file."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1))
    os.replace(part, path)


def write_tree(path: pathlib.Path, tree: Mapping[str, Any]) -> None:
    """Nested dicts of arrays as a .safetensors file with keys such as ``params/joint/a_text/kernel``."""
    from flax import traverse_util

    write_arrays(path, traverse_util.flatten_dict(dict(tree), sep="/"))


def write_arrays(path: pathlib.Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """A .safetensors file with a checksum inside, written beside and renamed: a reader never sees half of it."""
    part = path.with_suffix(".part")
    part.write_bytes(_packed(arrays, metadata or {}))  # not save_file, whose files only their owner may read
    os.replace(part, path)


def _packed(arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    noted = {**metadata, "sha256": _checksum(arrays, metadata)}
    # One field: several would come in no order of their own.
    return save(arrays, {_METADATA: json.dumps(noted, sort_keys=True)})


def read_arrays(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of a file of ``write_arrays``.

    Raises:
      InputError: it is missing, damaged, or no such file.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            noted = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        checksum = noted.pop("sha256", None)
    except Exception as error:  # of safetensors, JSON, the disk, and of number types that NumPy lacks
        raise InputError(f"{path} is missing, cut short or damaged ({reason(error)}): {_AGAIN}") from error
    if checksum != _checksum(arrays, noted):
        raise InputError(f"{path} is damaged (its checksum differs): {_AGAIN}")
    return arrays, noted


def _checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(array.data if array.size else b"")
    return total.hexdigest()
