"""Classification by name: a prior for any labels from the classifier that a backbone was trained with, then ridge.

A label is a mixture of the classifier's classes, by how near their texts are; so it has a direction among the features
and one among the logits. With CLIP it has the direction of its own text. A few photos correct it, or overrule it.
Notation: H the unit rows of W - mean row, W [K, n] the classifier's weights; x and l of ``embed``; D and A of
``directions``; y the support's labels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlfsic_jax.core import clip
from mlfsic_jax.core.functional import inverse_definite, unit
from mlfsic_jax.core.word_ridge import solve

LOGITS = 1.25  # weight of l.A beside x.D
# CLIP's cosines of photos with texts that fit and with others differ by some 0.07, p of a classifier by 0.5.
_COSINES = 7.0
# Spread of p over photos and labels: 0.12 to 0.20 for names of VOC's and COCO's train and validation labels, 0.06 to
# 0.11 for made-up words.
LEAST_SPREAD = 0.12
# On validation labels of VOC and COCO sigmoid(12.3 p - 3.4) fits a label alone, sigmoid(17.2 p - 2.56) six together.
_SINGLE = (12.3 / 17.2, (2.56 - 3.4) / 17.2)


class Fit(NamedTuple):
    """What ``scores`` needs, from a support set."""

    directions: tuple[jax.Array, jax.Array]  # D and A
    beta: jax.Array  # float [], 1 where the prior helps, else 0
    support: jax.Array  # float [S, n], x of the support
    dual: jax.Array  # float [S, C], see ``word_ridge.solve``
    left_out: jax.Array  # float [S, C], score of each support image when it is left out of the fit


def embed(weight, bias, mean, mean_logits, features):
    """x and l of local features float [I, L, n]: what an image is made of, and what its regions may be.

    x = unit(mean over positions - ``mean``), [I, n]; l = unit(max over positions of logits - ``mean_logits``), [I, K].
    """
    logits = (features @ weight.T + bias).max(axis=1)
    return unit(features.mean(axis=1) - mean), unit(logits - mean_logits)


def embed_clip(pooling, mean, mean_pooled, features):
    """x of ``embed``, and for l the image in the space of CLIP's texts less the mean there, [I, e]: ``clip.pool``."""
    return unit(features.mean(axis=1) - mean), clip.pool(pooling, features) - mean_pooled


def directions_clip(texts, n):
    """D [C, n] and A [C, e] with which p is a multiple of CLIP's cosines; ``texts`` are float [C, e] of length 1."""
    return jnp.zeros((len(texts), n), texts.dtype), _COSINES / LOGITS * texts


def directions(weight, mixtures):
    """D [C, n] and A [C, K]: labels as unit directions among features, and as mixtures of classes.

    With a_s of ``mixtures``, float [C, s, K], one for each source of texts: D = sum_s a_s H / |a_s H|,
    A = sum_s a_s / |a_s H|, both divided by |D|.
    """
    by_source = mixtures @ unit(weight - weight.mean(axis=0))  # a_s H, [C, s, n]
    length = jnp.maximum(jnp.linalg.norm(by_source, axis=-1, keepdims=True), 1e-12)
    d, a = (by_source / length).sum(axis=1), (mixtures / length).sum(axis=1)
    norm = jnp.maximum(jnp.linalg.norm(d, axis=-1, keepdims=True), 1e-12)
    return d / norm, a / norm


def prior(directions, x, logits):
    """p_c = x.D_c + 1.25 l.A_c, minus its mean over the labels: [I, n], [I, K] -> [I, C].

    A single label has none to be compared with: its p is brought to the scale of the others.
    """
    d, a = directions
    p = x @ d.T + LOGITS * (logits @ a.T)
    return p - p.mean(axis=1, keepdims=True) if p.shape[1] > 1 else _SINGLE[0] * p + _SINGLE[1]


def parts_of(mean, features):
    """x as a sum over regions: [I, L, n]."""
    parts = (features - mean) / features.shape[1]
    return parts / jnp.maximum(jnp.linalg.norm(parts.sum(axis=1, keepdims=True), axis=-1, keepdims=True), 1e-12)


