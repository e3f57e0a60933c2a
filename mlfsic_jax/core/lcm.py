"""Loss Change Measurement: which regions of a support photo speak for its labels (paper section 4.2, eqs 5-11)."""

import dataclasses
import functools
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.core.functional import binary_cross_entropy, require_zero_one, unit
from mlfsic_jax.core.options import one_of, require

SCORE_SCALINGS = ("minmax", "none")
SELECTIONS = ("momentum", "taylor", "exact", "importance", "low_importance")
_CACHE_BYTES = 2**20  # half of the second-level cache of a server core


@dataclasses.dataclass(frozen=True)
class LCMOptions:
    """How LCM runs inside a model: options of ``lcm_select``, and ``selection``, which score is compared with theta.

    The scores (appendix A.3.2; rho is the final one, "upon convergence") are "momentum": f_n of eq 11; "taylor": eq 10
    at rho; "exact": eq 8 at rho, the change of the loss when one position is removed; "importance": rho;
    "low_importance": 1 - rho.
    """

    steps: int = 20
    step_size: float = 1.0
    momentum: float = 0.95
    score_scaling: str = "minmax"
    selection: str = "momentum"

    def __post_init__(self):
        require(
            self,
            steps=(isinstance(self.steps, Integral) and self.steps >= 1, "must be a whole number of at least 1"),
            step_size=(_within(self.step_size, 0), "must be at least 0"),
            momentum=(_within(self.momentum, 0, 1), "must be in [0, 1]"),
            score_scaling=one_of(self.score_scaling, SCORE_SCALINGS),
            selection=one_of(self.selection, SELECTIONS),
        )


def _within(value, low: float, high: float = np.inf) -> bool:
    """Whether a number is in a range; one that is traced is not known yet."""
    return isinstance(value, jax.core.Tracer) or bool(np.all((low <= value) & (value <= high)))


class LCMSelection(NamedTuple):
    """LCM's verdict on every position.

    Attributes:
      keep: bool [S, h, w], positions that go into the prototypes; at least one per image.
      score: float [S, h, w], f_n of eq 11 before any scaling.
      importance: float [S, h, w], the final rho, in [0, 1].
    """

    keep: jax.Array
    score: jax.Array
    importance: jax.Array


def lcm_select(
    local_features,
    labels,
    label_embeddings,
    *,
    projection=None,
    scale: float = 10.0,
    steps: int = 20,
    step_size: float = 1.0,
    momentum: float = 0.95,
    threshold: float = 0.53,
    score_scaling: str = "minmax",
) -> LCMSelection:
    """Selects the local features whose removal would change an image's classification loss the most.

    Per image, an importance rho (one number per position, at first 1) weighs the mean of the local features, which is
    classified against the label embeddings by scaled cosine. ``steps`` times: measure the loss change
    g = |rho * dL/drho| (eq 10), average it with momentum (eq 11), descend on rho, normalise rho to [0, 1] (eqs 6-7).
    A position is kept where sigmoid(score) >= ``threshold``.

    In float32 an image whose features cancel each other, to a mean of less than 1e-3 of their lengths, has no accurate
    score.

    A pure function of its arguments: works under jit, vmap and shard_map, in float32 and float64; images are
    independent of each other. Arrays that are sharded over images go through shard_map, or jit with a mesh of axis type
    Auto.

    Args:
      local_features: float [S, h, w, n].
      labels: 0/1 or bool [S, C].
      label_embeddings: float [C, d], labels in the joint space.
      projection: float [n, d] into the joint space (A_visual transposed), or None when n == d.
      scale: lambda of eq 4.
      steps: iterations, the paper's 20.
      step_size: of the gradient step on rho. Its scale hardly matters: the first normalisation removes it.
      momentum: alpha of eq 11.
      threshold: theta. At 0.5 everything is kept, since scores are not negative.
      score_scaling: "minmax" scales the scores to [0, 1] per image before the sigmoid, so that sigmoid(score) lies
        in [0.5, 0.731]; "none" takes the raw score, whose sigmoid barely leaves 0.5 on real features.

    Returns:
      An ``LCMSelection``; floats in the precision of ``local_features``, at least float32.

    Raises:
      ValueError: shapes do not fit, or an option is out of its range.
    """
    local_features, labels, label_embeddings = map(jnp.asarray, (local_features, labels, label_embeddings))
    options = LCMOptions(steps, step_size, momentum, score_scaling)
    _check_shapes(local_features, labels, label_embeddings, projection)
    _check_values(labels, scale, threshold)
    dtype = jnp.promote_types(local_features.dtype, jnp.float32)
    features = local_features.astype(dtype)
    if projection is not None:
        features = jnp.matmul(features, jnp.asarray(projection).astype(dtype), precision="highest")
    s, h, w, d = features.shape
    regions, words = features.reshape(s, h * w, d), label_embeddings.astype(dtype)
    score, importance = loss_change(regions, labels, words, scale=scale, options=options)
    keep = select_positions(score, threshold, scale=scale, score_scaling=score_scaling)
    return LCMSelection(*(x.reshape(s, h, w) for x in (keep, score, importance)))


