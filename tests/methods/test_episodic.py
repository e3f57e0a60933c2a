"""Words alone and Base through their contract, against the same by hand."""

import dataclasses

import jax
import numpy as np

from mlfsic_jax.data.features import View
from mlfsic_jax.methods import create
from tests.methods.episode import episode_scores
from tests.methods.papers import D_W, C, D, N, build, by_hand, episode, unit, words


def test_words_alone_score_by_cosine_and_ignore_the_support():
    model, variables = build()
    support, labels, query, vectors = episode(4)
    joint = {name: np.asarray(layer["kernel"]) for name, layer in variables["params"]["joint"].items()}
    images, texts = np.asarray(query).mean(axis=1) @ joint["a_visual"], np.asarray(vectors) @ joint["a_text"]
    zero_shot, trained = create("zero_shot", model=model), {"variables": variables}
    got = episode_scores(zero_shot, trained, support, labels, query, vectors)
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-7 * unit(images) @ unit(texts).T)), atol=1e-5)
    other = episode_scores(zero_shot, trained, 2 + support, 1 - labels, query, vectors)
    np.testing.assert_array_equal(got, other)


def test_base_scores_by_prototypes_of_all_regions():
    model, variables = build(attention="channelwise", dynamic=True)
    arrays = episode(5)
    got = episode_scores(create("base", model=model), {"variables": variables}, *arrays)
    np.testing.assert_allclose(got, by_hand(model, variables, *arrays), atol=1e-5)


def test_without_episodes_a_model_is_untrained():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 2, 3, N)).astype(np.float16)
    base = View(features.__getitem__, np.eye(4, C, dtype=bool), np.asarray(words()), ("a", "b", "c"))
    method = create("base", model=dataclasses.replace(build()[0], anchor=True, attention="channelwise"))
    first, again, other = (method.train(jax.random.key(i), base)["variables"]["params"] for i in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    a_visual, a_text = (np.asarray(first["joint"][name]["kernel"]) for name in ("a_visual", "a_text"))
    np.testing.assert_allclose(a_visual @ a_visual.T, np.eye(N), atol=1e-5)  # the orthogonal start of an anchor
    assert a_text.shape == (D_W, D) and not np.allclose(a_text, other["joint"]["a_text"]["kernel"])
    assert first["prototype"]["attention"]["mlp_gate"] == 0