def by_region(weight, bias, mean, mean_logits, directions, features):
    """x and the prior, before its mean over labels is taken off, as sums over regions: [I, L, n] and [I, L, C].

    A logit counts for the region where it is highest; the constant part of either is spread evenly. Arguments as of
    ``embed`` and ``prior``.
    """
    d, a = directions
    parts = parts_of(mean, features)
    logits = features @ weight.T + bias
    highest = logits.max(axis=1, keepdims=True)
    first = jnp.arange(logits.shape[1])[:, None] == logits.argmax(axis=1)[:, None]
    spread = jnp.where(first, highest, 0) - mean_logits / logits.shape[1]
    spread /= jnp.maximum(jnp.linalg.norm(highest - mean_logits, axis=-1, keepdims=True), 1e-12)
    return parts, parts @ d.T + LOGITS * (spread @ a.T)


def fit(
    directions, x, logits, labels, *, regulariser: float, gated: bool = True, least_spread: float = LEAST_SPREAD
) -> Fit:
    """Ridge regression on what beta times the prior leaves unexplained.

    beta is 1, or with ``gated`` 0 in two cases. Words that mean something else: the squared error on left-out support
    images is smaller without the prior, by more than half its standard error over images, since a handful of images may
    favour that by chance. Words that mean nothing to the text encoder: the prior hardly tells support images and labels
    apart although every label has an image. Without images beta is 1.

    Args:
      directions: D and A.
      x: float [S, n], of the support.
      logits: float [S, K], its l.
      labels: [S, C] as of ``word_ridge.solve``: NaN where they are unknown.
      regulariser: lambda.
      gated: whether beta is chosen.
      least_spread: root mean square of the prior over n known images and C labels, times sqrt(C / (C - 1)) as its mean
        over labels is 0, below which it says nothing; of few images 1 - 1 / sqrt(n C) of that.
    """
    p, y = prior(directions, x, logits), labels.astype(x.dtype)
    if not len(x):
        return Fit(directions, jnp.ones((), x.dtype), x, y, y)
    betas = jnp.array([1.0, 0.0] if gated else [1.0], x.dtype)
    dual, left_out = jax.vmap(lambda beta: solve(x @ x.T, beta * p, labels, regulariser, inverse_definite))(betas)
    best = 0
    if gated:
        known = ~jnp.isnan(y).all(axis=1)
        worse = _worse(*jnp.nansum((left_out - y) ** 2, axis=2), known)
        # Less where few images tell the spread: to lose right names costs more than to keep others.
        least = least_spread * (1 - 1 / jnp.sqrt(jnp.maximum(known.sum(), 1) * p.shape[1]))
        # Where a label has no example yet, as in the first minutes of the app, photos of few kinds have a small spread.
        complete = (y > 0).any(axis=0).all()
        best = (worse | (complete & (_spread(p, known) < least))).astype(int)
    return Fit(directions, betas[best], x, dual[best], left_out[best])


def _spread(p, known):
    """Root mean square over known images and labels, as if its mean over labels had not been taken off."""
    if p.shape[1] == 1:  # which is on another scale
        return jnp.inf
    total = jnp.where(known[:, None], p**2, 0).sum() / (p.shape[1] - 1)
    return jnp.where(known.any(), jnp.sqrt(total / jnp.maximum(known.sum(), 1)), jnp.inf)


def _worse(a, b, known):
    """Whether the errors a exceed b by more than half the standard error of that; all [S], of known images."""
    n, difference = known.sum(), jnp.where(known, a - b, 0)
    mean = difference.sum() / jnp.maximum(n, 1)
    variance = jnp.where(known, (difference - mean) ** 2, 0).sum() / jnp.maximum(n - 1, 1)
    return (n > 1) & (mean > jnp.sqrt(variance / jnp.maximum(n, 1)) / 2)


def scores(fitted: Fit, x, logits):
    """beta p(q) + x(q) X_S' dual: float [Q, n], [Q, K] -> [Q, C]."""
    return fitted.beta * prior(fitted.directions, x, logits) + x @ fitted.support.T @ fitted.dual
