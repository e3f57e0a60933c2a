"""Training-free peers on global features: prototypes and ridge regression."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlfsic_jax.core.functional import cosine_logits


def prototypes(support, labels, query, *, scale: float = 10.0):
    """sigmoid(scale * cos(query, mean of the support images that have the label)), ProtoNet with cosine.

    Args:
      support: float [S, n], global features.
      labels: bool [S, C].
      query: float [Q, n].
      scale: lambda; it only places the 0.5 threshold, so precision, recall and F1 are not tuned.

    Returns:
      float [Q, C].
    """
    means = labels.astype(support.dtype).T @ support  # the sum: cosine does not see the count
    return jax.nn.sigmoid(cosine_logits(query, means, scale))


def ridge(support, labels, query, *, regulariser: float = 1.0):
    """Ridge regression onto centred targets, one output per label, in closed dual form.

    X_q X' (X X' + regulariser I)^-1 (Y - mean Y) + mean Y. A prediction may leave [0, 1]: clip it where a probability
    is shown; neither AP nor the 0.5 threshold needs that.

    Args:
      support: float [S, n], centred unit features.
      labels: bool [S, C].
      query: float [Q, n].
      regulariser: lambda.

    Returns:
      float [Q, C].
    """
    targets = labels.astype(support.dtype)
    mean = targets.mean(axis=0)
    kernel = support @ support.T + regulariser * jnp.eye(len(support), dtype=support.dtype)
    dual = jax.scipy.linalg.solve(kernel, targets - mean, assume_a="pos")
    return query @ (support.T @ dual) + mean
