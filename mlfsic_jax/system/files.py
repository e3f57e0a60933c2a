"""Files that are written whole or not at all, locks, and arrays with a checksum."""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import reported

_METADATA = "json"  # the one metadata field of a .safetensors file; several would come in no fixed order
_AGAIN = "copy it again, or run again the command that wrote it"
_PART, _FORMER = ".part", ".former"  # endings of temporary names
_SHOWN_OF_NAME = 50  # characters: file systems allow 255 bytes in all


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a new path beside ``path``: what the block writes there replaces the file, unless the block raises.

    What killed processes left there is removed. An ``OSError`` names ``path``.
    """
    path = pathlib.Path(path)
    part = _new_name(path)
    try:
        with _scratch(path, part):
            yield part
            os.replace(part, path)
    except OSError as error:
        if error.filename in (None, str(part)):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new folder beside ``path`` that takes its place, unless the block raises.

    A process that is killed costs nothing: the next call removes what it left, and brings back the former folder if
    that was just moved aside.
    """
    for former in path.parent.glob(_names(path, _FORMER)):
        _remove(former) if path.exists() else os.rename(former, path)
    part = _new_name(path)
    with _scratch(path, part, is_folder=True):
        yield part
        former = part.with_suffix(_FORMER)
        try:
            if path.exists():
                os.rename(path, former)
            os.rename(part, path)
        except BaseException:
            if former.exists():
                os.rename(former, path)
            raise
        _remove(former)


@contextlib.contextmanager
def _scratch(path: pathlib.Path, part: pathlib.Path, is_folder: bool = False) -> Iterator[None]:
    """Makes an empty file or folder ``part`` for ``path``, which is gone after the block unless that moved it away."""
    import fcntl

    for left in path.parent.glob(_names(path, _PART)):
        with contextlib.suppress(OSError), _opened(left, os.O_RDONLY) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
            _remove(left)
    if is_folder:
        part.mkdir()
    with _opened(part, os.O_RDONLY if is_folder else os.O_CREAT | os.O_EXCL | os.O_RDWR) as handle:
        try:
            with contextlib.suppress(OSError):  # not every disk has locks; leftovers stay there
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            _remove(part)


@contextlib.contextmanager
def _opened(path: pathlib.Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _new_name(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name[:_SHOWN_OF_NAME]}-{secrets.token_hex(8)}{_PART}")  # never a user's own file


def _names(path: pathlib.Path, suffix: str) -> str:
    """A pattern of what ``_new_name`` gives."""
    return f".{glob.escape(path.name[:_SHOWN_OF_NAME])}-{'[0-9a-f]' * 16}{suffix}"


def _remove(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def lock(path: pathlib.Path, waiting_for: str = "", refusal: str = "") -> Iterator[None]:
    """Lets one process at a time into the block. The lock ends with its process, however that ends.

    The file is created, with its folder, when missing. A second process prints "waiting for ``waiting_for``", or raises
    ``refusal``, if given, as an ``InputError`` that names the process which holds the lock.
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


def stamp(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Size and time of a file, which tell that it has changed; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def sha256(path: str | os.PathLike[str]) -> str:
    """The digest of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: pathlib.Path, value) -> None:
    """Writes a value as JSON, atomically."""
    with atomic(path) as part, open(part, "w") as file:
        json.dump(value, file, indent=1)


class Streamed(list):
    """A list for ``json.dump``, not an empty one, whose items are made one after the other as they are written."""

    def __init__(self, items: Iterable[Any]):
        super().__init__([None])  # the encoder asks whether it is empty
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)


def write_tree(path: pathlib.Path, tree: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays as ``write_arrays`` does, under keys such as ``params/joint/a_text/kernel``."""
    from flax import traverse_util

    write_arrays(path, traverse_util.flatten_dict(dict(tree), sep="/"))


def write_arrays(path: pathlib.Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a .safetensors file with a checksum in its metadata, atomically."""
    with atomic(path) as part:
        part.write_bytes(_packed(arrays, metadata or {}))  # save_file would make it readable by its owner only


def _packed(arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    noted = {**metadata, "sha256": _checksum(arrays, metadata)}
    return save(arrays, {_METADATA: json.dumps(noted, sort_keys=True)})


def read_arrays(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata that ``write_arrays`` wrote.

    ``InputError`` when the file is missing, damaged, or was written by something else.
    """
    from safetensors import safe_open

    # Errors come from safetensors, JSON, the disk, or a dtype that NumPy lacks.
    damaged = reported(f"{path} is missing, cut short or damaged", _AGAIN)
    with damaged, safe_open(path, framework="numpy") as file:
        noted = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        checksum = noted.pop("sha256", None)
    if checksum != _checksum(arrays, noted):
        raise InputError(f"{path} is damaged (its checksum differs): {_AGAIN}")
    return arrays, noted


def _checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(array.data if array.size else b"")
    return total.hexdigest()
