"""What a user decided about the photos of a folder: ``labels.sqlite`` beside them.

Every change is on disk before it is answered. A process that is killed loses nothing, and the file has one writer.
"""

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mlfsic_jax.run.explain import THRESHOLD
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import label_name, reason, shown

FILE = "labels.sqlite"
_FORMAT = 1  # user_version
_ID = 0x6D6C6673  # application_id, "mlfs"
_TABLES = """
create table label (name text primary key, wordings text not null, threshold real not null);
create table decision (photo text, label text, value integer not null, primary key (photo, label));
create table change (step integer not null, photo text not null, label text not null, before integer);
"""


class Label(NamedTuple):
    """A label as the user named it."""

    name: str
    wordings: tuple[str, ...]
    threshold: float  # photos above are proposed


class Store:
    """Labels, and decisions: photo -> label -> 1, it has it, or 0, it does not.

    All methods can be called from any thread. Photos are named by their paths relative to the folder, with slashes.

    Raises:
      InputError: the file is in use, damaged, of something else, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.RLock()
        again = "move it away to begin anew"
        try:
            self._file = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=0.2)
            self._file.execute("pragma locking_mode = exclusive")
            self._file.execute("begin exclusive")  # held until the file is closed
            pragmas = ("application_id", "user_version")
            kind, version = (self._file.execute(f"pragma {name}").fetchone()[0] for name in pragmas)
            if not self._file.execute("select 1 from sqlite_master").fetchone():
                signed = (f"pragma application_id = {_ID}", f"pragma user_version = {_FORMAT}")
                for statement in (*_TABLES.split(";"), *signed):
                    self._file.execute(statement)
            elif (kind, version) != (_ID, _FORMAT):
                raise InputError(f"{path} is not of this version of mlfsic_jax.app: {again}")
            self._file.execute(f"pragma user_version = {_FORMAT}")  # fails where it cannot be written
            self._file.execute("commit")
            self._opened = _identity(path)
            names = self._file.execute("select name, wordings, threshold from label order by rowid").fetchall()
            decided = self._file.execute("select photo, label, value from decision order by rowid").fetchall()
            self._labels = {name: Label(name, tuple(json.loads(words)), value) for name, words, value in names}
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise InputError(f"{path} is in use: close the app that labels these photos") from error
            raise InputError(f"{path} cannot be opened ({reason(error)}): give another with --state=FILE") from error
        except (sqlite3.DatabaseError, ValueError) as error:
            raise InputError(f"{path} is damaged ({reason(error)}): {again}") from error
        self._decided: dict[str, dict[str, int]] = {}
        for photo, label, value in decided:
            self._keep(from_sql(photo), label, value)
        self.version = 0  # counts changes since the start

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def labels(self) -> tuple[Label, ...]:
        """The labels, in the order in which they were named."""
        with self._lock:
            return tuple(self._labels.values())

    def decisions(self) -> dict[str, dict[str, int]]:
        """A copy of all decisions, the photo that was decided last at the end."""
        with self._lock:
            return {photo: dict(values) for photo, values in self._decided.items()}

    def decided(self, photo: str) -> dict[str, int]:
        """A copy of what is decided about a photo."""
        with self._lock:
            return dict(self._decided.get(photo, {}))

    @property
    def can_undo(self) -> bool:
        with self._lock:
            return bool(self._file.execute("select 1 from change limit 1").fetchone())

    def decide(self, decisions: Iterable[tuple[str, str, int | None]], names: Iterable[str] = ()) -> int:
        """Takes decisions (photo, label, 1, 0 or None for undecided), one step of ``undo``; returns the version.

        ``names`` are labels to add before, unless they are there; either all is done or nothing.
        """
        with self._lock:
            checked = dict.fromkeys(label_name(name, "the label") for name in names)
            added = [Label(name, (name,), THRESHOLD) for name in checked if name not in self._labels]
            changes = {(photo, label): value for photo, label, value in decisions}
            for _, label in changes:
                if label not in checked:
                    self._known(label)
            self._write(changes, recorded=True, added=added)
            return self.version

    def undo(self) -> tuple[str, ...]:
        """Takes the last step of ``decide`` back; returns its photos."""
        with self._lock:
            rows = self._file.execute(
                "select photo, label, before, step from change where step = (select max(step) from change)"
            ).fetchall()
            changes = {(from_sql(photo), label): before for photo, label, before, _ in rows}
            if rows:
                self._write(changes, recorded=False, forget=rows[0][3])
            return tuple(dict.fromkeys(photo for photo, _ in changes))

    def name_label(self, name: str, wordings: Sequence[str] = ()) -> int:
        """Adds a label, or gives one other wordings; without any it keeps those it has, at first its name.

        Returns the version. ``InputError`` for a name that exports could not have, see ``label_name``.
        """
        name = label_name(name, "the label")
        wordings = tuple(label_name(text, f"a wording of {name}") for text in wordings)
        with self._lock:
            former = self._labels.get(name)
            if former and not wordings:
                return self.version
            label = Label(name, wordings or (name,), former.threshold if former else THRESHOLD)
            return self._save(label)

    def set_threshold(self, name: str, value: float) -> int:
        """Sets the probability above which photos are proposed for a label; returns the version."""
        with self._lock:
            if not 0 <= value <= 1:
                raise InputError(f"a threshold is between 0 and 1, not {shown(value)}")
            return self._save(self._known(name)._replace(threshold=float(value)))

    def remove_label(self, name: str) -> int:
        """Removes a label and all that was decided about it; cannot be undone. Returns the version."""
        with self._lock:
            self._known(name)
            tables = {"label": "name", "decision": "label", "change": "label"}
            self._commit((f"delete from {table} where {column} = ?", [(name,)]) for table, column in tables.items())
            del self._labels[name]
            for photo in list(self._decided):
                self._decided[photo].pop(name, None)
                if not self._decided[photo]:
                    del self._decided[photo]
            return self.version

    def _known(self, name: str) -> Label:
        if name not in self._labels:
            raise InputError(f"there is no label {shown(name)}")
        return self._labels[name]

    def _save(self, label: Label) -> int:
        self._commit([_of_labels([label])])
        self._labels[label.name] = label
        return self.version

    def _write(
        self,
        changes: Mapping[tuple[str, str], int | None],
        recorded: bool,
        forget: int = -1,
        added: Sequence[Label] = (),
    ) -> None:
        """Writes decisions (photo, label) -> value, those that change something, after labels to add."""
        before = {key: self._decided.get(key[0], {}).get(key[1]) for key in changes}
        changes = {key: value for key, value in changes.items() if value != before[key]}
        if not changes and not added and forget < 0:
            return
        stored = [(to_sql(photo), label, value) for (photo, label), value in changes.items()]
        step = self._file.execute("select coalesce(max(step), 0) + 1 from change").fetchone()[0]
        undo = [(step, to_sql(key[0]), key[1], before[key]) for key in changes] if recorded else []
        self._commit(
            [
                _of_labels(added),
                ("delete from decision where photo = ? and label = ?", [row[:2] for row in stored if row[2] is None]),
                ("insert or replace into decision values (?, ?, ?)", [row for row in stored if row[2] is not None]),
                ("insert into change values (?, ?, ?, ?)", undo),
                ("delete from change where step = ?", [(forget,)]),
            ]
        )
        self._labels |= {label.name: label for label in added}
        for (photo, label), value in changes.items():
            self._keep(photo, label, value)

    def _keep(self, photo: str, label: str, value: int | None) -> None:
        """Remembers a decision; its photo goes to the end."""
        of_photo = self._decided.pop(photo, {})
        of_photo.pop(label, None)
        if value is not None:
            of_photo[label] = value
        if of_photo:
            self._decided[photo] = of_photo

    def _commit(self, statements: Iterable[tuple[str, Sequence[tuple]]]) -> None:
        if _identity(self.path) != self._opened:
            raise InputError(f"{self.path} was moved or deleted, nothing was changed: put it back, and start again")
        try:
            self._file.execute("begin")
            for statement, rows in statements:
                self._file.executemany(statement, rows)
            self._file.execute("commit")
        except sqlite3.Error as error:
            if self._file.in_transaction:
                self._file.execute("rollback")
            raise InputError(f"{self.path} cannot be written ({reason(error)}): nothing was changed") from error
        self.version += 1


def _of_labels(labels: Iterable[Label]) -> tuple[str, Sequence[tuple]]:
    """The statement that writes labels, with its rows."""
    update = "on conflict do update set wordings = excluded.wordings, threshold = excluded.threshold"
    rows = [(label.name, json.dumps(label.wordings, ensure_ascii=False), label.threshold) for label in labels]
    return f"insert into label values (?, ?, ?) {update}", rows


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells that a path leads to the same file as before; None where it leads to none."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return None


def to_sql(photo: str) -> str | bytes:
    """A name as SQLite takes it; those that are no text in UTF-8 as bytes."""
    try:
        photo.encode()
    except UnicodeEncodeError:
        return os.fsencode(photo)
    return photo


def from_sql(stored: str | bytes) -> str:
    """The name that ``to_sql`` got."""
    return os.fsdecode(stored) if isinstance(stored, bytes) else stored
