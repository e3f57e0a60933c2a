"""Evaluation: every method on the same fixed episodes (paper sections 4.4 and 5.1.2)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from mlfsic_jax.core import word_ridge
from mlfsic_jax.core.episodes import sample_episodes, sample_laso_support
from mlfsic_jax.core.functional import cosine_logits, unit
from mlfsic_jax.core.lcm import select_positions
from mlfsic_jax.core.metrics import METRICS, calibration_error, mean_and_ci95, multilabel_metrics
from mlfsic_jax.core.model import BaseModel, LCMOptions
from mlfsic_jax.data.features import View
from mlfsic_jax.methods import closed_form
from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.progress import track

METHODS = (
    *("zero_shot", "prototypes", "prototypes_centered", "ridge", "word_ridge", "region_word_ridge"),
    *("base", "lcm"),
)
# Ways of joining the trained model and the closed-form one: the regions that LCM keeps as the kernel's regions of the
# support, and the trained prototypes in the place of the word prior.
VARIANTS = ("region_word_ridge_lcm", "base_ridge", "lcm_ridge")
CALIBRATED = ("word_ridge", "region_word_ridge", *VARIANTS)
PAIRS = (
    *(("lcm", "base"), ("word_ridge", "ridge"), ("region_word_ridge", "ridge")),
    *(("region_word_ridge_lcm", "region_word_ridge"), ("base_ridge", "word_ridge"), ("lcm_ridge", "word_ridge")),
)
_EMBED_BATCH = 64  # on each device
_EPISODE_BATCH = 4  # on each device
_QUERY_BATCH = 256  # LaSO's protocol asks for thousands of queries


class Embedded(NamedTuple):
    """Images through backbone and A_visual.

    Attributes:
      pooled: float32 [I, n], means of the local features.
      regions: float32 [I, L, d_joint], local features in the joint space.
      regions: float32 [I, L, d], local features as ``word_ridge.regions`` has them; [I, L, 0] before that is fitted.
    """

    pooled: np.ndarray
    regions: np.ndarray
    regions: np.ndarray


class RidgeOptions(NamedTuple):
    """Settings of ``word_ridge`` and ``region_word_ridge``, see there."""

    beta: float = 0.5
    regulariser: float = 1.0
    region_regulariser: float = 0.3
    classifier_regulariser: float = 300.0
    word_regulariser: float = 0.1
    n_components: int = 320
    variants: bool = False  # also run VARIANTS, LCM at ``variants_threshold``
    variants_threshold: float = 0.53


class Scores(NamedTuple):
    """What every method says of every episode, as probabilities.

    Attributes:
      labels: bool [E, Q, C], ground truth of the queries.
      methods: name -> float [E, Q, C], all methods but LCM; those in ``CALIBRATED`` as standardised scores.
      lcm: float [T, E, Q, C], one block per threshold.
      chance: float [E, Q, C], uniformly random.
      kept: float [T], the mean fraction of positions that LCM keeps.
    """

    labels: np.ndarray
    methods: dict[str, np.ndarray]
    lcm: np.ndarray
    chance: np.ndarray
    kept: np.ndarray


def embed(model: BaseModel, variables, inputs, rows: np.ndarray, fitted: word_ridge.Fitted | None = None) -> Embedded:
    """Runs images through the model's backbone and A_visual, in batches of one size.

    Args:
      model: the model, with or without a backbone.
      variables: its parameters and batch statistics.
      inputs: see ``View``.
      rows: int [B], which images.
      fitted: says how regions are projected.
    """
    return Embedded(*map_batches(_embed, model, rows, lambda r: (inputs(r),), variables, fitted))


def lcm_scores(model: BaseModel, variables, regions, labels, word_vectors, options: LCMOptions) -> np.ndarray:
    """LCM's raw scores of images, in batches of one size.

    Args:
      model: the model.
      variables: its parameters.
      regions: float [I, L, d_joint], see ``Embedded``.
      labels: bool [I, C].
      word_vectors: float32 [C, d_w].
      options: how LCM runs.

    Returns:
      float32 [I, L].
    """
    rows = np.arange(len(regions))
    (scores,) = map_batches(
        *(_lcm_scores, (model, options), rows, lambda r: (regions[r], labels[r]), variables, word_vectors)
    )
    return scores


def fit_ridge(model: BaseModel, variables, base: View, options: RidgeOptions) -> word_ridge.Fitted:
    """Fits the word prior and the regions' principal directions on the base images.

    Args:
      model: the model, for its backbone.
      variables: its parameters and batch statistics.
      base: the images to fit on.
      options: settings.
    """
    (features,) = map_batches(_globals, model, np.arange(len(base.labels)), lambda r: (base.inputs(r),), variables)
    # A spread of images is enough for the directions: each gives as many samples as it has positions.
    some = np.unique(np.linspace(0, len(features) - 1, 512).astype(int))
    (local,) = map_batches(_locals, model, some, lambda r: (base.inputs(r),), variables)
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    fitted = word_ridge.fit(
        features,
        base.labels,
        base.word_vectors,
        word_ridge.principal_directions(local, mean, options.n_components),
        classifier_regulariser=options.classifier_regulariser,
        word_regulariser=options.word_regulariser,
    )
    return jax.device_get(fitted)  # the same in every process


def map_batches(fn, static, rows: np.ndarray, read: Callable, *copied) -> tuple[np.ndarray, ...]:
    """Maps images over all devices.

    Args:
      fn: ``(static, *copied, *arrays of a batch) -> tuple of arrays`` with one row for each image.
      static: hashable.
      rows: int [B], which images.
      read: ``int [b] -> tuple of arrays``; every process reads its own share of a batch.
      *copied: what all devices get.

    Returns:
      The results for all rows.
    """
    parts = []
    cut = list(batches(rows))
    inputs = parallel.prefetch(lambda b: read(b[1][parallel.share(len(b[1]))]), cut)
    for (batch, _), arrays in zip(cut, map(parallel.shard, inputs), strict=True):
        specs = (parallel.REPLICATED,) * len(copied) + (parallel.SHARDED,) * len(arrays)
        results = parallel.gather(parallel.pmapped(fn, static, specs=specs)(*copied, *arrays))
        parts.append([x[: len(batch)] for x in results])
    return tuple(map(np.concatenate, zip(*parts, strict=True)))


def batches(rows: np.ndarray):
    """Cuts int [B] into (batch, the same filled up to one size with copies of its last), so one program serves all."""
    size = _EMBED_BATCH * jax.device_count()
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        yield batch, np.concatenate([batch, np.full(size - len(batch), batch[-1])])


def score_episodes(
    model: BaseModel,
    variables,
    split: View,
    *,
    key: jax.Array,
    n_episodes: int,
    n_shot: int,
    n_query: int,
    thresholds=(),
    lcm: LCMOptions | None = None,
    fitted: word_ridge.Fitted | None = None,
    ridge: RidgeOptions | None = None,
) -> Scores:
    """Scores the queries of fixed episodes by every method.

    Each image is embedded once, and, as LCM looks at one image at a time, its importance is measured once, however
    many episodes it is in; all thresholds share that one run.

    Args:
      model: the model.
      variables: its parameters and batch statistics.
      split: the images and labels.
      key: fixes the episodes.
      n_episodes: E.
      n_shot: K.
      n_query: query images per label; under LaSO's protocol all images that may not be support are queries.
      thresholds: T values of theta for LCM; none leaves LCM out.
      lcm: how LCM runs.
      fitted: what the methods without training take from the base images; None leaves those methods out.
      ridge: settings of those methods.
    """
    episode_key, chance_key = jax.random.split(key)
    support, query = draw(episode_key, split, n_episodes, n_shot, n_query)
    rows, where = np.unique(np.concatenate([*support, query.ravel()]), return_inverse=True)
    *support, query = np.split(where, np.cumsum([len(s) for s in support]))
    query = query.reshape(n_episodes, -1)

    embedded = embed(model, variables, split.inputs, rows, fitted)
    labels, words = split.labels[rows], np.asarray(split.word_vectors)
    lcm = lcm or LCMOptions()
    thresholds = np.asarray(thresholds, np.float32)
    importance = np.zeros(embedded.regions.shape[:2], np.float32)
    if len(thresholds):
        in_support = np.unique(np.concatenate(support))
        importance[in_support] = lcm_scores(
            model, variables, embedded.regions[in_support], labels[in_support], words, lcm
        )

    # Of the queries only their global features are used, unless the model asks for more.
    query_locals = embedded.regions if model.query_top else embedded.regions.mean(axis=1, keepdims=True)
    truth = labels[query]
    methods: dict[str, np.ndarray] = {}
    by_theta = np.zeros((len(thresholds), *truth.shape), np.float32)
    kept = np.zeros((n_episodes, len(thresholds)))
    n_queries = query.shape[1]
    chunk = min(n_queries, _QUERY_BATCH)
    jobs = [(e, start) for e in range(n_episodes) for start in range(0, n_queries, chunk)]
    # Episodes whose supports are of one size share a program; under our own protocol that is all of them.
    size = _EPISODE_BATCH * jax.device_count()
    for _, group in itertools.groupby(jobs, key=lambda job: len(support[job[0]])):
        same_size = list(group)
        for first in range(0, len(same_size), size):
            batch = same_size[first : first + size]
            # The last batch is filled up with copies of its last episode, the last queries likewise.
            filled = (batch + batch[-1:] * (size - len(batch)))[parallel.share(size)]
            s = np.stack([support[e] for e, _ in filled])
            q = np.stack([query[e, np.minimum(np.arange(start, start + chunk), n_queries - 1)] for e, start in filled])
            arrays = parallel.shard(
                (
                    *(embedded.pooled[s], embedded.regions[s], embedded.regions[s], importance[s], labels[s]),
                    *(embedded.pooled[q], query_locals[q], embedded.regions[q]),
                )
            )
            specs = (parallel.REPLICATED,) * 4 + (parallel.SHARDED,) * len(arrays)
            scored = parallel.pmapped(_score_batch, model, lcm.score_scaling, ridge or RidgeOptions(), specs=specs)
            out, by_threshold, fraction = parallel.gather(scored(variables, words, thresholds, fitted, *arrays))
            for i, (e, start) in enumerate(batch):
                stop = min(start + chunk, n_queries)
                for name, value in out.items():
                    methods.setdefault(name, np.zeros(truth.shape, value.dtype))[e, start:stop] = value[
                        i, : stop - start
                    ]
                by_theta[:, e, start:stop] = by_threshold[i, :, : stop - start]
                kept[e] = fraction[i]
    for name, value in (*methods.items(), ("lcm", by_theta.swapaxes(0, 1))):
        require_finite(name, value)
    return Scores(
        labels=truth,
        methods=methods,
        lcm=by_theta,
        chance=np.random.default_rng(np.asarray(jax.random.key_data(chance_key))).random(truth.shape),
        kept=kept.mean(axis=0),
    )


def require_finite(name: str, scores: np.ndarray) -> None:
    """Of NaN, metrics would make a number like any other.

    Args:
      name: of the method.
      scores: float [E, ...].

    Raises:
      InputError: one of them is NaN or infinite.
    """
    wrong = np.flatnonzero(~np.isfinite(scores).reshape(len(scores), -1).all(axis=1))
    if len(wrong):
        raise InputError(
            f"the scores of {name} are not finite in {len(wrong)} of {len(scores)} episodes, the first is number "
            f"{wrong[0]}: were its model and the features made with sane settings?"
        )


def score_peer(
    score: Callable, trained, split: View, *, key: jax.Array, n_episodes: int, n_shot: int, n_query: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Scores the queries of the very episodes of ``score_episodes`` by a peer, on one device.

    Args:
      score: see ``baselines.Peer``.
      trained: what its training returned.
      split: the images and labels; its inputs are local features, see ``with_features``.
      key: that of ``score_episodes``.
      n_episodes: E.
      n_shot: K.
      n_query: see ``score_episodes``.
      name: of the peer, for the report of progress.

    Returns:
      (probabilities float32 [E, Q, C], ground truth bool [E, Q, C]).
    """
    episode_key, peer_key = jax.random.split(key)
    support, query = draw(episode_key, split, n_episodes, n_shot, n_query)
    truth, words = split.labels[query], jnp.asarray(split.word_vectors)
    chunk = min(query.shape[1], _QUERY_BATCH)
    jobs = [(e, start) for e in range(n_episodes) for start in range(0, query.shape[1], chunk)]
    last, peer_keys = query.shape[1] - 1, jax.random.split(peer_key, n_episodes)

    def read(job):
        e, start = job
        # The last queries are filled up with copies of the very last, so one program serves all.
        rows = support[e], query[e, np.minimum(np.arange(start, start + chunk), last)]
        return [np.asarray(x, np.float32).reshape(len(x), -1, x.shape[-1]) for x in map(split.inputs, rows)]

    scored = jax.jit(score)
    probabilities = np.zeros(truth.shape, np.float32)
    progress = track(jobs, total=len(jobs), description=f"{name}, {n_shot}-shot", unit="episodes")
    for (e, start), (s, q) in zip(progress, parallel.prefetch(read, jobs), strict=True):
        found = scored(trained, peer_keys[e], s, split.labels[support[e]], q, words)
        stop = min(start + chunk, query.shape[1])
        probabilities[e, start:stop] = found[: stop - start]
    require_finite(name, probabilities)
    return probabilities, truth


