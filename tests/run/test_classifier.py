"""Prediction against evaluation on the same episode, and as a user meets it: new labels, mistakes."""

import shutil

import numpy as np
import pytest
from scipy.special import expit

from mlfsic_jax.core import word_ridge
from mlfsic_jax.methods import METHODS
from mlfsic_jax.run import classifier, experiment, inputs, names, saved
from mlfsic_jax.run.classifier import fit
from mlfsic_jax.system.errors import InputError
from tests.own_photos import BRIEF, FOR_PHOTOS, assert_like_evaluation


def test_probabilities_are_those_of_evaluation(model, frozen):
    assert_like_evaluation(model, *frozen)


def test_the_default_is_what_was_best_on_validation_and_says_so(model, support):
    (one,) = model.trained
    validation = dict.fromkeys(METHODS, 0.5)
    model = model._replace(
        trained=(
            one._replace(validation=validation | {"ridge": 0.623, "zero_shot": 0.9}),
            one._replace(n_shot=5, validation=validation | {"lcm": 0.7}),
        )
    )
    few = fit(model, *support)  # 2, 2 and 1 photos
    assert (few.method, few.trained.n_shot) == ("ridge", 1)
    assert few.note.startswith("method ridge: best on validation labels (62.3 Ma-AP there, 1-shot)")
    assert "2 per label, 1-shot is nearest" in few.note
    many = [*support[0]] * 4, [*support[1]] * 4
    assert (fit(model, *many).method, fit(model, *many).trained.n_shot) == ("lcm", 5)
    assert "method base: chosen by you (50.0 Ma-AP there, 5-shot)" in fit(model, *many, method="base").note


def test_any_number_of_photos_with_one_program(model, support, frozen):
    photos = sorted((frozen[1].parent / "photos/photos").iterdir())[10:31]
    few = fit(model, *support, method="region_word_ridge")
    one = few.predict(photos[0])
    functions = (classifier._score, classifier._embed_features, inputs.backbone_features)
    programs = [f._cache_size() for f in functions]
    many = few.predict(photos)
    assert many.probabilities.shape == (21, 3) and one.probabilities.shape == (1, 3)
    # The same program, another place in the batch: sums in another order at most.
    np.testing.assert_allclose(many.probabilities[:1], one.probabilities, atol=1e-6)
    np.testing.assert_allclose(many.probabilities[8:13], few.predict(photos[8:13]).probabilities, atol=1e-6)
    assert few.predict([]).probabilities.shape == (0, 3)
    assert programs == [f._cache_size() for f in functions]
    for row, labels in zip(many.probabilities, many.labels, strict=True):
        assert set(labels) == {name for name, p in zip(many.label_names, row, strict=True) if p > 0.5}
        assert [row[many.label_names.index(name)] for name in labels] == sorted(row[row > 0.5], reverse=True)


def test_what_lcm_keeps(model, support):
    few = fit(model, *support, method="lcm")
    assert few.kept.shape == (5, 2, 2) and few.kept.dtype == bool and few.kept.any(axis=(1, 2)).all()
    everything = model._replace(trained=(model.trained[0]._replace(tuned={"lcm": 0.5}),))
    assert fit(everything, *support, method="lcm").kept.all()
    base = fit(model, *support, method="base")
    assert base.kept is None and base.state["prototypes"].shape == (3, 16)
    np.testing.assert_array_equal(few.thresholds, [0.5] * 3)


def test_words_of_new_labels(model, support, tmp_path):
    photos = support[0][:2]
    words = names._word_vectors(model, ("kelp", "pine_tree", "sea"), 10, None)
    lines = (model.word_files[1]).read_text().splitlines()
    table = {line.split()[0]: np.array(line.split()[1:], float) for line in lines}
    expected = [table["kelp"], (table["pine"] + table["tree"]) / 2, table["sea"]]
    np.testing.assert_allclose(words, expected, atol=1e-6)  # of numbers with four decimals
    with pytest.raises(InputError, match=r"'blob' \(missing: blob\).*--vectors=FILE.*--method=ridge"):
        fit(model, photos, ["blob", "sea"], method="base")
    assert fit(model, photos, ["blob", "sea"], method="prototypes").label_names == ("blob", "sea")

    mine = tmp_path / "mine.npz"
    np.savez(mine, blob=np.arange(10.0), sea=np.ones(10))
    words = names._word_vectors(model, ("blob", "sea", "kelp"), 10, mine)
    np.testing.assert_allclose(words, [np.arange(10), np.ones(10), table["kelp"]], atol=1e-6)
    with pytest.raises(InputError, match=r"mine.npz has no vector for 1 of the 1 labels: 'kelp'"):
        names._word_vectors(model, ("kelp",), 10, mine)
    np.savez(mine, blob=np.ones(3))
    with pytest.raises(InputError, match="vectors of 3 numbers, but the model was trained with 10"):
        names._word_vectors(model, ("blob",), 10, mine)


