"""Our own model: ridge regression in closed form with a word prior, on pooled features or with a region kernel.

``fit`` once on base images, ``adapt`` to a support set, ``scores`` of queries: no training loop, no threshold on
regions, and labels may be new. Notation: x are centred unit pooled features, z centred local features, y the support's
labels, w word vectors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.core.functional import unit

_SHRINKAGE = 4.0


class Fitted(NamedTuple):
    """Learned from base images: where their features lie, and how words map to linear classifiers."""

    mean: jax.Array  # float [n], mean local feature of the base images
    components: jax.Array  # float [n, d], their d principal directions, in which regions are compared
    words: jax.Array  # float [B, d_w], unit word vectors of the B base labels
    mapping: jax.Array  # float [B, n], from similarity with base words to a classifier; A of ``fit``
    offset: jax.Array  # float [n], the mean classifier; m of ``fit``


class Adapted(NamedTuple):
    """The model adapted to one support set: all that ``scores`` needs."""

    # float [S, n], centred unit pooled features x; or [S, L, d], regions z, where those are compared
    support: jax.Array
    word_vectors: jax.Array  # float [C, d_w]
    beta: float  # weight of the word prior
    dual: jax.Array  # float [S, C], see ``solve``
    left_out: jax.Array  # float [S, C], score of each support image when it is left out of the fit


def fit(
    features, labels, word_vectors, components, *, classifier_regulariser: float = 300.0, word_regulariser: float = 0.1
) -> Fitted:
    """Fits classifiers of the base labels, then a map from their words to them.

    R = (X'X + 300 I)^-1 X'(Y - mean Y); V its unit columns; A = (GG' + 0.1 I)^-1 (V - mean V), G the unit words.

    Args:
      features: float [I, n], pooled features of the base images (means over positions).
      labels: 0/1 [I, B].
      word_vectors: float [B, d_w].
      components: float [n, d], see ``principal_directions``.
      classifier_regulariser: the 300 of R.
      word_regulariser: the 0.1 of A.
    """
    features = jnp.asarray(features, jnp.float32)
    targets = jnp.asarray(labels, features.dtype)
    mean = features.mean(axis=0)
    x = unit(features - mean)
    gram = x.T @ x + classifier_regulariser * jnp.eye(x.shape[1])
    classifiers = jax.scipy.linalg.solve(gram, x.T @ (targets - targets.mean(axis=0)), assume_a="pos")
    classifiers = unit(classifiers.T)  # V, [B, n]
    offset = classifiers.mean(axis=0)
    words = unit(jnp.asarray(word_vectors, features.dtype))
    word_gram = words @ words.T + word_regulariser * jnp.eye(len(words))
    mapping = jax.scipy.linalg.solve(word_gram, classifiers - offset, assume_a="pos")
    return Fitted(mean, jnp.asarray(components, features.dtype), words, mapping, offset)


def principal_directions(local_features, mean, n_components: int = 320) -> np.ndarray:
    """The leading eigenvectors of the local features' covariance: float [I, L, n], [n] -> float32 [n, min(n, d)].

    Cosines between regions are almost the same in these directions as in the full space, and cheaper.
    """
    z = np.asarray(local_features, np.float32).reshape(-1, np.shape(local_features)[-1]) - np.asarray(mean)
    _, vectors = np.linalg.eigh(z.T @ z)
    return np.ascontiguousarray(vectors[:, ::-1][:, :n_components], np.float32)


def word_prior(fitted: Fitted, x, word_vectors, beta: float):
    """p_c = beta (x . W_c - mean over c' of x . W_c'), W_c = (unit(w_c) G') A + m: x [I, n], w [C, d_w] -> [I, C]."""
    classifiers = unit(word_vectors) @ fitted.words.T @ fitted.mapping + fitted.offset
    return centred_prior(x @ classifiers.T, beta)


def centred_prior(logits, beta: float):
    """beta (logit - mean logit over the episode's labels): float [I, C] -> [I, C]."""
    return beta * (logits - logits.mean(axis=1, keepdims=True))


def adapt(fitted: Fitted, pooled, regions, labels, word_vectors, *, beta: float, regulariser: float) -> Adapted:
    """Ridge regression on what the word prior leaves unexplained.

    Args:
      fitted: see ``fit``.
      pooled: float [S, n], of the support.
      regions: float [S, L, d], see ``regions``, to compare images by ``region_kernel``; a region of length 0 is left
        out. None: to compare their pooled features.
      labels: 0/1 [S, C].
      word_vectors: float [C, d_w].
      beta: weight of the prior; with 0 this is plain ridge regression, up to a constant per label.
      regulariser: lambda.
    """
    x = unit(pooled - fitted.mean)
    prior = word_prior(fitted, x, word_vectors, beta)
    if regions is None:
        return Adapted(x, word_vectors, beta, *solve(x @ x.T, prior, labels, regulariser))
    kernel = region_kernel(regions, regions)
    kernel = (kernel + kernel.T) / 2
    return Adapted(regions, word_vectors, beta, *solve(kernel, prior, labels, regulariser))


def scores(fitted: Fitted, adapted: Adapted, pooled, regions=None):
    """Scores of queries: float [Q, n], and [Q, L, d] where regions are compared -> float [Q, C]."""
    x = unit(pooled - fitted.mean)
    kernel = x @ adapted.support.T if regions is None else region_kernel(regions, adapted.support)
    return word_prior(fitted, x, adapted.word_vectors, adapted.beta) + kernel @ adapted.dual


def regions(fitted: Fitted, local_features):
    """Centred local features in the principal directions: float [I, L, n] -> [I, L, d]."""
    return (local_features - fitted.mean) @ fitted.components


def region_kernel(a, b):
    """How well the regions of two images match: (k1 + k2) / 2.

    With lengths r = |z| and directions u = z / r: k1 is the mean, weighted by r, over the regions of either image of
    the best match in the other; k2 the normalised h(i, j) = sum_lm v_il v_jm max(0, u_il . u_jm)^2, v = r^2 / sum r^2.
    ``a`` and ``b`` are centred local features z, float [I, L, d] and [J, L, d]; the result is float [I, J].
    """
    u_a, r_a, v_a = _parts(a)
    u_b, r_b, v_b = _parts(b)

    def with_one(image):  # one image of b at a time: its similarities to all of a fit the cache
        u, r, v = image
        similarity = jnp.einsum("ild,md->ilm", u_a, u)
        # A region that was left out (length 0) must not be a best match.
        best_in_b = jnp.max(similarity, axis=2, where=(r > 0), initial=-1.0)
        best_in_a = jnp.max(similarity, axis=1, where=(r_a > 0)[:, :, None], initial=-1.0)
        k1 = (jnp.sum(r_a * best_in_b, axis=1) + best_in_a @ r) / 2
        return k1, jnp.einsum("il,ilm,m->i", v_a, jnp.maximum(similarity, 0) ** 2, v)

    k1, h = jax.lax.map(with_one, (u_b, r_b, v_b))  # [J, I]
    norm = jnp.sqrt(jax.vmap(_own)(u_a, v_a)[:, None] * jax.vmap(_own)(u_b, v_b))
    return (k1.T + h.T / jnp.maximum(norm, 1e-12)) / 2


def region_pairs(a, b):
    """``region_kernel`` before the sum over pairs of regions: [I, L, d], [J, M, d] -> [I, J, L, M].

    It splits a prediction exactly: a score is the word prior plus the sum over support photos s and regions l and m of
    ``pairs[s, l, m] * adapted.dual[s]``. In k1 a region counts with its best match alone, in k2 with all it resembles.
    Every image of ``a`` needs a region that is not 0.
    """

    def pair(z_a, z_b):
        (u_a, r_a, v_a), (u_b, r_b, v_b) = _parts(z_a), _parts(z_b)
        similarity = u_a @ u_b.T
        best_in_b = jnp.argmax(jnp.where(r_b > 0, similarity, -2.0), axis=1)
        best_in_a = jnp.argmax(jnp.where(r_a[:, None] > 0, similarity, -2.0), axis=0)
        weight = r_a[:, None] * jax.nn.one_hot(best_in_b, len(z_b)) + r_b * jax.nn.one_hot(best_in_a, len(z_a)).T
        h = v_a[:, None] * jnp.maximum(similarity, 0) ** 2 * v_b
        norm = jnp.sqrt(_own(u_a, v_a) * _own(u_b, v_b))
        return (similarity * weight / 2 + h / jnp.maximum(norm, 1e-12)) / 2

    return jax.lax.map(lambda z: jax.vmap(lambda z_b: pair(z, z_b))(b), a)


def _parts(z):
    """Directions u of regions [..., L, d], and the shares r and v of their lengths and squared lengths, [..., L]."""
    length = jnp.sqrt(jnp.sum(z * z, axis=-1))
    return unit(z), _shares(length), _shares(length**2)


def _own(u, v):
    """h of an image with itself: [L, d], [L] -> []."""
    return v @ jnp.maximum(u @ u.T, 0) ** 2 @ v


def _shares(x):
    return x / jnp.maximum(x.sum(axis=-1, keepdims=True), 1e-12)


def left_out_centre(left_out, labels):
    """m_c, float [C]: the mean left-out score, of ``Adapted``, of the support images without label c.

    Where these are few it is shrunk towards the mean over all labels. ``left_out`` and ``labels``, as of ``solve``, are
    [S, C].
    """
    without = (labels == 0).astype(left_out.dtype)
    overall = jnp.sum(without * left_out) / jnp.maximum(without.sum(), 1)
    return (jnp.sum(without * left_out, axis=0) + _SHRINKAGE * overall) / (without.sum(axis=0) + _SHRINKAGE)


def standardised(scores, left_out, labels):
    """Scores in units that mean the same for every label and episode: (s - m_c) / d.

    m_c is that of ``left_out_centre``; d is the spread about it of the left-out scores of support images without the
    label. One slope and one intercept, fitted on validation episodes, make probabilities of them:
    sigmoid(slope * standardised + intercept).

    ``scores`` are float [Q, C], as is the result; ``left_out``, of ``Adapted``, and the support's labels, 0/1, [S, C].
    """
    without, centre = (labels == 0).astype(left_out.dtype), left_out_centre(left_out, labels)
    spread = jnp.sqrt(jnp.sum(without * (left_out - centre) ** 2) / jnp.maximum(without.sum(), 1))
    return (scores - centre) / jnp.maximum(spread, 1e-6)


def solve(kernel, prior, labels, regulariser, inverse_of=jnp.linalg.inv):
    """Ridge regression in the dual: kernel K [S, S], prior p(S) [S, C], labels [S, C], lambda -> dual, left out.

    Labels are 0 or 1; where they are float they may be NaN, unknown: the image is then left out of that label's fit.

    The dual, float [S, C], is (K + lambda I)^-1 (T - mean T) with T = y - p(S); a query scores p(q) + k(q, S) dual. The
    left-out scores, float [S, C], are those of images that the fit has not seen, in closed form: a ridge fit to targets
    t predicts t_i - [G^-1 t]_i / [G^-1]_ii at such an image i, G = K + lambda I. The prediction is linear in t, and so
    is centring by the mean of the others. ``inverse_of`` may be ``inverse_definite`` where no eigenvalue of K is
    negative.
    """
    partial = jnp.issubdtype(labels.dtype, jnp.floating)
    known = (~jnp.isnan(labels) if partial else jnp.ones(len(labels), bool)).astype(kernel.dtype)
    targets = jnp.nan_to_num(labels.astype(kernel.dtype))

    def one(p, y, m):  # of a label, [S]; m is 1 where it is known
        inverse = inverse_of(kernel * m * m[:, None] + regulariser * jnp.eye(len(m), dtype=kernel.dtype))
        t, n = m * (y - p), m.sum()

        def unseen(t):
            return t - inverse @ t / jnp.diag(inverse)

        mean_of_others = (t.sum() - t) / jnp.maximum(n - 1, 1)
        left_out = p + unseen(t) - mean_of_others * unseen(m)
        return inverse @ (t - m * t.sum() / jnp.maximum(n, 1)), left_out

    return jax.vmap(one, in_axes=(1, 1, 1 if partial else None), out_axes=1)(prior, targets, known)
