"""WGA (Yan et al. 2022, AAAI), the Base model's predecessor, with its optional fine-tuning in the test phase.

WGA itself is ``BaseModel(attention="standard", dynamic=False)``, trained as the Base model is: its attention has layers
for keys and values, and there is no dynamic convolution. Fine-tuning works on any ``BaseModel``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlfsic_jax.core.functional import binary_cross_entropy, cosine_logits
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.methods._training import adam


def fine_tune(
    model: BaseModel,
    variables,
    support_features,
    labels,
    word_vectors,
    *,
    epochs: int = 40,
    learning_rate: float = 1e-4,
):
    """Fits A_visual and A_text to the support of a test episode with the CM loss (WGA, "Fine-Tuning" and table 6).

    The paper says neither for how long nor how; here it is Adam, one step on the whole support an epoch, as many epochs
    as the paper gives its baselines.

    Args:
      model: the model.
      variables: its parameters and batch statistics.
      support_features: float [S, L, n], local features as the backbone has them.
      labels: 0/1 or bool [S, C].
      word_vectors: float [C, d_w].
      epochs: how many; 0 changes nothing.
      learning_rate: of Adam.

    Returns:
      ``variables`` with another A_visual and A_text.
    """
    pooled = support_features.mean(axis=1, keepdims=True)  # [S, 1, n]

    def replaced(joint):
        return variables | {"params": variables["params"] | {"joint": joint}}

    def cm_loss(joint, _):
        images = model.apply(replaced(joint), pooled, method="regions")[:, 0]
        words = model.apply(replaced(joint), word_vectors, method="words")
        return binary_cross_entropy(cosine_logits(images, words, model.scale), labels).sum()  # eq 3

    joint, _ = adam(cm_loss, variables["params"]["joint"], jnp.arange(epochs), learning_rate=learning_rate)
    return replaced(joint)


def score(
    model: BaseModel,
    variables,
    support_features,
    labels,
    query_features,
    word_vectors,
    *,
    epochs: int = 40,
    learning_rate: float = 1e-4,
):
    """The model on one episode after ``fine_tune`` on its support; ``jax.lax.map`` goes over episodes.

    Args:
      model: the model.
      variables: its parameters and batch statistics, those before fine-tuning.
      support_features: float [S, L, n], local features as the backbone has them.
      labels: 0/1 or bool [S, C].
      query_features: float [Q, L, n]; their means, [Q, 1, n], do where the model's ``query_top`` is 0.
      word_vectors: float [C, d_w].
      epochs: see ``fine_tune``; 0 is the model as it was trained.
      learning_rate: see ``fine_tune``.

    Returns:
      float [Q, C], probabilities.
    """
    tuned = fine_tune(
        *(model, variables, support_features, labels, word_vectors), epochs=epochs, learning_rate=learning_rate
    )
    words = model.apply(tuned, word_vectors, method="words")
    support, query = (model.apply(tuned, x, method="regions") for x in (support_features, query_features))
    prototypes = model.apply(tuned, support, labels, words, method="prototypes")
    return jax.nn.sigmoid(model.query_logits(query, prototypes))
