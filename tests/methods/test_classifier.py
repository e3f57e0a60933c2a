"""The linear layer against PyTorch's autograd and Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax.core.metrics import multilabel_metrics
from mlfsic_jax.data.features import View
from mlfsic_jax.methods import classifier, create
from mlfsic_jax.methods.closed_form import centred_unit
from tests.methods.episode import episode_scores


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 6, 5)).astype(np.float32), (rng.random((7, 6, 3)) < 0.4).astype(np.float32)


@pytest.mark.extras
def test_the_fit_is_that_of_pytorch(batches):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(5, 3)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for x, y in zip(*map(torch.tensor, batches), strict=True):
        optimizer.zero_grad()
        torch.nn.BCEWithLogitsLoss()(layer(x), y).backward()
        optimizer.step()

    @jax.jit
    def fit(x, y):
        return classifier.fit_linear(lambda e: (x[e], y[e]), 5, 3, epochs=7, learning_rate=0.05)

    weights, bias = fit(*batches)
    # both float32; seven steps of at most 0.05 each
    np.testing.assert_allclose(weights.T, layer.weight.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(bias, layer.bias.detach().numpy(), atol=1e-5)


def test_features_are_means_of_local_features_centred_by_the_base_images(batches):
    rng = np.random.default_rng(1)
    local = rng.normal(size=(300, 2, 2, 5)).astype(np.float16)  # more than are read at once
    base = View(local.__getitem__, np.ones((300, 1), bool), np.zeros((1, 2)), ("a",))
    trained = create("classifier").train(jax.random.key(0), base)
    mean = trained["mean"]
    np.testing.assert_allclose(mean, local.astype(np.float64).mean(axis=(0, 1, 2)), atol=1e-6)
    centred = local[:4].astype(np.float64).mean(axis=(1, 2)) - mean
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    images = create("classifier").embed(trained, jnp.asarray(local[:4], jnp.float32).reshape(4, 4, 5))
    got = centred_unit(trained, images)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_score_is_the_fitted_layer_on_the_queries():
    rng = np.random.default_rng(2)
    support, query = rng.normal(size=(6, 4, 5)), rng.normal(size=(3, 4, 5))
    labels, mean = rng.random((6, 2)) < 0.5, rng.normal(size=5).astype(np.float32)
    got = episode_scores(create("classifier", epochs=30), {"mean": mean}, support, labels, query)

    def features(x):
        x = x.mean(axis=1) - mean
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    w, b, m, v = np.zeros((5, 2)), np.zeros(2), 0, 0
    for t in range(1, 31):  # Adam in a loop
        residual = (1 / (1 + np.exp(-(features(support) @ w + b))) - labels) / labels.size
        gradient = np.concatenate([features(support).T @ residual, residual.sum(axis=0)[None]])
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        step = 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w, b = w - step[:-1], b - step[-1]
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-(features(query) @ w + b))), atol=1e-4)  # float32


def base_of(n_images=60):
    """Images whose labels are in the signs of two directions, which other directions drown."""
    rng = np.random.default_rng(3)
    local = rng.normal(size=(n_images, 2, 2, 12))
    local[..., 2:] *= 3
    labels = local.mean(axis=(1, 2))[:, :2] > 0
    return View(local.astype(np.float32).__getitem__, labels, np.zeros((2, 2)), ("a", "b")), local, labels


def test_the_hidden_layer_is_trained_on_base_labels(monkeypatch):
    base, local, labels = base_of()
    options = {"width": 7, "training_steps": 100, "batch_size": 16}
    drawn = []

    def spy(loss, params, data, draw, **options):
        drawn.append(draw(0))
        return adam_in_chunks(loss, params, data, draw, **options)

    adam_in_chunks = classifier.adam_in_chunks
    monkeypatch.setattr(classifier, "adam_in_chunks", spy)
    slow, fast = (
        create("classifier_pretrained", **options, training_learning_rate=rate).train(jax.random.key(0), base)
        for rate in (1e-30, 0.01)
    )
    np.testing.assert_array_equal(*drawn)
    assert np.shape(drawn[0]) == (100, 16)

    pooled = local.mean(axis=(1, 2))
    centred = pooled - pooled.mean(axis=0)
    x = centred / np.linalg.norm(centred, axis=1, keepdims=True) * np.sqrt(12)
    w, b = (np.asarray(slow["hidden"][name], np.float64) for name in ("weights", "bias"))  # the start
    np.testing.assert_array_equal(b, 0)
    params, m, v = [w, b, np.zeros((7, 2)), np.zeros(2)], [0] * 4, [0] * 4
    for t, rows in enumerate(np.asarray(drawn[0]), 1):  # Adam in a loop
        h = np.maximum(x[rows] @ params[0] + params[1], 0)
        residual = (1 / (1 + np.exp(-(h @ params[2] + params[3]))) - labels[rows]) / (16 * 2)
        back = (residual @ params[2].T) * (h > 0)
        gradients = [x[rows].T @ back, back.sum(axis=0), h.T @ residual, residual.sum(axis=0)]
        for i, g in enumerate(gradients):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
            params[i] = params[i] - 0.01 * (m[i] / (1 - 0.9**t)) / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(fast["hidden"]["weights"], params[0], atol=2e-4)  # float32
    np.testing.assert_allclose(fast["hidden"]["bias"], params[1], atol=2e-4)
    expected = np.maximum(x @ params[0] + params[1], 0)
    np.testing.assert_allclose(fast["mean"], expected.mean(axis=0), atol=2e-3)
    regions = jnp.asarray(local, jnp.float32).reshape(-1, 4, 12)
    got = create("classifier_pretrained", **options).embed(fast, regions)
    np.testing.assert_allclose(got["pooled"], expected, atol=5e-3)


def test_training_on_base_labels_finds_what_new_labels_need():
    base, *_ = base_of(n_images=400)
    rng = np.random.default_rng(4)
    support, query = rng.normal(size=(2, 60, 4, 12))
    for local in (support, query):
        local[..., 2:] *= 3
    y, truth = (local.mean(axis=1)[:, :2] @ [[1, 1], [1, -1]] > 0 for local in (support, query))  # others of the same
    found = {}
    for name, options in (("classifier", {}), ("classifier_pretrained", {"width": 32, "training_learning_rate": 0.01})):
        method = create(name, **options)
        scores = episode_scores(method, method.train(jax.random.key(0), base), support, y, query)
        found[name] = multilabel_metrics(scores[None], truth[None])["macro_ap"][0]
    assert found["classifier_pretrained"] > found["classifier"] + 0.05
