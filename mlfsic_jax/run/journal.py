"""The predictions of a long run so far, in a file beside the one that it will write: a killed run goes on from there.

The file has a header, a line with the fingerprint of what the predictions come from, and a record for each photo in
the order in which they were made: key (16 bytes: path, size and time of the photo), float32 [C], CRC-32 (4 bytes).
"""

import contextlib
import hashlib
import io
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from mlfsic_jax import __version__
from mlfsic_jax.run import inputs
from mlfsic_jax.run.classifier import Classifier
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import sha256, stamp
from mlfsic_jax.system.untrusted import reported

SECONDS_BETWEEN_WRITES = 1.0  # what a killed process loses
_KIND = b"predictions of mlfsic_jax "
_KEY, _CRC = 16, 4  # bytes


def fingerprint(
    classifier: Classifier,
    support: Mapping[Path, Sequence[str]],
    wordings: Mapping[str, Sequence[str]],
    vectors: str | os.PathLike[str] | None,
) -> str:
    """A digest, as hex, of all that predictions come from but the photos: the arguments of ``classifier.fit``.

    It is of files and arrays as they were read: on a GPU, what is computed from them may differ from run to run.
    """
    predictor, trained = classifier.predictor, classifier.trained
    files = [*([vectors] if vectors else []), *predictor.word_files, *inputs.encoder_files(predictor.encoder)]
    made_from = {
        "version": __version__,
        "model": [predictor.manifest, trained.n_shot, list(map(_key, files))],
        "method": classifier.method,
        "labels": [classifier.label_names, wordings],
        "support": [(sha256(photo), names) for photo, names in support.items()],
    }
    total = hashlib.sha256(json.dumps(made_from, default=str).encode())
    for array in jax.tree.leaves((predictor.backbone_variables, trained.stores)):
        total.update(np.asarray(array).tobytes())
    return total.hexdigest()


@contextlib.contextmanager
def keep(out: Path, made_from: str, photos: Sequence[Path], n_labels: int) -> Iterator["Journal"]:
    """Opens ``<out>.journal``, which is gone after the block, unless that raises and there is something to go on from.

    It is begun anew, and a line says so, where predictions were ``made_from`` another ``fingerprint``. ``InputError``
    when another process has it open, it is another kind of file, or it cannot be written.
    """
    path = out.with_name(f"{out.name}.journal")
    with _locked(path) as file:
        journal = Journal(path, file, made_from, photos, n_labels)
        try:
            yield journal
        except BaseException:
            journal.write()
            if journal.is_empty:
                path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)


class Journal:
    """The rows of Q photos, float32 [C], as far as they have been predicted, see ``keep``; little of it in memory."""

    def __init__(self, path: Path, file: io.FileIO, made_from: str, photos: Sequence[Path], n_labels: int):
        self._path, self._file, self._photos = path, file, photos
        self._keys = list(map(_key, photos))
        self._size = _KEY + 4 * n_labels + _CRC  # of a record
        self._places = np.full(len(photos), -1)  # of the records in the file
        self._header = _KIND + made_from.encode() + b"\n"
        self._waiting, self._written = bytearray(), time.monotonic()
        found = os.pread(file.fileno(), len(self._header), 0)
        if not _KIND.startswith(found[: len(_KIND)]):
            raise InputError(f"{path} is no journal of predictions: move it away, or give another --out")
        self._end = self._load() if found == self._header else 0
        file.truncate(self._end)  # without a record that was cut
        if not self._end:
            if len(found) == len(self._header):
                print(f"{path} is of another model, method, support or other labels: starting anew", flush=True)
            self._append(self._header)

    @property
    def is_empty(self) -> bool:
        """Whether it has no record."""
        return self._end == len(self._header)

    def missing(self) -> list[int]:
        """The numbers of the photos that have no row, or have changed since: 0..Q-1, ascending."""
        return np.flatnonzero(self._places < 0).tolist()

    def add(self, number: int, row: np.ndarray) -> None:
        """Keeps the row of a photo; it reaches the file within a second or so."""
        content = self._keys[number] + row.astype(np.float32).tobytes()
        self._places[number] = self._end
        self._append(content + zlib.crc32(content).to_bytes(_CRC, "little"))
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Writes what waits; ``InputError`` when the disk does not take it."""
        with reported(f"{self._path} cannot be written", "make room, then the same command goes on", OSError):
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        self._written = time.monotonic()

    def rows(self) -> Iterator[tuple[Path, np.ndarray]]:
        """Yields each photo that has a row, in the order of ``photos``, with it."""
        self.write()
        for photo, place in zip(self._photos, self._places.tolist(), strict=True):
            if place >= 0:
                record = self._read(place)
                if not record:
                    raise InputError(f"{self._path} was damaged: the same command predicts again what it lost")
                yield photo, np.frombuffer(record[_KEY:-_CRC], np.float32)

    def _append(self, content: bytes) -> None:
        self._waiting += content
        self._end += len(content)

    def _load(self) -> int:
        """Finds the photos' records; returns where the whole ones end."""
        places, end = {}, len(self._header)
        while record := self._read(end):
            places[record[:_KEY]] = end
            end += self._size
        self._places[:] = [places.get(key, -1) for key in self._keys]
        return end

    def _read(self, place: int) -> bytes:
        """A record, or b"" where it is cut or damaged."""
        record = os.pread(self._file.fileno(), self._size, place)
        whole = len(record) == self._size and zlib.crc32(record[:-_CRC]).to_bytes(_CRC, "little") == record[-_CRC:]
        return record if whole else b""


def _key(photo: str | os.PathLike[str]) -> bytes:
    """Tells a photo, or another file, from what it may become."""
    changes = "".join(f"{number} " for number in stamp(photo) or ())
    return hashlib.blake2b(changes.encode() + os.fsencode(photo), digest_size=_KEY).digest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[io.FileIO]:
    """Opens a file that one process at a time may have; it is created when missing."""
    import fcntl

    while True:
        with open(path, "a+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                way_out = "wait for it, or give another --out"
                raise InputError(f"{path} is in use, another process predicts for the same --out: {way_out}") from None
            except OSError:
                pass  # not every disk has locks
            if os.fstat(file.fileno()).st_nlink:  # else the process that had it has just removed it
                yield file
                return