def with_features(model: BaseModel, variables, split: View) -> View:
    """The split with local features for inputs, held in memory; where the model has no backbone, they are that already.

    Args:
      model: the model.
      variables: its parameters and batch statistics.
      split: its inputs are those of the model.
    """
    if model.backbone is None:
        return split
    (features,) = map_batches(_locals, model, np.arange(len(split.labels)), lambda r: (split.inputs(r),), variables)
    return split._replace(inputs=features.astype(np.float16).__getitem__)  # half, as in the cache of features


def draw(key, split: View, n_episodes: int, n_shot: int, n_query: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Supports, one int [S] per episode, and queries, int [E, Q], by the protocol of the split."""
    if split.support is None:
        episodes = sample_episodes(key, split.labels, n_episodes=n_episodes, n_shot=n_shot, n_query=n_query)
        return list(np.asarray(episodes.support)), np.asarray(episodes.query)
    pool = np.flatnonzero(split.support)
    keys = [jax.random.fold_in(key, i) for i in range(n_episodes)]
    support = [pool[sample_laso_support(k, split.labels[pool], n_shot=n_shot)] for k in keys]
    return support, np.tile(np.flatnonzero(~split.support), (n_episodes, 1))


def calibrate(scores: Scores) -> dict[str, tuple[float, float]]:
    """Slope and intercept of ``word_ridge.probabilities`` for the methods in ``CALIBRATED``.

    Args:
      scores: of validation episodes; logistic regression on all their queries and labels.
    """
    y = scores.labels.ravel().astype(np.float64)

    def loss(parameters, s):
        logits = parameters[0] * s + parameters[1]
        residual = expit(logits) - y
        return np.mean(np.logaddexp(0, logits) - y * logits), np.array([np.mean(residual * s), np.mean(residual)])

    fits = {}
    for name in (name for name in CALIBRATED if name in scores.methods):
        s = scores.methods[name].ravel().astype(np.float64)
        fits[name] = tuple(minimize(loss, (1.0, -2.0), (s,), jac=True, bounds=((1e-3, None), (None, None))).x.tolist())
    return fits


def summarise(
    scores: Scores, theta_index: int, calibration: dict[str, tuple[float, float]]
) -> tuple[dict, dict[str, np.ndarray]]:
    """Metrics with 95 % intervals, and what they are the means of.

    Args:
      scores: of all episodes.
      theta_index: which of the thresholds is "lcm", chosen elsewhere (on validation).
      calibration: of ``calibrate``, on validation.

    Returns:
      ("methods", "paired", "chance", "calibration_error" as ``results.json`` holds them; ``episode_values``).
    """
    every = scores.methods | {"lcm": scores.lcm[theta_index], "chance": scores.chance}
    for name, (slope, intercept) in calibration.items():
        every[name] = expit(slope * scores.methods[name].astype(np.float64) + intercept)
    values = {name: multilabel_metrics(value, scores.labels) for name, value in every.items()}
    summary = {name: {m: mean_and_ci95(v[m]) for m in METRICS} for name, v in values.items()}
    paired = {
        f"{a}-{b}": {m: mean_and_ci95(values[a][m] - values[b][m]) for m in METRICS}
        for a, b in PAIRS
        if a in values and b in values
    }
    entry = {
        "methods": {m: summary[m] for m in (*METHODS, *VARIANTS) if m in summary},
        "paired": paired,
        "chance": summary["chance"],
        "calibration_error": {
            m: calibration_error(every[m], scores.labels) for m in (*METHODS, *VARIANTS) if m in every
        },
    }
    return entry, episode_values(values)


def episode_values(values: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{method: {metric: float64 [E]}} -> {"method.metric": float32 [E]}, the arrays of an ``episodes_*`` file."""
    return {f"{name}.{m}": v.astype(np.float32) for name, by_metric in values.items() for m, v in by_metric.items()}


def results_table(results: list[dict]) -> str:
    """``results.json`` as the table that a run ends with: percent, 95 % intervals over episodes."""
    columns = (("Ma-AP", "macro_ap"), ("Mi-AP", "micro_ap"), ("Ma-F1", "macro_f1"), ("Mi-F1", "micro_f1"))

    def row(name, values, metrics=METRICS):
        cells = [f"{100 * values[m]['mean']:6.1f} ± {100 * values[m]['ci95']:3.1f}" for _, m in columns if m in metrics]
        return f"  {name:<{width}}" + "  ".join(cells)

    width = max(len(name) + 4 for result in results for name in (*result["methods"], *result["paired"]))
    lines = []
    for result in results:
        lines.append("")
        lines.append(
            f"{result['dataset']}, {result['n_shot']}-shot: {result['episodes']} episodes of novel labels, "
            "%, mean ± 95 % interval over episodes"
        )
        lines.append(f"  {'method':<{width}}" + "  ".join(f"{title:>12}" for title, _ in columns) + "   ECE")
        lines.append(row("chance", result["chance"], ("macro_ap", "micro_ap")))
        for name, values in result["methods"].items():
            lines.append(row(name, values) + f"  {100 * result['calibration_error'][name]:4.1f}")
        lines.append("  paired differences, method - method on the same episodes")
        lines += [row(pair.replace("-", " - "), values) for pair, values in result["paired"].items()]
        lines.append(f"  lcm: theta {result['theta']['chosen']}, chosen on validation labels")
    lines.append(
        "  F1 at probability 0.5, ECE: calibration error. Only word_ridge and region_word_ridge are calibrated,"
    )
    lines.append("  on support and validation labels; the F1 of the others is not tuned.")
    return "\n".join(lines)


def macro_ap(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean Ma-AP over episodes: float [E, Q, C], bool [E, Q, C]."""
    return float(multilabel_metrics(scores, labels)["macro_ap"].mean())


def _embed(model: BaseModel, variables, fitted, inputs) -> Embedded:
    features = model.apply(variables, inputs, method="features")
    flat = features.reshape(len(features), -1, features.shape[-1])
    regions = flat[..., :0] if fitted is None else word_ridge.regions(fitted, flat)
    return Embedded(flat.mean(axis=1), model.apply(variables, features, method="regions"), regions)


@functools.partial(jax.jit, static_argnums=0)
def embed_batch(model: BaseModel, variables, inputs, fitted: word_ridge.Fitted | None) -> Embedded:
    """``embed`` for one batch of inputs, on one device."""
    return _embed(model, variables, fitted, inputs)


def _locals(model, variables, inputs):
    return (model.apply(variables, inputs, method="features"),)


def _globals(model, variables, inputs):
    return (model.apply(variables, inputs, method="features").mean(axis=(1, 2)),)


def _lcm_scores(static, variables, word_vectors, regions, labels):
    model, options = static
    words = model.apply(variables, word_vectors, method="words")
    return (model.apply(variables, regions, labels, words, options, method="lcm_scores"),)


def _score_batch(model, score_scaling, ridge, variables, word_vectors, thresholds, fitted, *episodes):
    """All methods on a batch of episodes, whose arrays have a leading axis.

    Args:
      fitted: see ``score_episodes``.
      *episodes: of the support, global features [S, n], locals [S, L, d_joint], regions [S, L, d], LCM's raw scores
        [S, L] and labels [S, C]; of the queries, global features, locals as ``BaseModel.query_logits`` takes them,
        regions.

    Returns:
      ({method: [E, Q, C]}, LCM's [E, T, Q, C], the kept fractions [E, T]).
    """
    words = model.apply(variables, word_vectors, method="words")

    def trained(s_local, score, labels, q):
        return _score_by_model(model, variables, score_scaling, words, thresholds, s_local, score, labels, q)

    def joined(s_global, s_local, s_regions, score, labels, q_global, q, q_regions):
        return _score_joined(
            *(model, variables, score_scaling, fitted, ridge, words, word_vectors),
            *(s_global, s_local, s_regions, score, labels, q_global, q, q_regions),
        )

    def closed(s_global, s_regions, labels, q_global, q_regions):
        return _score_in_closed_form(
            fitted, ridge, model.scale, word_vectors, s_global, s_regions, labels, q_global, q_regions
        )

    s_global, s_local, s_regions, score, labels, q_global, q, q_regions = episodes
    out, by_threshold, kept = jax.vmap(trained)(s_local, score, labels, q)
    if fitted is not None:
        # Not vmapped: the region kernel's blocks fit the cache one episode at a time.
        out |= jax.lax.map(lambda e: closed(*e), (s_global, s_regions, labels, q_global, q_regions))
        if ridge.variants:
            out |= jax.lax.map(lambda e: joined(*e), episodes)
    return out, by_threshold, kept


def _score_by_model(model, variables, score_scaling, words, thresholds, s_local, score, labels, q):
    """The trained model on one episode, by words alone, with all regions, and with those that LCM keeps."""

    def classify(prototypes):
        return jax.nn.sigmoid(model.query_logits(q, prototypes))

    keep = select_positions(score, thresholds[:, None, None], scale=model.scale, score_scaling=score_scaling)
    variants = jnp.concatenate([jnp.ones((1, *score.shape), bool), keep])  # Base keeps everything
    by_variant = jax.vmap(lambda k: classify(model.apply(variables, s_local, labels, words, k, method="prototypes")))(
        variants
    )
    by_words = jax.nn.sigmoid(cosine_logits(q.mean(axis=1), words, model.scale))
    return {"zero_shot": by_words, "base": by_variant[0]}, by_variant[1:], keep.mean(axis=(1, 2))


def _score_in_closed_form(fitted, ridge, scale, word_vectors, s_global, s_regions, labels, q_global, q_regions):
    """The methods without training on one episode."""
    centred, q_centred = unit(s_global - fitted.mean), unit(q_global - fitted.mean)
    by_words = word_ridge.word_ridge(
        fitted, s_global, labels, q_global, word_vectors, beta=ridge.beta, regulariser=ridge.regulariser
    )
    by_regions = word_ridge.region_word_ridge(
        fitted,
        *(s_global, s_regions, labels, q_global, q_regions, word_vectors),
        beta=ridge.beta,
        regulariser=ridge.region_regulariser,
    )
    return {
        "prototypes": closed_form.prototypes(s_global, labels, q_global, scale=scale),
        "prototypes_centered": closed_form.prototypes(centred, labels, q_centred, scale=scale),
        "ridge": closed_form.ridge(centred, labels, q_centred),
        "word_ridge": word_ridge.standardised(by_words, labels),
        "region_word_ridge": word_ridge.standardised(by_regions, labels),
    }


def _score_joined(
    model, variables, score_scaling, fitted, ridge, words, word_vectors, s_global, s_local, s_regions, score, labels,
    q_global, q, q_regions,
):  # fmt: skip
    """``VARIANTS`` on one episode."""
    keep = select_positions(score, ridge.variants_threshold, scale=model.scale, score_scaling=score_scaling)
    by_regions = word_ridge.region_word_ridge(
        fitted,
        *(s_global, s_regions, labels, q_global, q_regions, word_vectors),
        keep=keep,
        beta=ridge.beta,
        regulariser=ridge.region_regulariser,
    )
    out = {"region_word_ridge_lcm": word_ridge.standardised(by_regions, labels)}
    for name, kept in (("base_ridge", jnp.ones_like(keep)), ("lcm_ridge", keep)):
        prototypes = model.apply(variables, s_local, labels, words, kept, method="prototypes")
        prior, q_prior = (
            word_ridge.centred_prior(cosine_logits(x.mean(axis=1), prototypes, 1.0), ridge.beta) for x in (s_local, q)
        )
        x, q_x = unit(s_global - fitted.mean), unit(q_global - fitted.mean)
        by_prototypes = word_ridge.kernel_ridge(x @ x.T, q_x @ x.T, prior, q_prior, labels, ridge.regulariser)
        out[name] = word_ridge.standardised(by_prototypes, labels)
    return out
