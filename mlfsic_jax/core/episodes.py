"""Episodes: which images are support and which are query (paper section 3)."""

import functools
import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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

    def __init__(self, labels: list[int], counts: list[int], images: int, need: int):
        self.labels, self.counts, self.images, self.need = labels, counts, images, need
        super().__init__(self.describe([f"label {c}" for c in labels]))

    def describe(self, names: list[str]) -> str:
        """The message with the labels called ``names``."""
        listed = ", ".join(f"{name} ({count} images)" for name, count in zip(names, self.counts, strict=True))
        together = f", {self.images} distinct images together" if len(names) > 1 else ""
        return (
            f"no episode possible: {listed}{together}; n_shot + n_query needs {self.need} images a label, "
            f"{self.need * len(names)} distinct ones in all: lower n_shot or n_query, or leave labels out"
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
    plan, n_images = _check(labels, n_shot, n_query)
    return _draw(key, plan, n_images=n_images, most=int(plan.count.max()), n_shot=n_shot, n_query=n_query)


def sample_episodes(key: jax.Array, labels, *, n_episodes: int, n_shot: int, n_query: int) -> Episode:
    """``n_episodes`` calls of ``sample_episode``, the i-th with ``fold_in(key, i)``.

    Returns:
      An ``Episode`` of int32 [n_episodes, C * n_shot] and [n_episodes, C * n_query].
    """
    if n_episodes < 1:
        raise ValueError(f"n_episodes must be at least 1, not {n_episodes}")
    plan, n_images = _check(labels, n_shot, n_query)
    sizes = {"n_images": n_images, "most": int(plan.count.max()), "n_shot": n_shot, "n_query": n_query}
    draw = functools.partial(_draw, plan=jax.device_put(plan), **sizes)
    episodes = [draw(jax.random.fold_in(key, i)) for i in range(n_episodes)]
    return jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *episodes)


def sample_laso_support(key: jax.Array, labels, *, n_shot: int) -> np.ndarray:
    """Draws a support set of LaSO's kind (Alfassy et al. 2019): ``n_shot`` images per label, not more if possible.

    An image counts for all of its labels, so there are fewer images than ``n_shot`` per label. The label with fewest
    images so far (ties at random) draws one of its free images: at random among those that bring no label above
    ``n_shot`` or, if there is none, among those that overshoot least. LaSO fixes K per label but not how images are
    found; this is our reading.

    Args:
      key: a ``jax.random.key``.
      labels: bool [I, C], concrete.
      n_shot: K.

    Returns:
      int32 [S], rows of ``labels`` in the order of their drawing.

    Raises:
      ValueError: a label has fewer than ``n_shot`` images (``InfeasibleEpisode``).
    """
    labels = np.asarray(labels, bool)
    short = np.flatnonzero(labels.sum(axis=0) < n_shot)
    if len(short):
        counts = labels[:, short].sum(axis=0).tolist()
        raise InfeasibleEpisode(short.tolist(), counts, int(labels[:, short].any(axis=1).sum()), n_shot)
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


def _check(labels, n_shot: int, n_query: int) -> tuple["_Plan", int]:
    if isinstance(labels, jax.core.Tracer):
        raise TypeError("labels must be concrete: close over them instead of passing them through jit or vmap")
    labels = np.asarray(labels)
    if labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(f"labels must be [images, labels] and not empty, not {labels.shape}")
    if labels.dtype != bool:
        if not np.isin(labels, (0, 1)).all():
            raise ValueError("labels must be bool, or 0 and 1")
        labels = labels.astype(bool)
    for name, count in (("n_shot", n_shot), ("n_query", n_query)):
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {count!r}")
    return _plan(_Hashed(labels), int(n_shot), int(n_query)), len(labels)


class _Hashed:
    """A label matrix as a cache key: equal by content."""

    def __init__(self, labels: np.ndarray):
        self.labels = labels
        self.digest = hashlib.sha256(repr(labels.shape).encode() + np.packbits(labels).tobytes()).digest()

    def __hash__(self):
        return hash(self.digest)

    def __eq__(self, other):
        return self.digest == other.digest


class _Plan(NamedTuple):
    """A label matrix as lists of its positives: label-major, E entries."""

    label: np.ndarray  # int32 [E]
    image: np.ndarray  # int32 [E]
    start: np.ndarray  # int32 [C], a label's first entry
    count: np.ndarray  # int32 [C], its number of entries
    fallback: np.ndarray  # int32 [C, n_shot + n_query], one valid assignment


@functools.lru_cache(maxsize=16)  # the feasibility check costs more than a draw
def _plan(hashed: _Hashed, n_shot: int, n_query: int) -> _Plan:
    label, image = np.nonzero(hashed.labels.T)
    count = hashed.labels.sum(axis=0)
    start = np.cumsum(count) - count
    fallback = _assign(hashed.labels, n_shot + n_query)
    return _Plan(*(x.astype(np.int32) for x in (label, image, start, count, fallback)))


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
        short = sorted(int(v) for v in reachable if v < n_labels)
        together = int(labels[:, short].any(axis=1).sum())
        raise InfeasibleEpisode(short, labels[:, short].sum(axis=0).tolist(), together, need)
    flow = csr_array(result.flow)[:n_labels, n_labels : n_labels + n_images].tocoo()
    used = flow.data > 0
    rows, columns = flow.coords[0][used], flow.coords[1][used]
    return columns[np.lexsort((columns, rows))].reshape(n_labels, need)


@functools.partial(jax.jit, static_argnames=("n_images", "most", "n_shot", "n_query"))
def _draw(key, plan: _Plan, *, n_images: int, most: int, n_shot: int, n_query: int) -> Episode:
    n_labels, n_entries = len(plan.start), len(plan.image)

    def attempt(key):
        """Walks once through all labels for the supports and once for the queries."""
        # One call for all random numbers: each call is a long program to compile.
        bits, *order_bits = jnp.split(
            jax.random.bits(key, (n_entries + 2 * n_labels,)), [n_entries, n_entries + n_labels]
        )
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
        return drawn[0], drawn[1], free[1]

    fallback = (plan.fallback[:, :n_shot], plan.fallback[:, n_shot:], jnp.bool(False))
    _, (support, query, _) = jax.lax.while_loop(
        lambda state: (state[0] < _ATTEMPTS) & ~state[1][2],
        lambda state: (state[0] + 1, _keep_if_valid(attempt(jax.random.fold_in(key, state[0])), fallback)),
        (0, jax.tree.map(jnp.asarray, fallback)),
    )
    return Episode(support.reshape(-1), query.reshape(-1))


def _keep_if_valid(drawn, fallback):
    return tuple(jnp.where(drawn[2], d, f) for d, f in zip(drawn, fallback, strict=True))
