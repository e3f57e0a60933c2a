"""Episodes: which images are support and which are query (paper section 3)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.core.functional import require_zero_one

_ATTEMPTS = 100


class Episode(NamedTuple):
    """Rows of the label matrix, label-major: entry ``c * n_shot + k`` was drawn for label c.

    Attributes:
      support: int32 [C * n_shot].
      query: int32 [C * n_query], disjoint from the support.
    """

    support: jax.Array
    query: jax.Array


class InfeasibleEpisode(ValueError):
    """No choice of distinct images serves every label; ``labels`` are the columns that compete for too few."""

    def __init__(self, labels: np.ndarray, columns: list[int], need: int):
        competing = labels[:, columns]
        self.labels, self.counts, self.need = columns, competing.sum(axis=0).tolist(), need
        self.images = int(competing.any(axis=1).sum())
        super().__init__(self.describe([f"label {c}" for c in columns]))

    def describe(self, names: list[str]) -> str:
        """The message with the labels called ``names``."""
        listed = ", ".join(f"{name} ({count} images)" for name, count in zip(names, self.counts, strict=True))
        together = f", {self.images} distinct images together" if len(names) > 1 else ""
        return (
            f"no episode possible: {listed}{together}; n_shot + n_query needs {self.need} images a label, "
            f"{self.need * len(names)} distinct ones in all: lower n_shot or n_query (of a run: config.shots, "
            "config.train.n_query, config.eval.n_query), or leave labels out"
        )


def sample_episode(key: jax.Array, labels, *, n_shot: int, n_query: int) -> Episode:
    """Draws one episode over all labels: ``n_shot`` support and ``n_query`` query images per label, all distinct.

    Labels take turns in a fresh random order, first for all supports, then for all queries; each draws uniformly
    without replacement among its images that are still free. A draw that runs out of images is tried again, up to 100
    times; if all fail (labels that share almost all their images), an assignment found by maximum flow is returned.
    Images drawn for one label may have others too: read their full labels from ``labels[episode.support]``.

    Pure in ``key``: works under jit, and under vmap over keys.

    Args:
      key: a ``jax.random.key``.
      labels: bool [I, C], concrete (NumPy or a JAX array outside of a trace).
      n_shot: support images per label, K.
      n_query: query images per label.

    Returns:
      An ``Episode``.

    Raises:
      TypeError: ``labels`` is traced.
      ValueError: ``labels`` or the counts are malformed; ``InfeasibleEpisode`` if no episode exists.
    """
    plan, sizes = _planned(labels, n_shot, n_query)
    return _draw(key, plan, **sizes)


def sample_episodes(key: jax.Array, labels, *, n_episodes: int, n_shot: int, n_query: int) -> Episode:
    """``n_episodes`` calls of ``sample_episode``, the i-th with ``fold_in(key, i)``: int32 [n_episodes, ...]."""
    if n_episodes < 1:
        raise ValueError(f"n_episodes must be at least 1, not {n_episodes}")
    plan, sizes = _planned(labels, n_shot, n_query)
    return _draw_many(key, plan, n_episodes=n_episodes, **sizes)


def sample_laso_support(key: jax.Array, labels, *, n_shot: int) -> np.ndarray:
    """Draws a support set of LaSO's kind (Alfassy et al. 2019): ``n_shot`` images per label, not more if possible.

    An image counts for all of its labels, so there are fewer images than ``n_shot`` per label. The label with fewest
    images so far (ties at random) draws one of its free images: at random among those that bring no label above
    ``n_shot`` or, if there is none, among those that overshoot least. LaSO fixes K per label but not how images are
    found; this is our reading.

    Returns int32 [S], rows of ``labels``, concrete bool [I, C], in the order of their drawing. Raises
    ``InfeasibleEpisode`` where a label has fewer than ``n_shot`` images.
    """
    labels = np.asarray(labels, bool)
    short = np.flatnonzero(labels.sum(axis=0) < n_shot).tolist()
    if short:
        raise InfeasibleEpisode(labels, short, n_shot)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    count, free, drawn = np.zeros(labels.shape[1], int), np.ones(len(labels), bool), []
    while count.min() < n_shot:
        label = rng.choice(np.flatnonzero(count == count.min()))
        candidates = np.flatnonzero(free & labels[:, label])
        overshoot = np.maximum(count + labels[candidates] - n_shot, 0).sum(axis=1)
        image = rng.choice(candidates[overshoot == overshoot.min()])
        free[image] = False
        count += labels[image]
        drawn.append(image)
    return np.array(drawn, np.int32)


def _planned(labels, n_shot: int, n_query: int) -> tuple["_Plan", dict[str, int]]:
    """Checks the arguments of ``sample_episode``; returns the plan of its draws and their sizes."""
    if isinstance(labels, jax.core.Tracer):
        raise TypeError("labels must be concrete: close over them instead of passing them through jit or vmap")
    labels = np.asarray(labels)
    if labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(f"labels must be [images, labels] and not empty, not {labels.shape}")
    require_zero_one(labels)
    labels = labels.astype(bool)
    for name, count in (("n_shot", n_shot), ("n_query", n_query)):
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {count!r}")
    plan = _plan(np.packbits(labels).tobytes(), labels.shape, int(n_shot) + int(n_query))
    return plan, {"n_images": len(labels), "most": int(plan.count.max()), "n_shot": n_shot, "n_query": n_query}


class _Plan(NamedTuple):
    """A label matrix as lists of its positives: label-major, E entries."""

    label: np.ndarray  # int32 [E]
    image: np.ndarray  # int32 [E]
    start: np.ndarray  # int32 [C], a label's first entry
    count: np.ndarray  # int32 [C], its number of entries
    fallback: np.ndarray  # int32 [C, n_shot + n_query], one valid assignment


@functools.lru_cache(maxsize=16)  # the feasibility check costs more than a draw
def _plan(packed: bytes, shape: tuple[int, int], need: int) -> _Plan:
    labels = np.unpackbits(np.frombuffer(packed, np.uint8), count=shape[0] * shape[1]).reshape(shape).astype(bool)
    label, image = np.nonzero(labels.T)
    count = labels.sum(axis=0)
    parts = (label, image, np.cumsum(count) - count, count, _assign(labels, need))
    return _Plan(*(x.astype(np.int32) for x in parts))


def _assign(labels: np.ndarray, need: int) -> np.ndarray:
    """int [C, need]: ``need`` images for every label, all distinct, by maximum flow; raises ``InfeasibleEpisode``."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    n_images, n_labels = labels.shape
    # source -> label (capacity need) -> image (1) -> sink (1)
    image, label = np.nonzero(labels)
    source, sink = n_labels + n_images, n_labels + n_images + 1
    tails = np.concatenate([np.full(n_labels, source), label, n_labels + np.arange(n_images)])
    heads = np.concatenate([np.arange(n_labels), n_labels + image, np.full(n_images, sink)])
    capacity = np.concatenate([np.full(n_labels, need), np.ones(len(image) + n_images, int)]).astype(np.int32)
    graph = csr_array((capacity, (tails, heads)), shape=(sink + 1, sink + 1))
    result = maximum_flow(graph, source, sink)
    if result.flow_value < need * n_labels:
        # The labels still reachable from the source compete for too few images (minimum cut).
        residual = graph - result.flow
        residual.eliminate_zeros()
        reachable = breadth_first_order(csr_array(residual > 0), source, return_predecessors=False)
        raise InfeasibleEpisode(labels, sorted(int(v) for v in reachable if v < n_labels), need)
    flow = csr_array(result.flow)[:n_labels, n_labels : n_labels + n_images].tocoo()
    used = flow.data > 0
    rows, columns = flow.coords[0][used], flow.coords[1][used]
    return columns[np.lexsort((columns, rows))].reshape(n_labels, need)


