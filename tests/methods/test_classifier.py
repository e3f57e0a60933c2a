"""The linear layer against PyTorch's autograd and Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