def loss_change(regions, labels, label_embeddings, *, scale: float, options: LCMOptions = LCMOptions()):
    """``lcm_select`` without the selection, on local features float [S, L, d] that are already in the joint space.

    Returns (score [S, L], importance [S, L]) in the dtype of ``regions``. All scores are compared with theta in one
    way, see ``select_positions``: with "minmax" scaling, or where a score is in [0, 1] by itself, theta = 0.53 keeps
    scores from log(0.53 / 0.47) = 0.12 on, 0.65 from 0.62 on.
    """
    numbers = {"scale": scale, "step_size": options.step_size, "momentum": options.momentum}
    numbers = {name: jnp.asarray(number, regions.dtype) for name, number in numbers.items()}
    return _loss_change(regions, labels, label_embeddings, numbers, steps=options.steps, selection=options.selection)


@functools.partial(jax.jit, static_argnames=("steps", "selection"))  # else an eager call would compile its scan anew
def _loss_change(u, labels, label_embeddings, numbers, *, steps, selection):
    products = functools.partial(_products, words=unit(label_embeddings))
    scan = functools.partial(_loss_change_of_image, **numbers, steps=steps, selection=selection)
    n_positions, n_labels = u.shape[1], len(label_embeddings)
    in_cache = max(1, _CACHE_BYTES // (n_positions * (n_positions + n_labels) * u.dtype.itemsize))
    # bfloat16 products would move rho by 0.05 and flip a few positions.
    with jax.default_matmul_precision("highest"):
        gram, agreement = _over_images(products, u)
        return _over_images(scan, gram, agreement, labels.astype(u.dtype), at_once=in_cache)


def _products(u, *, words):
    """The scan's input for an image: u [L, d], unit words [C, d] -> u u' [L, L], u words' [L, C]."""
    largest = jnp.max(jnp.abs(u))  # cosines ignore scale, but the squares of large numbers overflow
    u = u / jnp.where(largest > 0, largest, 1.0)
    return u @ u.T, u @ words.T


def _loss_change_of_image(gram, agreement, y, *, scale, steps, step_size, momentum, selection):
    """The scan over rho (eqs 5-7, 10, 11): ``_products`` of an image, y [C] -> score [L], importance [L]."""

    def loss(rho):
        # Eq 5's v = sum_l rho_l u_l enters only through |v|^2 = rho' gram rho and v . w_c = rho' agreement, so the
        # width d stays out of the scan. The mean's 1 / L does not change a cosine.
        cosine = rho @ agreement * jax.lax.rsqrt(jnp.maximum(rho @ gram @ rho, 1e-24))
        return binary_cross_entropy(scale * cosine, y).sum()

    def iteration(carry, i):
        rho, score = carry
        gradient = jax.grad(loss)(rho)
        change = jnp.abs(rho * gradient)  # eq 10
        alpha = jnp.minimum(1.0 - 1.0 / (i + 1.0), momentum)
        score = alpha * score + (1.0 - alpha) * change  # eq 11
        return (_normalise_importance(rho - step_size * gradient), score), None

    # Derived from all arguments, not jnp.ones(L): inside shard_map rho must vary over the mesh wherever any of them
    # does, else its gradient is silently summed over devices.
    ones = jnp.ones_like(agreement @ y * scale * step_size * momentum)
    (rho, score), _ = jax.lax.scan(iteration, (ones, 0 * ones), jnp.arange(1, steps + 1, dtype=gram.dtype))
    if selection == "taylor":
        score = jnp.abs(rho * jax.grad(loss)(rho))  # eq 10
    elif selection == "exact":
        removed = rho * (1 - jnp.eye(len(rho), dtype=rho.dtype))  # row l: without position l
        score = jnp.abs(loss(rho) - jax.vmap(loss)(removed))  # eq 8
    elif selection == "importance":
        score = rho
    elif selection == "low_importance":
        score = 1 - rho
    return score, rho


def _over_images(f, *arrays, at_once: int | None = None):
    """``jax.vmap(f)(*arrays)``; on a CPU in parts that fit its cache, ``at_once`` images each, or one by one."""

    def in_parts(*arrays):
        if at_once is not None:
            return jax.lax.map(lambda one: f(*one), arrays, batch_size=at_once)
        # Unrolled, since XLA shares independent operations among cores, but not the iterations of a loop.
        return jax.lax.scan(lambda _, one: (None, f(*one)), None, arrays, unroll=8)[1]

    return jax.lax.platform_dependent(*arrays, cpu=in_parts, default=jax.vmap(f))


def select_positions(score, threshold, *, scale: float = 10.0, score_scaling: str = "minmax"):
    """sigmoid(score) >= theta, per image; an image where no position passes keeps its best one.

    ``score`` is raw, float [..., L]; ``threshold``, theta, a float or an array that broadcasts against it, to the shape
    of the result, bool. ``scale``, lambda, is the unit of the scores' rounding errors.
    """
    tolerance = scale * jnp.finfo(score.dtype).eps
    scaled = _minmax(score, tolerance) if score_scaling == "minmax" else score
    best = jax.nn.one_hot(jnp.argmax(score, axis=-1), score.shape[-1], dtype=bool)
    passes = jax.nn.sigmoid(scaled) >= threshold
    return jnp.where(passes.any(axis=-1, keepdims=True), passes, best)


def _normalise_importance(rho):
    """Min-max to [0, 1]; exact zeros take the lowest non-zero value, so that no position is lost for good (eqs 6-7)."""
    rho = _minmax(rho, tolerance=8 * jnp.finfo(rho.dtype).eps)
    lowest = jnp.min(jnp.where(rho > 0, rho, 1.0))
    return jnp.where(rho > 0, rho, lowest)


def _minmax(x, tolerance):
    """x scaled to [0, 1] over its last axis; 1 everywhere where x is constant up to rounding."""
    low, high = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
    constant = high - low <= tolerance
    return jnp.where(constant, 1.0, (x - low) / jnp.where(constant, 1.0, high - low))


def _check_values(labels, scale, threshold):
    require_zero_one(labels)
    for name, number, high in (("threshold", threshold, 1.0), ("scale", scale, np.finfo(np.float32).max)):
        if not _within(number, 0, high):
            raise ValueError(f"{name} must be from 0 to {high:g}, not {number}")


def _check_shapes(local_features, labels, label_embeddings, projection):
    s, n = local_features.shape[0] if local_features.ndim else 0, local_features.shape[-1:]
    d = n if projection is None else jnp.shape(projection)[-1:]
    if local_features.ndim != 4:
        raise ValueError(f"local_features must be [S, h, w, n], not {local_features.shape}")
    if 0 in local_features.shape:
        raise ValueError(f"local_features [S, h, w, n] = {local_features.shape} hold no number")
    if labels.ndim != 2 or labels.shape[0] != s:
        raise ValueError(f"labels must be [S, C] with S = {s} as in local_features, not {labels.shape}")
    if projection is not None and (jnp.ndim(projection) != 2 or jnp.shape(projection)[:1] != n):
        raise ValueError(f"projection must be [n, d] with n = {n[0]}, not {jnp.shape(projection)}")
    if label_embeddings.shape != (labels.shape[1], *d):
        raise ValueError(
            f"label_embeddings must be [C, d] = {(labels.shape[1], *d)}, not {label_embeddings.shape}"
            + (": give projection=[n, d] where n differs from d" if projection is None else "")
        )
