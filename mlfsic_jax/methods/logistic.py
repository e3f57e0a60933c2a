"""Logistic regression with an L2 penalty, one per label: convex, solved by Newton's method."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.core.functional import binary_cross_entropy
from mlfsic_jax.core.options import positive, require
from mlfsic_jax.methods.classifier import LinearLayer
from mlfsic_jax.methods.closed_form import centred_unit

_STEP_SIZES = 0.5 ** np.arange(12, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Logistic(LinearLayer):
    """One regression per label on centred unit features."""

    sections: ClassVar[tuple[str, ...]] = ("logistic",)
    needs_contrast: ClassVar[bool] = True

    inverse_regulariser: float = 100.0  # C, as in scikit-learn; ours, chosen on validation labels

    def __post_init__(self):
        super().__post_init__()
        require(self, **positive(self, "inverse_regulariser"))

    def fit(self, trained, images, labels, words):
        x = centred_unit(trained, images)
        solve = jax.vmap(lambda y: newton(x @ x.T, y, inverse_regulariser=self.inverse_regulariser))
        dual, bias = solve(labels.T)
        return x.T @ dual.T, bias


def newton(kernel, labels, *, inverse_regulariser: float, iterations: int = 20):
    """Minimises |w|^2 / 2 + C sum_i loss(w . x_i + b, y_i) in the dual, w = X'a: K [S, S], y 0/1 [S] -> a [S], b [].

    b is not penalised. A Newton step is a weighted ridge regression: (K + (C W)^-1) a + b = f + (y - p) / W, sum a = 0,
    W = p (1 - p). The step is halved until it does not raise the loss.
    """
    c, y = inverse_regulariser, labels.astype(kernel.dtype)

    def loss(a, b):
        f = kernel @ a + b
        return a @ (f - b) / 2 + c * binary_cross_entropy(f, y).sum()

    def step(state, _):
        a, b = state
        f = kernel @ a + b
        p = jax.nn.sigmoid(f)
        root = jnp.sqrt(jnp.maximum(p * (1 - p), 1e-10))  # W is smallest where the fit is surest
        # (K + (C W)^-1)^-1 = root (I / C + root K root)^-1 root, whose inner matrix is well conditioned.
        inner = jnp.eye(len(y), dtype=f.dtype) / c + root[:, None] * kernel * root
        sides = jnp.stack([root * f + (y - p) / root, root], axis=1)
        by_target, by_one = (root[:, None] * jax.scipy.linalg.solve(inner, sides, assume_a="pos")).T
        b_new = by_target.sum() / by_one.sum()
        direction = (by_target - b_new * by_one - a, b_new - b)
        tried = [x + _STEP_SIZES.reshape(-1, *[1] * x.ndim) * d for x, d in zip(state, direction, strict=True)]
        fits = jax.vmap(loss)(*tried) <= loss(a, b) * (1 + 1e-6)  # the last steps change less than float32 resolves
        first = jnp.argmax(fits)
        return tuple(jnp.where(fits.any(), t[first], x) for t, x in zip(tried, state, strict=True)), None

    start = (jnp.zeros_like(y), jnp.zeros((), kernel.dtype))
    return jax.lax.scan(step, start, length=iterations)[0]