@functools.partial(jax.jit, static_argnames=("n_images", "most", "n_shot", "n_query"))
def _draw(key, plan: _Plan, *, n_images: int, most: int, n_shot: int, n_query: int) -> Episode:
    n_labels, n_entries = len(plan.start), len(plan.image)
    fallback = (plan.fallback[:, :n_shot], plan.fallback[:, n_shot:])

    def attempt(key):
        """Walks once through all labels for the supports and once for the queries."""
        # One call for all random numbers: each call is a long program to compile.
        every = jax.random.bits(key, (n_entries + 2 * n_labels,), jnp.uint32)  # uint64 by default with 64-bit types
        bits, *order_bits = jnp.split(every, [n_entries, n_entries + n_labels])
        # A label's images are ordered by their random bits, and each turn takes the first free ones: by search, since
        # sorting them all takes longer.
        bits, images = (jnp.pad(x, (0, most)) for x in (bits, plan.image))

        def turn(take, carry, c):
            free, enough = carry
            label_bits, label_images = (jax.lax.dynamic_slice(x, (plan.start[c],), (most,)) for x in (bits, images))

            def first(usable, _):
                lowest = jnp.min(label_bits, where=usable, initial=np.uint32(2**32 - 1))
                chosen = jnp.argmax(usable & (label_bits == lowest))
                return usable.at[chosen].set(False), (chosen, usable.any())

            usable = free[label_images] & (jnp.arange(most) < plan.count[c])
            _, (chosen, found) = jax.lax.scan(first, usable, length=take)
            return (free.at[label_images[chosen]].set(False), enough & found.all()), label_images[chosen]

        free = (jnp.ones(n_images, bool), jnp.bool(True))
        drawn = []
        for take, phase_bits in zip((n_shot, n_query), order_bits, strict=True):
            order = jnp.argsort(phase_bits)
            free, chosen = jax.lax.scan(functools.partial(turn, take), free, order)
            drawn.append(jnp.zeros_like(chosen).at[order].set(chosen))
        valid = free[1]
        return valid, *(jnp.where(valid, d, f) for d, f in zip(drawn, fallback, strict=True))

    _, _, support, query = jax.lax.while_loop(
        lambda state: (state[0] < _ATTEMPTS) & ~state[1],
        lambda state: (state[0] + 1, *attempt(jax.random.fold_in(key, state[0]))),
        (0, jnp.bool(False), *map(jnp.asarray, fallback)),
    )
    return Episode(support.reshape(-1), query.reshape(-1))


@functools.partial(jax.jit, static_argnames=("n_episodes", "n_images", "most", "n_shot", "n_query"))
def _draw_many(key, plan: _Plan, *, n_episodes: int, **sizes: int) -> Episode:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n_episodes))
    draw = functools.partial(_draw, plan=plan, **sizes)
    # A CPU's cache holds the random numbers of one episode: one by one is two to four times as fast there.
    return jax.lax.platform_dependent(keys, cpu=functools.partial(jax.lax.map, draw), default=jax.vmap(draw))
