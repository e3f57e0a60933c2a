"""Evaluation: every method on the same fixed episodes (paper sections 4.4 and 5.1.2)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.baselines import closed_form
from mlfsic_jax.episodes import sample_episodes
from mlfsic_jax.lcm import select_positions
from mlfsic_jax.metrics import METRICS, mean_and_ci95, multilabel_metrics
from mlfsic_jax.models import BaseModel, LCMOptions
from mlfsic_jax.similarity import cosine_logits, unit

METHODS = ("zero_shot", "prototypes", "prototypes_centered", "ridge", "base", "lcm")
PAIRS = (("lcm", "base"),)
_EMBED_BATCH = 64
_EPISODE_BATCH = 4


class SplitView(NamedTuple):
    """One split as training and evaluation see it.

    Attributes:
      inputs: ``rows int [B] -> array [B, ...]``, the model's inputs (local features or photos) of the split's images.
      labels: bool [I, C].
      word_vectors: float32 [C, d_w].
      label_names: C names, for messages.
    """

    inputs: Callable[[np.ndarray], np.ndarray]
    labels: np.ndarray
    word_vectors: np.ndarray
    label_names: tuple[str, ...]


class Embedded(NamedTuple):
    """Images through backbone and A_visual: global features float32 [I, n], locals float32 [I, L, d_joint]."""

    globals_: np.ndarray
    locals_: np.ndarray


class Scores(NamedTuple):
    """What every method says of every episode, as probabilities.

    Attributes:
      labels: bool [E, Q, C], ground truth of the queries.
      methods: name -> float [E, Q, C], all methods but LCM.
      lcm: float [T, E, Q, C], one block per threshold.
      chance: float [E, Q, C], uniformly random.
      kept: float [T], the mean fraction of positions that LCM keeps.
    """

    labels: np.ndarray
    methods: dict[str, np.ndarray]
    lcm: np.ndarray
    chance: np.ndarray
    kept: np.ndarray


def embed(model: BaseModel, variables, inputs, rows: np.ndarray) -> Embedded:
    """Runs images through the model's backbone and A_visual, in batches of one size.

    Args:
      model: the model, with or without a backbone.
      variables: its parameters and batch statistics.
      inputs: see ``SplitView``.
      rows: int [B], which images.
    """
    globals_, locals_ = [], []
    for start in range(0, len(rows), _EMBED_BATCH):
        batch = rows[start : start + _EMBED_BATCH]
        padded = np.concatenate([batch, np.full(_EMBED_BATCH - len(batch), batch[-1])])
        g, u = _embed_batch(model, variables, inputs(padded))
        globals_.append(np.asarray(g)[: len(batch)])
        locals_.append(np.asarray(u)[: len(batch)])
    return Embedded(np.concatenate(globals_), np.concatenate(locals_))


def mean_feature(model: BaseModel, variables, split: SplitView, limit: int = 4096) -> np.ndarray:
    """float32 [n]: the mean global feature of a split's images (of ``limit`` evenly spaced ones, if there are more)."""
    rows = np.unique(np.linspace(0, len(split.labels) - 1, min(limit, len(split.labels))).astype(int))
    total = 0.0
    for start in range(0, len(rows), _EMBED_BATCH):
        batch = rows[start : start + _EMBED_BATCH]
        total = total + embed(model, variables, split.inputs, batch).globals_.sum(axis=0, dtype=np.float64)
    return (total / len(rows)).astype(np.float32)


