"""Names by CLIP through the contract of a method; ``test_contract`` has those by a classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax.core import word_ridge
from mlfsic_jax.data.features import View
from mlfsic_jax.methods import METHODS, create

IMAGES, L, N, C = 40, 5, 12, 3  # the first position is the class token


@pytest.fixture(scope="module")
def view():
    """The class token has the direction of an image's label, its text's, by a tenth, as photos have in CLIP's space."""
    rng = np.random.default_rng(0)
    labels = np.eye(C, dtype=bool)[np.arange(IMAGES) % C]
    *texts, common = np.linalg.qr(rng.normal(size=(N, C + 1)))[0].T.astype(np.float32)
    texts = np.stack(texts)
    local = rng.normal(size=(IMAGES, 1, L, N)).astype(np.float32)
    local[:, 0, 0] += 20 * labels @ texts + 200 * common
    proj = np.eye(N, dtype=np.float32)
    return View(local.__getitem__, labels, None, ("",) * C, head=lambda: {"proj": proj}, named_vectors=lambda _: texts)


def fitted(view, name, n_support=6):
    method = create(name).explaining()
    trained = method.train(jax.random.key(0), view)
    images = method.embed(trained, jnp.asarray(view.inputs(np.arange(IMAGES))[:, 0]))
    support, query = ({key: x[part] for key, x in images.items()} for part in np.s_[:n_support, n_support:])
    labels = jnp.asarray(view.labels[:n_support])
    return method, trained, method.fit(trained, support, labels, jnp.asarray(view.words("classes"))), query


@pytest.mark.parametrize("name", ["class_words", "class_word_ridge"])
def test_texts_tell_the_labels_and_scores_are_sums(view, name):
    method, trained, state, query = fitted(view, name)
    scores = method.score(trained, state, query)
    np.testing.assert_array_equal(scores.argmax(axis=1), view.labels[6:].argmax(axis=1))
    parts = method.explain(trained, state, query)
    assert parts.keys() == {"prior", "pairs", "dual"}
    expected = parts["prior"] + np.einsum("qslm,sc->qc", parts["pairs"], parts["dual"])
    if method.adapts:
        expected -= word_ridge.left_out_centre(state["fit"].left_out, view.labels[:6])
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_wrong_names_are_not_used(view):
    assert fitted(view, "class_word_ridge")[2]["fit"].beta == 1
    assert fitted(view, "class_word_ridge_permuted")[2]["fit"].beta == 0


def test_methods_that_embed_alike_share_it(view):
    trained = METHODS["class_words"].train(jax.random.key(0), view)
    keys = {METHODS[name].embed_key(trained) for name in ("class_words", "class_word_ridge")}
    assert len(keys) == 1