def test_the_meaning_of_a_name_counts(model, support):
    photos, labels = support
    renamed = [["sun" if name == "kelp" else name for name in ([x] if isinstance(x, str) else x)] for x in labels]
    for method in ("ridge", "region_word_ridge", "lcm", "classifier", "pla_words", "pla"):  # with words, and without
        a, b = (fit(model, photos, names, method=method).predict(photos).probabilities for names in (labels, renamed))
        assert np.allclose(a, b) == (not METHODS[method].needs_words), method


@pytest.mark.parametrize(
    ("labels", "options", "complaint"),
    [
        (["sea", "sea"], {"method": "ridge"}, "label 'sea' is on every support photo"),
        (["sea", ["sea", "kelp"]], {"method": "word_ridge"}, "label 'sea' is on every support photo"),
        (["sea"], {}, "2 support photos but labels for 1"),
        ([[], []], {}, "the support has no label"),
        (["sea", ""], {}, "'' is not a label name"),
        (["sea", [3.5]], {}, "3.5 is not a label name"),
        (["sea", "a\nb"], {}, "contains a line break"),
        (["sea", "kelp"], {"label_names": ["sea", "kelp", "sun"]}, "label 'sun' has no support photo"),
        (["sea", "kelp"], {"label_names": ["sea"]}, "label 'kelp' of a support photo is not among the labels sea"),
        (["sea", "kelp"], {"method": "cnn"}, "method 'cnn' is unknown: use one of zero_shot, "),
        (["sea", "kelp"], {"method": "base", "vectors": "none.txt"}, "none.txt does not exist"),
    ],
)
def test_mistakes_in_the_support(model, support, labels, options, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        fit(model, support[0][:2], labels, **options)
    assert "\n" not in str(caught.value)


def test_one_label_and_one_photo_of_each(model, support):
    photos = support[0]
    cases = [(method, ["sea"]) for method in ("prototypes", "base")]
    cases += [
        (method, labels) for method in ("region_word_ridge", "ridge") for labels in (["sea", []], ["sea", "kelp"])
    ]
    for method, labels in cases:
        found = fit(model, photos[: len(labels)], labels, method=method).predict(photos)
        assert found.probabilities.shape == (5, len(found.label_names))
        assert (found.probabilities >= 0).all() and (found.probabilities <= 1).all()


def test_a_method_that_was_not_trained_says_how_to_get_it(exported_scenes, tmp_path):
    config, run, _ = exported_scenes
    model, photos = saved.load(run), [np.full((32, 32, 3), x, np.uint8) for x in (0, 90, 180)]
    labels = ["red star", "red star", "green triangle"]
    with pytest.raises(InputError) as caught:
        fit(model, photos, labels, method="maml")
    evaluated = [name for name in FOR_PHOTOS if not METHODS[name].on_request]
    assert str(caught.value) == (
        f"method maml has to learn from labels of the dataset first, and {run} was trained without it: run its "
        f"""training command again with --config.eval.methods="({",".join(f"'{x}'" for x in (*evaluated, "maml"))})\""""
    )
    # What it says helps, and trains nothing else again.
    shutil.copytree(run, tmp_path / "run")
    again = config.copy_and_resolve_references()
    again.update_from_flattened_dict(BRIEF | {"eval.methods": (*evaluated, "maml")})
    experiment.train_and_evaluate(again, tmp_path / "run")
    few = fit(saved.load(tmp_path / "run"), photos, labels, method="maml")
    assert few.note.startswith("method maml: chosen by you (")
    assert "it learned from the base labels of scenes" in few.note
    assert few.predict(photos).probabilities.shape == (3, 2)


def test_a_control_labels_no_photos(model, support):
    with pytest.raises(InputError, match="method lcm_random_scores is a control for evaluations and labels no photos"):
        fit(model, *support, method="lcm_random_scores")


def test_which_regions_decided(model, support):
    photos, labels = support
    few = fit(model, photos, labels, method="region_word_ridge")
    (likeliest,) = few.predict(photos[0]).labels
    matches = few.explain(photos[0])
    assert matches and {m.label for m in matches} <= set(likeliest or few.label_names)
    assert all(m.contribution > 0 and 0 <= m.support < 5 for m in matches)
    assert {cell for m in matches for cell in (*m.query_cell, *m.support_cell)} <= {0, 1}  # a grid of 2 x 2
    # The prior and all pairs make up the score.
    method, trained = few.trained.methods[few.method], saved.trained_of(few.trained, few.method)
    images = classifier._embed_photos(model, few.trained, few.method, photos[:1])
    found = {name: np.asarray(x) for name, x in method.explain(trained, few.state, images).items()}
    score = found["prior"] + np.einsum("qslm,sc->qc", found["pairs"], found["dual"])
    matrix = np.array([[name in photo for name in few.label_names] for photo in labels])
    score = word_ridge.standardised(score, few.state["adapted"].left_out, matrix)
    slope, intercept = few.trained.calibration[few.method]
    np.testing.assert_allclose(few.predict(photos[0]).probabilities, expit(slope * score + intercept), atol=1e-5)
    with pytest.raises(InputError, match="method ridge does not compare regions: fit with one of region_word_ridge"):
        fit(model, *support, method="ridge").explain(photos[0])
