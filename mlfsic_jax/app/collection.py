"""The photos of a folder: their features and thumbnails, made once in the background and kept in the cache."""

import contextlib
import hashlib
import io
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mlfsic_jax.app.store import from_sql, to_sql
from mlfsic_jax.data.photo_files import photos_below
from mlfsic_jax.data.transforms import decode_photo, upright_size
from mlfsic_jax.run.classifier import embed_each
from mlfsic_jax.run.saved import Predictor, Trained
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import stamp
from mlfsic_jax.system.untrusted import reported

THUMBNAIL = 320  # pixels of the longest side
_AT_ONCE = 64  # photos between looks at whether to stop
_FEATURES = ("x", "l")  # of ``Method.embed``, what is kept of a photo
_TABLES = """
create table if not exists feature (name text primary key, state text, x blob, l blob);
create table if not exists thumbnail (name text primary key, state text, jpeg blob);
"""


class Progress(NamedTuple):
    """How far the features are."""

    embedded: int  # photos, with those that cannot be read
    rate: float  # photos per second since the start
    left_s: float  # seconds left at this rate


class Collection:
    """Photos 0 to N - 1 of a folder and its sub-folders, sorted by path.

    Attributes:
      names: N paths relative to the folder.
      features: name -> float16 [N, ...], of ``Method.embed``; zero where ``embedded`` is not 1.
      embedded: int8 [N], 1 for photos whose features are there, -1 for those that cannot be read, 0 for others.
      errors: why photos cannot be read, by their number.
      key: of the names; a number means the same photo where this is the same.
    """

    def __init__(self, folder: Path, predictor: Predictor, trained: Trained, method: str, cache_dir: Path) -> None:
        self.folder, self._model = folder, (predictor, trained, method)
        self._paths = photos_below(folder)
        if not self._paths:
            raise InputError(f"--images={folder} holds no photos")
        self.names = tuple(path.relative_to(folder).as_posix() for path in self._paths)
        self.number = {name: i for i, name in enumerate(self.names)}
        self.key = hashlib.sha256(os.fsencode("\0".join(self.names))).hexdigest()[:16]
        self.embedded = np.zeros(len(self.names), np.int8)
        self.features: dict[str, np.ndarray] = {}
        self.errors: dict[int, str] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._lock, self._stop, self._start = threading.RLock(), threading.Event(), (0, time.monotonic())
        what = f"{os.path.realpath(folder)} {predictor.manifest['identity']['weights']} {predictor.image_size}"
        file = cache_dir / "app" / f"{hashlib.sha256(os.fsencode(what)).hexdigest()[:16]}.sqlite"
        with reported(f"--cache_dir={cache_dir} cannot be written", "give another", (OSError, sqlite3.Error)):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open(file)
            except (sqlite3.DatabaseError, ValueError) as error:
                if isinstance(error, sqlite3.OperationalError) and "decode" not in str(error):
                    raise
                print(f"the cache {file} is damaged: computing features again")
                self._file.close()
                for path in (file, *(file.with_name(file.name + more) for more in ("-wal", "-shm"))):
                    path.unlink(missing_ok=True)
                self.features, self.embedded[:] = {}, 0
                self._open(file)

    def _open(self, file: Path) -> None:
        self._file = sqlite3.connect(file, check_same_thread=False, isolation_level=None, timeout=60)
        self._file.execute("pragma journal_mode = wal")
        self._file.execute("pragma synchronous = normal")
        self._file.executescript(_TABLES)
        self._read_cache()

    def close(self) -> None:
        self._stop.set()
        with self._lock:
            self._file.close()

    def progress(self) -> Progress:
        done, (before, since) = int(np.count_nonzero(self.embedded)), self._start
        rate = (done - before) / max(time.monotonic() - since, 1e-3)
        return Progress(done, rate, (len(self.names) - done) / rate if rate else 0.0)

    def embed_all(self, told: Callable[[], None]) -> None:
        """Computes the features that are missing, calling ``told`` after some; ``close`` elsewhere ends it."""
        missing = np.flatnonzero(self.embedded == 0).tolist()
        self._start = len(self.names) - len(missing), time.monotonic()
        for start in range(0, len(missing), _AT_ONCE):
            if self._stop.is_set():
                return
            some = missing[start : start + _AT_ONCE]
            states = [self.state(i) for i in some]
            rows = list(embed_each(*self._model, [self._paths[i] for i in some]))
            for i, row in zip(some, rows, strict=True):
                self._set(i, row if isinstance(row, InputError) else {name: row[name] for name in _FEATURES})
            with self._lock:
                if self._stop.is_set():
                    return
                self._keep(some, states)
            told()

    def size(self, i: int) -> tuple[int, int]:
        """Width and height of a photo as it is seen; (0, 0) where it cannot be read."""
        if i not in self._sizes:
            self._sizes[i] = upright_size(self._paths[i])
        return self._sizes[i]

    def path(self, i: int) -> Path:
        return self._paths[i]

    def jpeg(self, i: int, side: int) -> bytes:
        """A photo, upright, its longest side at most ``side`` pixels; ``InputError`` where it cannot be read."""
        pixels = decode_photo(self._paths[i], str(self._paths[i]), side)
        image, file = Image.fromarray(pixels), io.BytesIO()
        image.thumbnail((side, side))
        image.save(file, "jpeg", quality=85)
        return file.getvalue()

    def thumbnail(self, i: int) -> bytes:
        """``jpeg`` of ``THUMBNAIL`` pixels, from the cache once it was made."""
        stored, state = to_sql(self.names[i]), self.state(i)
        query, found = "select jpeg from thumbnail where name = ? and state = ?", None
        with self._lock, contextlib.suppress(sqlite3.DatabaseError):  # damaged: it is made again
            found = self._file.execute(query, (stored, state)).fetchone()
        if found:
            return found[0]
        made = self.jpeg(i, THUMBNAIL)
        with self._lock, contextlib.suppress(sqlite3.DatabaseError):  # a full disk, say: it is made again
            if not self._stop.is_set():
                self._file.execute("insert or replace into thumbnail values (?, ?, ?)", (stored, state, made))
        return made

    def regions(self, i: int, method: Trained) -> Mapping[str, np.ndarray]:
        """``Method.embed`` of one photo by other methods of the same model, such as one that explains."""
        predictor, _, name = self._model
        (row,) = embed_each(predictor, method, name, [self._paths[i]])
        if isinstance(row, InputError):
            raise row
        return row

    def state(self, i: int) -> str:
        """What tells that a file has changed."""
        return " ".join(map(str, stamp(self._paths[i]) or ()))

    def _set(self, i: int, row: Mapping[str, np.ndarray] | InputError) -> None:
        if isinstance(row, InputError):
            self.errors[i], self.embedded[i] = str(row), -1
            return
        for name, value in row.items():
            if name not in self.features:
                self.features[name] = np.zeros((len(self.names), *value.shape), np.float16)
            self.features[name][i] = value
        self.embedded[i] = 1

    def _keep(self, numbers: list[int], states: list[str]) -> None:
        # Those that cannot be read are tried again at the next start, where what reads HEIC may have been installed.
        rows = [
            (to_sql(self.names[i]), state, *(self.features[name][i].tobytes() for name in _FEATURES))
            for i, state in zip(numbers, states, strict=True)
            if self.embedded[i] == 1
        ]
        self._file.executemany("insert or replace into feature values (?, ?, ?, ?)", rows)

    def _read_cache(self) -> None:
        for stored, state, *values in self._file.execute("select * from feature"):
            i = self.number.get(from_sql(stored))
            if i is not None and state == self.state(i):
                arrays = [np.frombuffer(value, np.float16) for value in values]
                self._set(i, dict(zip(_FEATURES, arrays, strict=True)))
