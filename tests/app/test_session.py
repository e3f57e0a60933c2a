"""A folder that is being labelled."""

import sqlite3
import time

import numpy as np
import pytest

import mlfsic_jax as mf
from mlfsic_jax.app.reasons import Reasons
from mlfsic_jax.app.session import open_session
from mlfsic_jax.run import proposals
from mlfsic_jax.system.errors import InputError

LABELS = ("cat", "dog", "hot dog")


def decide(session, *decisions):
    session.store.decide((session.collection.names[i], label, value) for i, label, value in decisions)
    session.refit()


def readable(session):
    return [i for i in range(len(session.collection.names)) if i not in session.collection.errors]


def test_probabilities_are_those_of_predict(session, predictor):
    photos = [session.collection.path(i) for i in readable(session)]
    few = mf.fit(predictor, [], [], label_names=LABELS)
    expected = few.predict(photos).probabilities  # x and l are kept as float16
    np.testing.assert_allclose(session.fitted.probabilities[readable(session)], expected, atol=5e-3)
    assert np.ptp(expected, axis=0).max() > 0.1
    first, second = readable(session)[:2]
    decide(session, (first, "cat", 1), (second, "dog", 1))
    few = mf.fit(predictor, photos[:2], ["cat", "dog"], label_names=LABELS)
    expected = few.predict(photos).probabilities
    np.testing.assert_allclose(session.fitted.probabilities[readable(session)], expected, atol=5e-3)


def test_an_undecided_label_is_no_only_beside_a_confirmed_one():
    nan = np.nan
    decided = np.array([[1, nan, 0], [nan, 0, nan], [nan, nan, nan]])
    np.testing.assert_array_equal(proposals.targets(decided), [[1, 0, 0], [nan, 0, nan], [nan, nan, nan]])


def test_a_photo_that_cannot_be_read_is_named_and_the_others_go_on(session):
    (i,) = session.collection.errors
    assert session.collection.names[i] == "damaged.jpg" and "damaged" in session.collection.errors[i]
    assert session.probabilities(i) is None and session.describe(i)["error"]
    assert session.collection.progress().embedded == len(session.collection.names) == 10


def test_features_are_computed_once_and_again_where_a_photo_changed(session, folder, predictor, tmp_path, monkeypatch):
    before = {name: x.copy() for name, x in session.collection.features.items()}
    names = session.collection.names
    session.close()
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "2.png").unlink()
    again = open_session(folder, None, predictor, tmp_path / "cache")
    i = again.collection.number["0.png"]
    assert [n for n in again.collection.names if n != "0.png"] == [n for n in names if n not in ("0.png", "2.png")]
    # What cannot be read is tried again: what reads it may have been installed since.
    assert set(np.flatnonzero(again.collection.embedded == 0)) == {i, again.collection.number["damaged.jpg"]}
    again.collection.embed_all(lambda: None)
    for name, x in again.collection.features.items():
        np.testing.assert_array_equal(x[i], before[name][names.index("1.png")])
        np.testing.assert_array_equal(x[again.collection.number["5.png"]], before[name][names.index("5.png")])
    again.close()


def test_orders_and_filters(session):
    numbers = readable(session)
    p = session.fitted.probabilities[:, 1]
    assert session.photos("name", "all", "").tolist() == list(range(10))
    found = session.photos("certain", "all", "dog")
    assert found[:-1].tolist() == sorted(numbers, key=lambda i: -p[i]) and found[-1] in session.collection.errors
    found = session.photos("suggested", "all", "dog")
    assert found[:-1].tolist() == sorted(numbers, key=lambda i: abs(p[i] - 0.5))
    first, second, third = numbers[:3]
    decide(session, (first, "dog", 1), (second, "dog", 0), (third, "cat", 1))
    assert session.photos("name", "yes", "dog").tolist() == [first]
    assert session.photos("name", "no", "dog").tolist() == [second]
    assert set(session.photos("name", "undecided", "")) == set(range(10)) - {first, second, third}
    assert third in session.photos("name", "undecided", "dog")
    session.store.set_threshold("dog", 0.0)
    assert set(session.photos("name", "proposed", "dog")) == set(numbers) - {first, second}
    assert set(session.photos("suggested", "all", "dog")[-3:-1]) == {first, second}  # what is decided comes last
    with pytest.raises(InputError, match="no label 'cow'"):
        session.photos("name", "all", "cow")


def test_suggested_goes_by_what_is_undecided(session):
    first, second = readable(session)[:2]
    decide(session, (first, "cat", 1))
    found = session.fitted.probabilities
    found[:] = [0.9, 0.9, 0.9]
    found[first], found[second] = (0.5, 0.99, 0.99), (0.3, 0.9, 0.9)  # all that is open of the first is certain
    order = session.photos("suggested", "all", "").tolist()
    assert order[0] == second and order.index(first) > 1


def test_photos_whose_features_came_after_a_fit_wait_for_the_next(folder, predictor, tmp_path):
    session = open_session(folder, None, predictor, tmp_path / "cache")
    session.store.name_label("cat")
    session.store.name_label("dog")
    session.collection.embed_all(lambda: None)
    session.collection.embedded[3] = 0
    session.refit()
    session.collection.embedded[3] = 1
    assert session.probabilities(3) is None and session.probabilities(4)
    assert session.photos("certain", "proposed", "").tolist().count(3) == 0
    session.catch_up()
    assert session.probabilities(3)
    session.close()


