"""A tiny episode and the papers' models on it, and their parts by hand."""

import jax.numpy as jnp
import numpy as np

from mlfsic_jax.bench.made_up import random_variables
from mlfsic_jax.core.model import BaseModel

S, Q, L, N, D, D_W, C = 5, 4, 3, 6, 8, 5, 3


def episode(seed=0):
    """Support, labels, queries and word vectors."""
    rng = np.random.default_rng(seed)
    support, query = np.abs(rng.normal(size=(S, L, N))), np.abs(rng.normal(size=(Q, L, N)))
    labels = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 1]], bool)
    return *(jnp.asarray(x, jnp.float32) for x in (support, labels, query)), words()


def words():
    return jnp.asarray(np.random.default_rng(9).normal(size=(C, D_W)), jnp.float32)


def build(**options):
    options = {"attention": "standard", "dynamic": False} | options
    model = BaseModel(d_joint=D, n_heads=2, d_dynamic=3, n_dynamic=4, dropout=0.0, scale=7.0, **options)
    support, labels, _, vectors = episode()
    photos = support[:, None]
    return model, random_variables(model, photos, photos, labels, labels, vectors)


def by_hand(model, variables, support, labels, query, vectors, keep=None):
    """Probabilities of the queries by prototypes of the support's regions, which ``keep`` selects."""
    regions, texts = model.apply(variables, support, method="regions"), model.apply(variables, vectors, method="words")
    prototypes = np.asarray(model.apply(variables, regions, labels, texts, keep, method="prototypes"))
    images = np.asarray(query.mean(axis=1) @ variables["params"]["joint"]["a_visual"]["kernel"])
    return 1 / (1 + np.exp(-7 * unit(images) @ unit(prototypes).T))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cm_loss_and_gradient(a_visual, a_text, pooled, labels, vectors, scale=7.0):
    """The CM loss, and its gradient by the chain rule through the two normalisations; float64."""
    images, texts = pooled @ a_visual, vectors @ a_text
    x, w = unit(images), unit(texts)
    logits = scale * x @ w.T
    loss = (np.logaddexp(0, logits) - labels * logits).sum()
    residual = scale * (1 / (1 + np.exp(-logits)) - labels)  # [S, C]
    d_x, d_w = residual @ w, residual.T @ x
    d_images = (d_x - (d_x * x).sum(1, keepdims=True) * x) / np.linalg.norm(images, axis=1, keepdims=True)
    d_texts = (d_w - (d_w * w).sum(1, keepdims=True) * w) / np.linalg.norm(texts, axis=1, keepdims=True)
    return loss, pooled.T @ d_images, vectors.T @ d_texts


def adam_by_hand(variables, support, labels, vectors, epochs, rate):
    """A_visual, A_text and the losses before every step and after the last."""
    joint = variables["params"]["joint"]
    weights = [np.asarray(joint[name]["kernel"], np.float64) for name in ("a_visual", "a_text")]
    pooled, labels, vectors = (np.asarray(x, np.float64) for x in (support.mean(axis=1), labels, vectors))
    first, second, losses = [0.0, 0.0], [0.0, 0.0], []
    for t in range(1, epochs + 1):
        loss, *gradients = cm_loss_and_gradient(*weights, pooled, labels, vectors)
        losses.append(loss)
        for i, g in enumerate(gradients):
            first[i], second[i] = 0.9 * first[i] + 0.1 * g, 0.999 * second[i] + 0.001 * g**2
            step = first[i] / (1 - 0.9**t) / (np.sqrt(second[i] / (1 - 0.999**t)) + 1e-8)
            weights[i] = weights[i] - rate * step
    return weights, [*losses, cm_loss_and_gradient(*weights, pooled, labels, vectors)[0]]