def score_episodes(
    model: BaseModel,
    variables,
    split: SplitView,
    *,
    key: jax.Array,
    n_episodes: int,
    n_shot: int,
    n_query: int,
    thresholds=(),
    lcm: LCMOptions | None = None,
    mean: np.ndarray | None = None,
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
      n_query: query images per label.
      thresholds: T values of theta for LCM; none leaves LCM out.
      lcm: how LCM runs.
      mean: float [n], mean training feature for the centred baselines; None leaves out all baselines but Base.
    """
    episode_key, chance_key = jax.random.split(key)
    episodes = sample_episodes(episode_key, split.labels, n_episodes=n_episodes, n_shot=n_shot, n_query=n_query)
    support, query = np.asarray(episodes.support), np.asarray(episodes.query)
    rows, where = np.unique(np.concatenate([support.ravel(), query.ravel()]), return_inverse=True)
    support, query = where[: support.size].reshape(support.shape), where[support.size :].reshape(query.shape)

    embedded = embed(model, variables, split.inputs, rows)
    labels, words = split.labels[rows], jnp.asarray(split.word_vectors)
    lcm = lcm or LCMOptions()
    thresholds = jnp.asarray(thresholds, jnp.float32)
    importance = np.zeros(embedded.locals_.shape[:2], np.float32)
    if len(thresholds):
        in_support = np.unique(support)
        for start in range(0, len(in_support), _EMBED_BATCH):
            batch = in_support[start : start + _EMBED_BATCH]
            padded = np.concatenate([batch, np.full(_EMBED_BATCH - len(batch), batch[-1])])
            scores = _lcm_batch(model, variables, embedded.locals_[padded], labels[padded], words, lcm)
            importance[batch] = np.asarray(scores)[: len(batch)]

    methods, lcm_scores, kept = {}, [], []
    pooled = embedded.locals_.mean(axis=1)
    for start in range(0, n_episodes, _EPISODE_BATCH):
        # The last batch is filled up with copies of its last episode, so that one program serves all.
        batch = np.minimum(np.arange(start, start + _EPISODE_BATCH), n_episodes - 1)
        s, q = support[batch], query[batch]
        one_mean = None if mean is None else jnp.asarray(mean)
        out, by_threshold, fraction = _score_batch(
            model, variables, lcm.score_scaling, words, thresholds, one_mean,
            embedded.globals_[s], embedded.locals_[s], importance[s], labels[s], embedded.globals_[q], pooled[q],
        )  # fmt: skip
        real = min(_EPISODE_BATCH, n_episodes - start)
        for name, value in out.items():
            methods.setdefault(name, []).append(np.asarray(value)[:real])
        lcm_scores.append(np.asarray(by_threshold)[:real])
        kept.append(np.asarray(fraction)[:real])
    truth = labels[query]
    return Scores(
        labels=truth,
        methods={name: np.concatenate(value) for name, value in methods.items()},
        lcm=np.concatenate(lcm_scores).swapaxes(0, 1),
        chance=np.asarray(jax.random.uniform(chance_key, truth.shape)),
        kept=np.concatenate(kept).mean(axis=0),
    )


def summarise(scores: Scores, theta_index: int) -> dict:
    """Metrics with 95 % intervals, as ``results.json`` holds them: "methods", "paired" and "chance".

    Args:
      scores: of all episodes.
      theta_index: which of the thresholds is "lcm", chosen elsewhere (on validation).
    """
    every = scores.methods | {"lcm": scores.lcm[theta_index], "chance": scores.chance}
    values = {name: multilabel_metrics(value, scores.labels) for name, value in every.items()}
    summary = {name: {m: mean_and_ci95(v[m]) for m in METRICS} for name, v in values.items()}
    paired = {
        f"{a}-{b}": {m: mean_and_ci95(values[a][m] - values[b][m]) for m in METRICS}
        for a, b in PAIRS
        if a in values and b in values
    }
    return {"methods": {m: summary[m] for m in METHODS if m in summary}, "paired": paired, "chance": summary["chance"]}


def results_table(results: list[dict]) -> str:
    """``results.json`` as the table that a run ends with: percent, 95 % intervals over episodes."""
    columns = (("Ma-AP", "macro_ap"), ("Mi-AP", "micro_ap"), ("Ma-F1", "macro_f1"), ("Mi-F1", "micro_f1"))

    def row(name, values, metrics=METRICS):
        cells = [f"{100 * values[m]['mean']:6.1f} ± {100 * values[m]['ci95']:3.1f}" for _, m in columns if m in metrics]
        return f"  {name:<21}" + "  ".join(cells)

    lines = []
    for result in results:
        lines.append("")
        lines.append(
            f"{result['dataset']}, {result['n_shot']}-shot: {result['episodes']} episodes of novel labels, "
            "%, mean ± 95 % interval over episodes"
        )
        lines.append(f"  {'method':<21}" + "  ".join(f"{title:>12}" for title, _ in columns))
        lines.append(row("chance", result["chance"], ("macro_ap", "micro_ap")))
        lines += [row(name, values) for name, values in result["methods"].items()]
        lines += [row(f"{pair}, paired", values) for pair, values in result["paired"].items()]
        lines.append(f"  lcm: theta {result['theta']['chosen']}, chosen on validation labels")
    lines.append("  F1 at probability 0.5; prototypes are cosines through a sigmoid, so their F1 is not tuned")
    return "\n".join(lines)


def macro_ap(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean Ma-AP over episodes: float [E, Q, C], bool [E, Q, C]."""
    return float(multilabel_metrics(scores, labels)["macro_ap"].mean())


@functools.partial(jax.jit, static_argnums=0)
def _embed_batch(model, variables, inputs):
    features = model.apply(variables, inputs, method="features")
    return features.mean(axis=(1, 2)), model.apply(variables, features, method="locals")


@functools.partial(jax.jit, static_argnums=(0, 5))
def _lcm_batch(model, variables, locals_, labels, word_vectors, options):
    words = model.apply(variables, word_vectors, method="words")
    return model.apply(variables, locals_, labels, words, options, method="lcm_scores")


@functools.partial(jax.jit, static_argnums=(0, 2))
def _score_batch(model, variables, score_scaling, word_vectors, thresholds, mean, *episodes):
    """``_score_episode`` for a batch of episodes."""
    words = model.apply(variables, word_vectors, method="words")
    return jax.vmap(lambda *e: _score_episode(model, variables, score_scaling, words, thresholds, mean, *e))(*episodes)


def _score_episode(
    model, variables, score_scaling, words, thresholds, mean, s_global, s_local, score, labels, q_global, q
):
    """Scores the queries of one episode.

    Args:
      words: [C, d], label embeddings in the joint space.
      s_global, s_local, score, labels: of the support, [S, n], [S, L, d], LCM's raw scores [S, L], [S, C].
      q_global, q: of the queries, [Q, n] before and [Q, d] in the joint space.

    Returns:
      ({method: [Q, C]}, LCM's [T, Q, C], the kept fractions [T]).
    """

    def classify(prototypes):
        return jax.nn.sigmoid(cosine_logits(q, prototypes, model.scale))

    keep = select_positions(score, thresholds[:, None, None], scale=model.scale, score_scaling=score_scaling)
    variants = jnp.concatenate([jnp.ones((1, *score.shape), bool), keep])  # Base keeps everything
    by_variant = jax.vmap(lambda k: classify(model.apply(variables, s_local, labels, words, k, method="prototypes")))(
        variants
    )
    out = {"zero_shot": classify(words), "base": by_variant[0]}
    if mean is not None:
        centred, q_centred = unit(s_global - mean), unit(q_global - mean)
        out["prototypes"] = closed_form.prototypes(s_global, labels, q_global, scale=model.scale)
        out["prototypes_centered"] = closed_form.prototypes(centred, labels, q_centred, scale=model.scale)
        out["ridge"] = closed_form.ridge(centred, labels, q_centred)
    return out, by_variant[1:], keep.mean(axis=(1, 2))
