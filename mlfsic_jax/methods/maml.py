"""MAML (Finn et al. 2017): a start from which a few gradient steps on the support learn its labels.

The learner has two layers on global features: an embedding, and a linear layer that has one output per label. Novel
labels are others, and of another number, than base labels; so all outputs start from one shared learned vector (ours).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.core.episodes import sample_episodes
from mlfsic_jax.core.functional import binary_cross_entropy, unit
from mlfsic_jax.methods._training import adam_in_chunks
from mlfsic_jax.methods.classifier import EPOCHS, centred_unit, global_features

if TYPE_CHECKING:
    from mlfsic_jax.data.features import View

INNER_LEARNING_RATE = 3.0  # alpha; ours, chosen on validation labels
_CHUNK = 50  # episodes drawn at once


class Learner(NamedTuple):
    """Parameters of the two layers.

    Attributes:
      embedding: float [n, h].
      embedding_bias: float [h].
      output: float [h, C]; [h, 1] as start of all labels.
      output_bias: float [C], or [1].
    """

    embedding: jax.Array
    embedding_bias: jax.Array
    output: jax.Array
    output_bias: jax.Array


class Trained(NamedTuple):
    """What is learned on base labels.

    Attributes:
      mean: float [n], mean global feature of the base images.
      start: the ``Learner`` that adaptation starts from.
    """

    mean: jax.Array
    start: Learner


def logits(learner: Learner, x):
    """float [I, n] -> [I, C]."""
    hidden = jax.nn.relu(x @ learner.embedding + learner.embedding_bias)
    return hidden @ learner.output + learner.output_bias


def adapt(start: Learner, x, labels, *, steps: int, learning_rate: float, first_order: bool = False) -> Learner:
    """Plain gradient descent on the support's cross-entropy, summed over labels and averaged over images.

    Args:
      start: with one output, which all labels share.
      x: float [S, n].
      labels: 0/1 [S, C].
      steps: how many.
      learning_rate: the inner one, alpha.
      first_order: whether a derivative of the result takes the inner gradients for constants (FOMAML).

    Returns:
      The adapted ``Learner``, with C outputs.
    """
    n_labels = labels.shape[1]
    learner = start._replace(
        output=jnp.tile(start.output, (1, n_labels)), output_bias=jnp.tile(start.output_bias, n_labels)
    )

    def step(learner, _):
        def loss(learner):
            return binary_cross_entropy(logits(learner, x), labels).sum(axis=1).mean()

        gradient = jax.grad(loss)(learner)
        if first_order:
            gradient = jax.lax.stop_gradient(gradient)
        return jax.tree.map(lambda p, g: p - learning_rate * g, learner, gradient), None

    return jax.lax.scan(step, learner, length=steps)[0]


def episode_loss(start: Learner, support, support_labels, query, query_labels, **inner):
    """The query loss after adaptation to the support: what MAML descends on.

    Args:
      start: see ``adapt``.
      support: float [S, n].
      support_labels: 0/1 [S, C].
      query: float [Q, n].
      query_labels: 0/1 [Q, C].
      **inner: of ``adapt``.
    """
    adapted = adapt(start, support, support_labels, **inner)
    return binary_cross_entropy(logits(adapted, query), query_labels).sum(axis=1).mean()


def train(
    key,
    base: View,
    *,
    n_shot: int,
    n_query: int,
    first_order: bool = False,
    width: int = 128,
    episodes: int = 400,
    learning_rate: float = 3e-4,
    inner_steps: int = 5,
    inner_learning_rate: float = INNER_LEARNING_RATE,
) -> Trained:
    """Learns the start on episodes of base labels, one a step.

    Args:
      key: fixes parameters and episodes.
      base: the base images; its inputs are local features.
      n_shot: K.
      n_query: query images per label.
      first_order: first-order MAML.
      width: h, ours.
      episodes: training steps, ours.
      learning_rate: of Adam, the outer loop's; ours.
      inner_steps: see ``adapt``; ours.
      inner_learning_rate: see ``adapt``.
    """
    features = global_features(base)
    mean = features.mean(axis=0)
    x, labels = unit(jnp.asarray(features - mean)), jnp.asarray(base.labels, jnp.float32)
    init_key, episode_key = jax.random.split(key)
    embedding = jax.random.normal(init_key, (x.shape[1], width)) * np.sqrt(2 / width)
    start = Learner(embedding, jnp.zeros(width), jnp.zeros((width, 1)), jnp.zeros(1))
    inner = {"steps": inner_steps, "learning_rate": inner_learning_rate, "first_order": first_order}

    def draw(chunk):
        drawn_key = jax.random.fold_in(episode_key, chunk)
        return sample_episodes(drawn_key, base.labels, n_episodes=_CHUNK, n_shot=n_shot, n_query=n_query)

    def loss(start, data, episode):
        (x, labels), (s, q) = data, episode
        return episode_loss(start, x[s], labels[s], x[q], labels[q], **inner)

    start = adam_in_chunks(
        *(loss, start, (x, labels), draw),
        steps=episodes,
        chunk=_CHUNK,
        learning_rate=learning_rate,
        description=f"{'first-order MAML' if first_order else 'MAML'}, {n_shot}-shot",
    )
    return Trained(jnp.asarray(mean), start)


def score(
    trained: Trained,
    key,
    support,
    labels,
    query,
    word_vectors,
    *,
    inner_steps: int = EPOCHS,
    inner_learning_rate: float = INNER_LEARNING_RATE,
):
    """Adapts the learned start to the support and applies it to the queries.

    Args:
      trained: of ``train``.
      key: not used.
      support: float32 [S, L, n], local features.
      labels: bool [S, C].
      query: float32 [Q, L, n].
      word_vectors: not used.
      inner_steps: see ``adapt``; more than in training, the paper's number of epochs for its baselines.
      inner_learning_rate: see ``adapt``.

    Returns:
      float32 [Q, C], probabilities.
    """
    del key, word_vectors
    adapted = adapt(
        trained.start,
        centred_unit(support, trained.mean),
        labels.astype(jnp.float32),
        steps=inner_steps,
        learning_rate=inner_learning_rate,
    )
    return jax.nn.sigmoid(logits(adapted, centred_unit(query, trained.mean)))
