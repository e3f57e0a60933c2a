"""The simulation of labelling, on made-up photos whose labels can be learned."""

import numpy as np
import pytest

from mlfsic_jax import label_order
from mlfsic_jax.bench import made_up
from mlfsic_jax.system.errors import InputError


def case(n=400, n_labels=3, n_features=16, n_classes=12):
    rng = np.random.default_rng(0)
    labels = rng.random((n, n_labels)) < 0.4
    labels[~labels.any(axis=1), 0] = True
    x = rng.normal(size=(n, n_features)) + 2 * labels @ rng.normal(size=(n_labels, n_features))
    z = rng.normal(size=(n, n_classes))
    features = {
        name: (a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float16)
        for name, a in zip("xl", (x, z), strict=True)
    }
    return features, labels, rng.random((n_labels, 2 * n_classes)).astype(np.float32)


@pytest.fixture(scope="module")
def trial():
    features, labels, words = case()
    return label_order.Trial(features, labels, ("a", "b", "c"), words)


@pytest.fixture(scope="module")
def predictor():
    return made_up.class_word_model(16, 12)


@pytest.mark.parametrize("name", label_order.ORDERS)
def test_every_order_decides_other_photos_each_time_and_learns(trial, predictor, name):
    looked_at = []

    def order(p, decided, rng):
        np.testing.assert_array_equal(decided, trial.labels[looked_at].reshape(-1, 3))
        value = label_order.ORDERS[name](p, decided, rng)
        assert value.shape == (250,) and np.isfinite(value).all()
        value = value.astype(float)
        value[looked_at] = -np.inf
        looked_at.append(int(value.argmax()))
        return value

    found = np.array(label_order.label(predictor, trial, order, np.random.default_rng(0)))
    assert found.shape == (5, 2) and len(set(looked_at)) == len(looked_at) == 40
    assert found[-1, 0] > found[0, 0] + 10  # the words are random, the features are not
    assert ((found >= 0) & (found <= 100)).all()


def test_draws_have_every_label_on_both_sides():
    features, labels, words = case(500)
    draws = list(label_order._draw(features, labels, ("a", "b", "c"), words, 0, 3))
    assert len(draws) == 3
    for draw in draws:
        assert draw.labels[:250].any(axis=0).all() and draw.labels[250:].any(axis=0).all()
        assert draw.labels.any(axis=1).all() and draw.features["x"].shape == (400, 16)
        column = [("a", "b", "c").index(name) for name in draw.names]
        np.testing.assert_array_equal(draw.words, words[column])
    with pytest.raises(InputError, match="too few photos"):
        list(label_order._draw({}, labels[:399], ("a", "b", "c"), words, 0, 1))
