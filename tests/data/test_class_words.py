"""Labels as mixtures of ImageNet's classes: the shipped facts and vectors, and the regression between texts."""

import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge

from mlfsic_jax.data import class_words
from mlfsic_jax.system.errors import InputError


def test_what_is_shipped_is_small_and_complete():
    folder = Path(class_words.__file__).parent
    names = ("class_texts.json", "class_vectors.safetensors", "backbone_means.safetensors")
    assert sum((folder / name).stat().st_size for name in names) < 2e6
    assert len(class_words.class_names()) == 1000 and class_words.class_names()[207] == "golden retriever"
    assert class_words.class_vectors().shape == (2, 1000, 384)
    np.testing.assert_allclose(np.linalg.norm(class_words.class_vectors(), axis=2), 1, atol=1e-6)


def test_the_vectors_are_those_of_the_texts():
    """Where the encoder is at hand: float16, so to 1e-3."""
    folder = Path(os.environ.get("MLFSIC_MINILM", "data/minilm"))
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{folder} is not there: set MLFSIC_MINILM to a folder with MiniLM")
    from mlfsic_jax.data.minilm import encode_texts

    with_gloss, by_lemma = class_words.prompts()
    some = range(0, 1000, 50)
    found = encode_texts([with_gloss[i] for i in some], folder)
    np.testing.assert_allclose(found, class_words.class_vectors()[0, some], atol=1e-3)
    for i in some:
        mean = encode_texts(by_lemma[i], folder).mean(axis=0)
        np.testing.assert_allclose(mean / np.linalg.norm(mean), class_words.class_vectors()[1, i], atol=1e-3)


def test_texts_have_lemma_and_gloss():
    with_gloss, by_lemma = class_words.prompts()
    assert with_gloss[207].startswith("a photo of a golden retriever: an English breed having")
    assert by_lemma[404] == ["a photo of a airliner"]


@pytest.mark.parametrize(
    ("labels", "without", "gone", "stay"),
    [
        (["dog"], "kinds", ["golden retriever", "pug"], ["dogsled", "hotdog", "timber wolf", "tabby"]),
        (["Dog"], "names", ["golden retriever", "hotdog"], ["timber wolf"]),  # WordNet calls it a hot dog too
        (["sofa"], "kinds", ["studio couch"], ["rocking chair"]),
        (["bird", "boat"], "kinds", ["cock", "ostrich", "gondola"], ["airliner", "paddle"]),
        (["golden_retriever"], "kinds", ["golden retriever"], ["Labrador retriever"]),
        (["dog"], "", [], ["golden retriever"]),
    ],
)
def test_classes_that_are_left_out(labels, without, gone, stay):
    leave, names = class_words.left_out(labels, without), class_words.class_names()
    out = {name for name, is_out in zip(names, leave, strict=True) if is_out}
    assert out >= set(gone) and out.isdisjoint(stay)


def test_names_leaves_out_more_than_kinds():
    kinds, names = (class_words.left_out(["boat", "train"], without) for without in ("kinds", "names"))
    assert (names & ~kinds).any() and not (kinds & ~names).any()
    with pytest.raises(ValueError, match="none of"):
        class_words.left_out(["boat"], "everything")


def vectors(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_mixtures_are_kernel_ridge_regression():
    """exp(5 (u.v - 1)) is scikit-learn's RBF kernel with gamma 2.5 on vectors of length 1."""
    rng = np.random.default_rng(0)
    classes, labels, leave = vectors(rng, 2, 9, 5), vectors(rng, 3, 5), np.arange(9) == 4
    found = class_words.mixtures(labels, leave, classes)
    for source in range(2):
        model = KernelRidge(alpha=0.1, kernel="rbf", gamma=2.5).fit(classes[source, ~leave], np.eye(8))
        np.testing.assert_allclose(found[:, source, ~leave], model.predict(labels), atol=1e-5)
    assert not found[:, :, 4].any()


def test_word_vectors_stand_in_for_the_encoder(tmp_path):
    """The mean over those lemmas that the file has, of each the mean over its words."""
    path = tmp_path / "glove.6B.50d.txt"
    path.write_text("golden 3 0 0\nretriever 1 4 0\nairliner 0 0 2\ntabby 0 1 0\ncat 2 1 0\n")
    found, unknown = class_words.class_vectors_of_words(path)
    assert found.shape == (1, 1000, 3) and not unknown[[207, 281, 404]].any() and unknown.sum() > 900
    np.testing.assert_allclose(found[0, 207], np.array([2, 2, 0]) / 8**0.5, atol=1e-6)
    np.testing.assert_allclose(found[0, 404], [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(found[0, 281], np.array([1, 2, 0]) / 5**0.5, atol=1e-6)  # tabby, tabby cat
    assert not found[0, unknown].any()
    (tmp_path / "none.txt").write_text("zzz 1 2\n")
    with pytest.raises(InputError, match="none.txt has no word of ImageNet's classes: use"):
        class_words.class_vectors_of_words(tmp_path / "none.txt")


def test_a_class_reaches_itself_and_vectors_of_another_encoder_are_refused():
    some = class_words.class_vectors()[1, [3, 404, 951]]
    assert list(class_words.mixtures(some)[:, 1].argmax(axis=1)) == [3, 404, 951]
    with pytest.raises(InputError, match="vectors of 300 numbers"):
        class_words.mixtures(np.ones((2, 300)))
