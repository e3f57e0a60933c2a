"""Ridge regression with a word prior: its control. Its equations are tested in core."""

import jax.numpy as jnp
import numpy as np

from mlfsic_jax.core import word_ridge
from mlfsic_jax.methods import create
from tests.methods.episode import episode_scores


def test_permuted_words_are_those_of_the_next_label():
    rng = np.random.default_rng(0)
    base, words = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((40, 6), (3, 5)))
    labels = rng.random((40, 4)) < 0.4
    base_words = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    options = {"classifier_regulariser": 1.0, "word_regulariser": 0.1}
    trained = word_ridge.fit(base, labels, base_words, jnp.eye(6)[:, :2], **options)._asdict()
    support, query = rng.normal(size=(6, 1, 6)), rng.normal(size=(5, 1, 6))
    shown = np.tile(np.eye(3, dtype=bool), (2, 1))

    def scores(name, words):
        return episode_scores(create(name), trained, support, shown, query, words)

    permuted = scores("word_ridge_permuted_words", words)
    np.testing.assert_array_equal(permuted, scores("word_ridge", words[jnp.array([2, 0, 1])]))
    assert np.abs(permuted - scores("word_ridge", words)).max() > 0.01
