"""Decisions on disk."""

import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from mlfsic_jax.app.store import Label, Store
from mlfsic_jax.system.errors import InputError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.sqlite"


@pytest.fixture
def store(path):
    found = Store(path)
    found.name_label("cat")
    found.name_label("dog", ("dog", "puppy"))
    yield found
    found.close()


def reopened(store):
    store.close()
    return Store(store.path)


def test_decisions_and_labels_are_kept(store):
    store.decide([("a.jpg", "cat", 1), ("b/ü.jpg", "dog", 0)])
    store.set_threshold("dog", 0.25)
    again = reopened(store)
    assert again.labels() == (Label("cat", ("cat",), 0.5), Label("dog", ("dog", "puppy"), 0.25))
    assert again.decisions() == {"a.jpg": {"cat": 1}, "b/ü.jpg": {"dog": 0}}
    again.close()


def test_steps_are_undone_one_by_one(store):
    store.decide([("a", "cat", 1), ("a", "dog", 0)])
    store.decide([("a", "cat", 0), ("b", "cat", 1)])
    store.decide([("b", "cat", 1)])  # changes nothing, so it is no step
    assert store.undo() == ("a", "b") and store.decisions() == {"a": {"cat": 1, "dog": 0}}
    assert store.undo() == ("a",) and store.decisions() == {} and not store.can_undo
    assert store.undo() == ()


def test_undo_goes_on_after_a_restart(store):
    store.decide([("a", "cat", 1)])
    again = reopened(store)
    assert again.can_undo and again.undo() == ("a",) and again.decisions() == {}
    again.close()


def test_the_photo_that_was_decided_last_comes_last(store):
    for photo in "abc":
        store.decide([(photo, "cat", 1)])
    assert list(store.decisions()) == ["a", "b", "c"]
    store.decide([("a", "cat", 0)])
    assert list(store.decisions()) == ["b", "c", "a"]
    store.decide([("b", "dog", 1)])
    again = reopened(store)
    assert list(again.decisions()) == list(store.decisions()) == ["c", "a", "b"]
    again.close()


def test_a_label_keeps_its_wordings_until_it_gets_others(store):
    store.name_label("dog")
    assert store.labels()[1].wordings == ("dog", "puppy")
    store.name_label("dog", ("dog", "hound"))
    assert store.labels()[1].wordings == ("dog", "hound")
    store.name_label(" cafe\u0301 ")
    assert store.labels()[2].name == "caf\u00e9"  # as files that are imported spell it


def test_versions_count_changes(store):
    before = store.version
    assert store.decide([("a", "cat", 1)]) == before + 1
    assert store.decide([("a", "cat", 1)]) == before + 1


def test_a_removed_label_takes_its_decisions_along(store):
    store.decide([("a", "cat", 1), ("b", "cat", 1), ("b", "dog", 1)])
    store.remove_label("cat")
    assert store.decisions() == {"b": {"dog": 1}} and [label.name for label in store.labels()] == ["dog"]
    assert store.undo() == ("b",) and store.decisions() == {}


def test_names_that_are_no_text_in_utf_8_are_kept(store):
    name = os.fsdecode(b"caf\xe9.jpg")
    store.decide([(name, "cat", 1)])
    again = reopened(store)
    assert again.decisions() == {name: {"cat": 1}}
    again.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda store: store.decide([("a", "cow", 1)]), "there is no label 'cow'"),
        (lambda store: store.name_label("  "), "the label: '  ' is not a label name"),
        (lambda store: store.name_label("x", ("",)), "a wording of x: '' is not a label name"),
        (lambda store: store.name_label("\udce9"), "control character"),
        (lambda store: store.name_label("a\nb"), "contains a line break"),
        (lambda store: store.name_label("a" * 201), "a label of 201 characters"),
        (lambda store: store.set_threshold("cat", 2), "between 0 and 1"),
        (lambda store: store.remove_label("cow"), "there is no label 'cow'"),
    ],
)
def test_mistakes_change_nothing(store, change, message):
    version = store.version
    with pytest.raises(InputError, match=message):
        change(store)
    assert store.version == version


def test_a_second_app_is_refused(store):
    with pytest.raises(InputError, match="in use: close the app"):
        Store(store.path)


def test_files_of_something_else_are_left_alone(tmp_path):
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as file:
        file.execute("create table photos (a)")
    file.close()
    (tmp_path / "text.sqlite").write_text("no database, though long enough to be taken for one " * 30)
    before = other.read_bytes()
    with pytest.raises(InputError, match="not of this version"):
        Store(other)
    with pytest.raises(InputError, match="damaged"):
        Store(tmp_path / "text.sqlite")
    with pytest.raises(InputError, match="cannot be opened"):
        Store(tmp_path / "nowhere" / "labels.sqlite")
    assert other.read_bytes() == before


def test_a_file_that_was_moved_or_deleted_takes_no_decisions(store, path):
    path.rename(path.with_name("moved.sqlite"))
    with pytest.raises(InputError, match="was moved or deleted, nothing was changed: put it back"):
        store.decide([("a", "cat", 1)])
    path.touch()  # another file
    with pytest.raises(InputError, match="was moved or deleted"):
        store.decide([("a", "cat", 1)])
    path.with_name("moved.sqlite").rename(path)
    store.decide([("a", "dog", 1)])
    assert reopened(store).decisions() == {"a": {"dog": 1}}


def test_labels_and_decisions_are_added_together_or_not_at_all(store, monkeypatch):
    store.decide([("a", "cow", 1)], ["cat", "cow"])
    assert [label.name for label in store.labels()] == ["cat", "dog", "cow"] and store.decided("a") == {"cow": 1}
    with pytest.raises(InputError, match="no label 'owl'"):
        store.decide([("a", "owl", 1)], ["hen"])
    monkeypatch.setattr(store, "_opened", None)
    with pytest.raises(InputError, match="nothing was changed"):
        store.decide([("a", "hen", 1)], ["hen"])
    assert [label.name for label in store.labels()] == ["cat", "dog", "cow"] and store.decided("a") == {"cow": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_file_that_cannot_be_written_is_refused(store, path):
    store.close()
    path.chmod(0o400)
    with pytest.raises(InputError, match="cannot be opened"):
        Store(path)


def test_a_killed_app_loses_nothing(path):
    program = (
        "import os, signal, sys; from mlfsic_jax.app.store import Store; from pathlib import Path\n"
        "store = Store(Path(sys.argv[1])); store.name_label('cat')\n"
        "for i in range(50): store.decide([(f'{i}.jpg', 'cat', 1)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    again = Store(path)
    assert list(again.decisions()) == [f"{i}.jpg" for i in range(50)]
    again.close()