def test_counts_and_quality_at_the_threshold(session):
    numbers = readable(session)
    decide(session, *((i, "cat", int(k < 3)) for k, i in enumerate(numbers[:6])))
    fitted = session.fitted
    assert fitted.support.tolist() == numbers[:6]
    truth, scores = np.arange(6) < 3, fitted.left_out[:, 0]
    threshold = float(np.sort(scores)[2:4].mean())
    session.store.set_threshold("cat", threshold)
    above = scores > threshold
    found = session.quality("cat")
    assert found["judged"] == 6 and found["examples"] == numbers[:3]
    assert found["precision"] == (above & truth).sum() / 3 and found["recall"] == (above & truth).sum() / 3
    assert sum(found["histogram"]) == 9 and sum(found["decided_histogram"]["yes"]) == 3
    assert session.counts()["cat"]["yes"] == 3 and session.counts()["cat"]["no"] == 3
    assert session.quality("dog")["precision"] is None


def test_left_out_probabilities_are_those_of_fits_without_the_photo(session):
    numbers = readable(session)
    marks = [(i, label, int((i + c) % 3 == 0)) for i in numbers[:6] for c, label in enumerate(LABELS)]
    decide(session, *marks)
    whole = session.fitted
    method = session.fitted.classifier.trained.methods["class_word_ridge"]
    for row, i in enumerate(numbers[:6]):
        decide(session, *((i, label, None) for label in LABELS))
        rest = session.fitted
        if rest.classifier.state["fit"].beta == whole.classifier.state["fit"].beta:
            # the centre of the scores, which all of the support has a say in, is left as it is
            shift = _centre(rest) - _centre(whole)
            found = _logit(rest.probabilities[i]) + session_slope(rest) * shift
            np.testing.assert_allclose(found, _logit(whole.left_out[row]), atol=0.15)  # x and l are float16
        decide(session, *((n, label, value) for n, label, value in marks if n == i))
    assert method.takes_unknown


def _centre(fitted):
    from mlfsic_jax.core.word_ridge import left_out_centre

    state = fitted.classifier.state
    return np.asarray(left_out_centre(state["fit"].left_out, state["labels"]))


def session_slope(fitted):
    return fitted.classifier.trained.calibration["class_word_ridge"][0]


def _logit(p):
    return np.log(p) - np.log1p(-p)


def test_reasons_add_up_and_name_examples(session):
    numbers = readable(session)
    decide(session, (numbers[0], "cat", 1), (numbers[1], "dog", 1), (numbers[2], "hot dog", 1))
    found = Reasons(session).describe(numbers[4])
    state, x = session.fitted.classifier.state, session.collection.features["x"].astype(np.float64)
    probabilities = [one["probability"] for one in found["labels"]]
    assert probabilities == sorted(probabilities, reverse=True)
    for one in found["labels"]:
        c = LABELS.index(one["label"])
        dual = np.asarray(state["fit"].dual)[:3, c]
        photos = sum(dual[s] * (x[numbers[s]] @ x[numbers[4]]) for s in range(3))
        assert one["photos"] == pytest.approx(photos, abs=2e-3)
        centre = _centre(session.fitted)[c]
        logit = session_slope(session.fitted) * (one["words"] + one["photos"] - centre)
        logit += session.fitted.classifier.trained.calibration["class_word_ridge"][1]
        assert _logit(one["probability"]) == pytest.approx(logit, abs=0.05)
        assert np.array(one["heat"]).shape == tuple(found["grid"])
        assert {match["photo"] for match in one["matches"]} <= set(numbers[:3])
        assert one["classes"] and all(isinstance(name, str) for name, _ in one["classes"])


def test_the_fit_follows_changes_in_the_background(folder, predictor, tmp_path):
    session = open_session(folder, None, predictor, tmp_path / "cache")
    session.start()
    session.store.name_label("cat")
    session.changed()
    end = time.monotonic() + 60
    while session.fitted is None or session.collection.progress().embedded < 10 or session._ready < 9:
        assert time.monotonic() < end
        time.sleep(0.01)
    session.store.name_label("dog")
    session.changed()
    while session.fitted.label_names != ("cat", "dog"):
        assert time.monotonic() < end
        time.sleep(0.01)
    session.close()


@pytest.mark.parametrize("broken", ["embed_all", "fit"])
def test_what_fails_in_the_background_is_told_on_the_page(folder, predictor, tmp_path, monkeypatch, broken, capsys):
    def fail(*_):
        raise OSError("no space left")

    session = open_session(folder, None, predictor, tmp_path / "cache")
    monkeypatch.setattr(*((session.collection, "embed_all") if broken == "embed_all" else (proposals, "fit")), fail)
    session.store.name_label("cat")
    session.start()
    end = time.monotonic() + 60
    while "no space left" not in session.note:
        assert time.monotonic() < end
        time.sleep(0.01)
    session.close()
    assert "no space left" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["pages", "text", "blob"])
def test_a_damaged_cache_is_made_anew(session, folder, predictor, tmp_path, capsys, damage):
    session.close()
    (file,) = (tmp_path / "cache" / "app").glob("*.sqlite")
    if damage == "blob":
        with sqlite3.connect(file) as cache:
            cache.execute("update feature set x = x'00'")
        cache.close()
    else:
        content = file.read_bytes()
        file.write_bytes(
            b"no database " * 999 if damage == "text" else content[:4096] + b"\xff" * (len(content) - 4096)
        )
    again = open_session(folder, None, predictor, tmp_path / "cache")
    assert "is damaged: computing features again" in capsys.readouterr().out
    assert not (again.collection.embedded == 1).any()
    again.collection.embed_all(lambda: None)
    assert (again.collection.embedded == 1).sum() == 9
    again.close()


def test_an_empty_folder_is_refused(tmp_path, predictor):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no photos"):
        open_session(tmp_path / "empty", None, predictor, tmp_path / "cache")
