"""PLA (Yazici et al. 2020): an LSTM that emits an image's labels one by one, trained with predicted label alignment.

The decoder attends over the local features, and its own last prediction is its next input; after the last label comes
"end". As labels have no order, the order in which the targets are asked for follows the predictions (``align``). A
label's score is its highest probability over the steps. Widths are below the authors' and local features are projected
to their principal directions (ours), so that the whole decoder can be tuned on every support set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from optax.assignment import hungarian_algorithm

from mlfsic_jax.core.functional import unit
from mlfsic_jax.core.word_ridge import principal_directions
from mlfsic_jax.methods._training import adam, adam_in_chunks, map_locals
from mlfsic_jax.methods.classifier import EPOCHS

if TYPE_CHECKING:
    from mlfsic_jax.data.features import View

WIDTH = 128  # of the LSTM and of the attention; the authors' code has 512
EMBEDDING = 64  # of self-learned label vectors; the authors' code has 256
MAX_LABELS = 5  # steps before the last "end"; of an image with more labels, those that fit best are asked for
_CHUNK = 50  # steps in one program
_FORBIDDEN = 1e3  # more than all steps together may cost


class Labels(NamedTuple):
    """What belongs to labels; the row after the last label is "end".

    Attributes:
      vectors: float [C + 1, e], inputs of the LSTM.
      output: float [C + 1, h], their classifiers.
      bias: float [C + 1].
    """

    vectors: jax.Array
    output: jax.Array
    bias: jax.Array


class Trained(NamedTuple):
    """What is learned on base labels.

    Attributes:
      mean: float [n], mean local feature of the base images.
      components: float [n, d], principal directions, scaled to entries of order one.
      params: of ``Decoder``.
      labels: of the base labels.
    """

    mean: jax.Array
    components: jax.Array
    params: Any
    labels: Labels


class Decoder(nn.Module):
    """The LSTM with additive attention over the local features, on one image.

    Attributes:
      width: h, of the LSTM and the attention.
    """

    width: int = WIDTH

    @nn.compact
    def __call__(self, regions, labels: Labels):
        """Emits labels greedily.

        Args:
          regions: float [L, d].
          labels: see there.

        Returns:
          float [T, C + 1], log probabilities of the T steps.
        """
        n_labels, embedding = labels.vectors.shape[0] - 1, labels.vectors.shape[1]
        pooled = regions.mean(axis=0)
        carry = (nn.Dense(self.width, name="cell_start")(pooled), nn.Dense(self.width, name="hidden_start")(pooled))
        keys = nn.Dense(self.width, name="attention_key")(regions)
        ask, weigh = nn.Dense(self.width, name="attention_query"), nn.Dense(1, name="attention_weight")
        gate, cell = nn.Dense(regions.shape[1], name="gate"), nn.OptimizedLSTMCell(self.width, name="cell")
        last = self.param("start", nn.initializers.normal(1.0), (embedding,))
        emitted = []
        for _ in range(min(MAX_LABELS, n_labels) + 1):
            attention = jax.nn.softmax(weigh(nn.relu(keys + ask(carry[1])))[:, 0])
            context = nn.sigmoid(gate(carry[1])) * (attention @ regions)
            carry, hidden = cell(carry, jnp.concatenate([last, context]))
            logits = labels.output @ hidden + labels.bias
            last = labels.vectors[jnp.argmax(logits)]
            emitted.append(jax.nn.log_softmax(logits))
        return jnp.stack(emitted)


def align(log_probabilities, labels):
    """Predicted label alignment: which label is asked for at which step.

    The m labels of the image take the first m steps and "end" the next. A label that is predicted within them keeps
    (the first of) its steps; the others go to the steps left such that the sum of -log p is lowest, as an assignment
    problem.

    Args:
      log_probabilities: float [T, C + 1].
      labels: 0/1 [C].

    Returns:
      (int [T], the targets; bool [T], the steps that count in the loss).
    """
    n_labels = len(labels)
    cost, labels = -log_probabilities[:-1, :n_labels], labels.astype(bool)  # [R, C], R <= C
    steps = jnp.arange(len(cost))
    m = jnp.minimum(labels.sum(), len(cost))
    predicted = jax.nn.one_hot(jnp.argmax(log_probabilities[:-1], axis=1), n_labels, dtype=bool)
    hits = predicted & labels & (steps < m)[:, None]
    fixed = hits & (jnp.cumsum(hits, axis=0) == 1)
    taken = fixed.any(axis=1)[:, None] | fixed.any(axis=0)
    allowed = jnp.where(taken, fixed, labels)
    cost = jnp.where(allowed, jnp.minimum(cost, _FORBIDDEN / 10), _FORBIDDEN)
    # The steps after "end" take any of the labels left.
    cost = jnp.where((steps < m)[:, None], cost, jnp.where(labels, _FORBIDDEN, 0.0))
    rows, columns = hungarian_algorithm(cost)
    targets = jnp.full(len(steps) + 1, n_labels).at[rows].set(columns)
    steps = jnp.arange(len(targets))
    return jnp.where(steps < m, targets, n_labels), steps <= m


def loss(log_probabilities, labels):
    """Cross-entropy of one image with the aligned targets, averaged over its steps: [T, C + 1], 0/1 [C] -> scalar."""
    targets, counts = align(jax.lax.stop_gradient(log_probabilities), labels)
    picked = jnp.take_along_axis(log_probabilities, targets[:, None], axis=1)[:, 0]
    return -jnp.sum(picked * counts) / counts.sum()


def _batch_loss(model, tuned, regions, labels):
    params, label_rows = tuned
    log_probabilities = jax.vmap(lambda z: model.apply({"params": params}, z, label_rows))(regions)
    return jax.vmap(loss)(log_probabilities, labels).mean()


def train(
    key,
    base: View,
    *,
    n_shot: int,
    n_query: int,
    words: bool = False,
    n_components: int = 128,
    width: int = WIDTH,
    embedding: int = EMBEDDING,
    steps: int = 500,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    max_images: int = 8192,
) -> Trained:
    """Trains the decoder on base images.

    Args:
      key: fixes parameters and batches.
      base: the base images; its inputs are local features.
      n_shot: only for the message of progress.
      n_query: not used.
      words: whether label vectors start from word vectors; else at random ("self-learned").
      n_components: d, ours.
      width: h, ours.
      embedding: e of self-learned label vectors, ours.
      steps: of Adam, ours.
      batch_size: images in a step, as in the authors' code.
      learning_rate: of Adam, ours.
      max_images: of a larger split a random part is used (ours): their projected features are held in memory.
    """
    del n_query
    init_key, rows_key, step_key = jax.random.split(key, 3)
    rows = np.sort(np.asarray(jax.random.permutation(rows_key, len(base.labels)))[:max_images])
    mean, components = _directions(base, rows, n_components)
    # Half precision: the projected features of all these images are held in memory.
    z = jnp.asarray(map_locals(base, rows, lambda local: ((local - mean) @ components).astype(np.float16)))
    y = jnp.asarray(base.labels[rows], jnp.float32)
    model = Decoder(width)
    params, labels = _init(init_key, model, z, y.shape[1], base.word_vectors if words else None, embedding)

    @jax.jit
    def draw(chunk):
        return jax.random.randint(jax.random.fold_in(step_key, chunk), (_CHUNK, batch_size), 0, len(z))

    def batch_loss(tuned, data, batch):
        z, y = data
        return _batch_loss(model, tuned, z[batch].astype(jnp.float32), y[batch])

    tuned = adam_in_chunks(
        *(batch_loss, (params, labels), (z, y), draw),
        steps=steps,
        chunk=_CHUNK,
        learning_rate=learning_rate,
        description=f"{'PLA with word vectors' if words else 'PLA'}, {n_shot}-shot",
    )
    return Trained(jnp.asarray(mean), jnp.asarray(components), *tuned)


def new_labels(base: Labels, word_vectors, *, words: bool) -> Labels:
    """Where labels never seen start: at the mean of the base labels, their vectors at the word vectors if ``words``.

    Args:
      base: learned on base labels.
      word_vectors: float [C, d_w], of the new labels.
      words: see ``train``.
    """

    def mean_row(rows):
        mean = jnp.broadcast_to(rows[:-1].mean(axis=0), (len(word_vectors), *rows.shape[1:]))
        return jnp.concatenate([mean, rows[-1:]])

    labels = jax.tree.map(mean_row, base)
    if words:
        labels = labels._replace(vectors=jnp.concatenate([_scaled(word_vectors), base.vectors[-1:]]))
    return labels


def score(
    trained: Trained,
    key,
    support,
    labels,
    query,
    word_vectors,
    *,
    words: bool = False,
    epochs: int = EPOCHS,
    learning_rate: float = 1e-2,
):
    """Tunes the decoder and the rows of the new labels on the support, then decodes the queries.

    Args:
      trained: of ``train``.
      key: not used.
      support: float32 [S, L, n], local features.
      labels: bool [S, C].
      query: float32 [Q, L, n].
      word_vectors: float32 [C, d_w].
      words: as in ``train``.
      epochs: steps of Adam on the whole support.
      learning_rate: of Adam; ours, chosen on validation labels.

    Returns:
      float32 [Q, C], probabilities: the highest over the steps.
    """
    del key
    s, q = ((x - trained.mean) @ trained.components for x in (support, query))
    y = labels.astype(s.dtype)
    model = Decoder(trained.labels.output.shape[1])
    tuned = (trained.params, new_labels(trained.labels, word_vectors, words=words))
    (params, rows), _ = adam(
        lambda tuned, _: _batch_loss(model, tuned, s, y), tuned, jnp.arange(epochs), learning_rate=learning_rate
    )
    decoded = jax.vmap(lambda z: model.apply({"params": params}, z, rows))(q)  # [Q, T, C + 1]
    return jnp.exp(decoded.max(axis=1)[:, :-1])


def _directions(base: View, rows, n_components: int):
    """Mean local feature and scaled principal directions, of a spread of images."""
    some = rows[np.unique(np.linspace(0, len(rows) - 1, 512).astype(int))]
    local = map_locals(base, some, lambda local: local)
    mean = local.mean(axis=(0, 1))
    components = principal_directions(local, mean, n_components)
    return mean, components / np.sqrt(np.mean(((local - mean) @ components) ** 2))


def _init(key, model: Decoder, z, n_labels: int, word_vectors, embedding: int):
    """Parameters of the decoder, and the base labels."""
    if word_vectors is not None:
        embedding = word_vectors.shape[1]

    @jax.jit
    def init(key):
        params_key, labels_key = jax.random.split(key)
        random = jax.random.normal(labels_key, (n_labels + 1, embedding + model.width))
        vectors = random[:, :embedding]
        if word_vectors is not None:
            vectors = jnp.concatenate([_scaled(word_vectors), vectors[-1:]])
        labels = Labels(vectors, random[:, embedding:] / np.sqrt(model.width), jnp.zeros(n_labels + 1))
        return model.init(params_key, z[0].astype(jnp.float32), labels)["params"], labels

    return init(key)


def _scaled(word_vectors):
    """Word vectors with entries of order one: float [C, d_w]."""
    return unit(jnp.asarray(word_vectors, jnp.float32)) * np.sqrt(word_vectors.shape[1])
