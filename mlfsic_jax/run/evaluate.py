"""Evaluation: any methods on the same fixed episodes (paper sections 4.4 and 5.1.2). The only loop over episodes."""

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from mlfsic_jax.core.episodes import Episode, sample_episodes, sample_laso_support
from mlfsic_jax.core.functional import require_zero_one
from mlfsic_jax.core.metrics import METRICS, calibration_error, mean_and_ci95, multilabel_metrics
from mlfsic_jax.data.features import View
from mlfsic_jax.methods import Method
from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.progress import track

_EMBED_BATCH = 64  # images on each device
_EPISODES_AT_ONCE = 4  # on each device
_EPISODES_PER_CALL = 52  # on each device; what all share (a model's kernels, from the words) is made once a call
_QUERY_BATCH = 256  # LaSO's protocol asks for thousands of queries

Methods = Mapping[str, Method]
Trained = Mapping[str, Mapping[str, Any]]  # method -> what its training gave
Members = Mapping[str, tuple[Method, str]]  # of a program: each with the method that shares its ``embed_support``


class Scores(NamedTuple):
    """The scores of every method on every episode."""

    labels: np.ndarray  # bool [E, Q, C], ground truth of the queries
    methods: dict[str, np.ndarray]  # float [E, Q, C]; [T, E, Q, C] where the tuned leaf of ``trained`` holds T values
    statistics: dict[str, dict[str, np.ndarray]]  # ``Method.statistics``, float or [T], means over episodes
    chance: np.ndarray  # float [E, Q, C], uniformly random


def evaluate(method: Method, trained, features, labels, words, episodes: Episode) -> tuple[np.ndarray, np.ndarray]:
    """One method on given episodes: (float [E, Q, C], ground truth bool [E, Q, C]).

    The first are probabilities, or the scores of a method that is ``Method.calibrated``.

    Args:
      method: e.g. ``methods.create("ridge")``; ``trained`` is what its ``train`` gave.
      features: float [I, h, w, n], local features of all images, with their ``labels`` bool [I, C].
      words: float [C, d_w], word vectors; what ``inputs.class_mixtures`` gives for a method with ``words_from``; None
        for one that needs none.
      episodes: int32 [E, S] and [E, Q] rows, see ``sample_episode``.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    require_zero_one(labels)
    labels = labels.astype(bool)
    names = tuple(map(str, range(labels.shape[1])))
    view = View(features.__getitem__, labels, words, names, named_vectors=lambda _: words)
    support, query = (np.atleast_2d(np.asarray(rows)) for rows in episodes)
    scores, _ = _score({"method": method}, {"method": trained}, view, list(support), query)
    return probabilities(method, scores["method"]), labels[query]


def score_episodes(
    methods: Methods, trained: Trained, view: View, *, key: jax.Array, n_episodes: int, n_shot: int, n_query: int
) -> Scores:
    """Scores the queries of the E fixed episodes of a key by every method.

    Under LaSO's protocol ``n_query`` is not used: all images that may not be support are queries. ``InputError`` when
    scores are not finite.
    """
    episode_key, chance_key = jax.random.split(key)
    support, query = draw(episode_key, view, n_episodes, n_shot, n_query)
    truth = view.labels[query]
    scores, statistics = _score(methods, trained, view, support, query)
    for name, value in scores.items():
        require_finite(name, value if value.ndim == 3 else value.swapaxes(0, 1))
    chance = np.random.default_rng(np.asarray(jax.random.key_data(chance_key))).random(truth.shape)
    return Scores(truth, scores, statistics, chance)


def draw(key, view: View, n_episodes: int, n_shot: int, n_query: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Supports, one int [S] per episode, and queries, int [E, Q], by the protocol of the view."""
    if view.support is None:
        episodes = sample_episodes(key, view.labels, n_episodes=n_episodes, n_shot=n_shot, n_query=n_query)
        return list(np.asarray(episodes.support)), np.asarray(episodes.query)
    if view.support.dtype.names:  # published supports
        pool, runs = view.support["pool"], view.support[str(n_shot)]
        support = [np.flatnonzero(runs[:, i]) for i in range(n_episodes)]
    else:
        pool, keys = view.support, [jax.random.fold_in(key, i) for i in range(n_episodes)]
        rows = np.flatnonzero(pool)
        support = [rows[sample_laso_support(k, view.labels[rows], n_shot=n_shot)] for k in keys]
    return support, np.tile(np.flatnonzero(~pool), (n_episodes, 1))


def embed(methods: Methods, trained: Trained, view: View, rows: np.ndarray) -> dict[Hashable, dict[str, np.ndarray]]:
    """``Method.embed`` of the images ``rows``, once for methods that share it: ``embed_key`` -> arrays [B, ...]."""
    by_key = {methods[name].embed_key(trained[name]): name for name in reversed(methods)}
    static = tuple(methods[name] for name in by_key.values())
    shared = parallel.replicate([trained[name] for name in by_key.values()])
    return dict(zip(by_key, map_batches(_embed, static, rows, lambda r: (view.inputs(r),), shared), strict=True))


def map_batches(fn: Callable, static, rows: np.ndarray, read: Callable, *replicated) -> Any:
    """Maps the images ``rows``, int [B], over all devices, in batches of one size, to NumPy.

    ``fn(static, *replicated, *arrays of a batch)`` gives a pytree of arrays with one row for each image, ``static``
    being hashable and ``replicated`` what all devices get. ``read`` turns int [b] into a tuple of arrays; every process
    reads its own share of a batch.
    """
    size, parts = _EMBED_BATCH * jax.device_count(), []
    cut = [rows[start : start + size] for start in range(0, len(rows), size)]
    # Filled up with copies of the last image to one size, so that one program serves all batches.
    filled = [np.concatenate([batch, np.full(size - len(batch), batch[-1])]) for batch in cut]
    inputs = parallel.prefetch(lambda batch: read(batch[parallel.share(size)]), filled)
    for batch, arrays in zip(cut, map(parallel.shard, inputs), strict=True):
        specs = (parallel.REPLICATED,) * len(replicated) + (parallel.SHARDED,) * len(arrays)
        result = parallel.gather(parallel.pmapped(fn, static, specs=specs)(*replicated, *arrays))
        parts.append(_rows(result, slice(len(batch))))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _score(methods: Methods, trained: Trained, view: View, support: list[np.ndarray], query: np.ndarray):
    """(name -> scores, name -> statistics) of given episodes, see ``Scores``."""
    rows, where = np.unique(np.concatenate([*support, query.ravel()]), return_inverse=True)
    *support, flat = np.split(where, np.cumsum([len(s) for s in support]))
    rows = np.pad(rows, (0, -len(rows) % _EMBED_BATCH), "edge")  # evaluations of about one size share their programs
    query, labels = flat.reshape(query.shape), view.labels[rows]
    # Each image is embedded once, however many episodes it is in, and stays on the devices.
    embedded = embed(methods, trained, view, rows)
    there = {key: parallel.replicate(images) for key, images in embedded.items()}
    vectors = {source: view.words(source) for source in {method.words_from for method in methods.values()}}
    words, labels_there = parallel.replicate((vectors, labels))
    sharing: dict[Hashable, str] = {}
    programs: dict[Hashable, dict[str, tuple[Method, str]]] = {}
    for name, method in methods.items():
        shared = sharing.setdefault(method.support_key(trained[name]), name)
        # Programs that hold several methods are compiled sooner than one for each; those that share are in one.
        program = shared if methods[shared].on_request else methods[shared].batched
        programs.setdefault(program, {})[name] = (method, shared)
    scores, statistics = {}, {}
    for members in programs.values():
        own = parallel.replicate({name: trained[name] for name in members})
        images = {name: there[methods[name].embed_key(trained[name])] for name in members}
        found, noted = _score_together(members, (own, words, images, labels_there), support, query)
        scores, statistics = scores | found, statistics | noted
    return {name: scores[name] for name in methods}, {name: statistics[name] for name in methods}


def _rows(tree: Any, rows) -> Any:
    return jax.tree.map(lambda x: x[rows], tree)


def _score_together(members: Members, arrays: tuple, support: list[np.ndarray], query: np.ndarray):
    """(name -> scores, name -> statistics) of methods in one program."""
    n_episodes, n_queries = query.shape
    chunk = min(n_queries, _QUERY_BATCH)
    jobs = [(e, start) for e in range(n_episodes) for start in range(0, n_queries, chunk)]
    # Episodes whose supports are of one size share a program; under our own protocol that is all of them.
    groups = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: len(support[job[0]]))]
    on_device = -(-min(map(len, groups)) // jax.device_count())
    name, (method, _) = next(iter(members.items()))
    most = _EPISODES_AT_ONCE if method.on_request else _EPISODES_PER_CALL
    size = min(most, -(-on_device // _EPISODES_AT_ONCE) * _EPISODES_AT_ONCE) * jax.device_count()
    batches = [group[first : first + size] for group in groups for first in range(0, len(group), size)]
    # Methods on request take minutes, and LCM's tuning one.
    if method.on_request or (len(batches) > 1 and not method.batched):
        what = f"evaluating {name}" + (f" and {len(members) - 1} more methods" if len(members) > 1 else "")
        batches = track(batches, total=len(batches), description=what, unit="batches of episodes")
    scores, statistics = {}, []
    specs = (parallel.REPLICATED,) * len(arrays) + (parallel.SHARDED,) * 2
    for batch in batches:
        # The last batch is filled up with copies of its last episode, the last queries likewise.
        filled = (batch + batch[-1:] * (size - len(batch)))[parallel.share(size)]
        s = np.stack([support[e] for e, _ in filled])
        q = np.stack([query[e, np.minimum(np.arange(start, start + chunk), n_queries - 1)] for e, start in filled])
        program = parallel.pmapped(_score_batch, tuple(members.items()), specs=specs)
        found, noted = parallel.gather(program(*arrays, *parallel.shard((s, q))))
        for name, part in found.items():
            if name not in scores:
                scores[name] = np.zeros((*part.shape[1:-2], n_episodes, n_queries, part.shape[-1]), part.dtype)
            for i, (e, start) in enumerate(batch):
                stop = min(start + chunk, n_queries)
                scores[name][..., e, start:stop, :] = part[i, ..., : stop - start, :]
        statistics += [_rows(noted, i) for i, (_, start) in enumerate(batch) if start == 0]
    return scores, jax.tree.map(lambda *x: np.mean(x, axis=0), *statistics)


def _score_batch(members: tuple[tuple[str, tuple[Method, str]], ...], trained, words, images, labels, support, query):
    """A batch of episodes, int [E, S] and [E, Q] rows of images: ({name: scores [E, .., Q, C]}, {name: statistics})."""

    def episode(rows):
        results, supports, truth = {}, {}, labels[rows[0]]
        for name, (method, shared) in members:
            s, q = (_rows(images[name], r) for r in rows)
            w = words[method.words_from]
            if shared not in supports:
                supports[shared] = method.embed_support(trained[name], s, truth, w)
            score = functools.partial(_score_episode, method, w, truth, {**s, **supports[shared]}, q)
            if method.tuned and jnp.ndim(trained[name][method.tuned]):
                score = jax.vmap(score, ({key: 0 if key == method.tuned else None for key in trained[name]},))
            results[name] = score(trained[name])
        return tuple({name: result[part] for name, result in results.items()} for part in (0, 1))

    batched = members[0][1][0].batched
    return jax.lax.map(episode, (support, query), batch_size=_EPISODES_AT_ONCE if batched else None)


def _score_episode(method: Method, words, labels, support, query, trained):
    state = method.fit(trained, support, labels, words)
    return method.score(trained, state, query), method.statistics(state)


def _embed(methods: tuple[Method, ...], trained, features):
    regions = features.reshape(len(features), -1, features.shape[-1]).astype(jnp.float32)
    return tuple(method.embed(t, regions) for method, t in zip(methods, trained, strict=True))


def require_finite(name: str, scores: np.ndarray) -> None:
    """``InputError`` for NaN or infinity: metrics would turn such scores, float [E, ...], into ordinary numbers."""
    wrong = np.flatnonzero(~np.isfinite(scores).reshape(len(scores), -1).all(axis=1))
    if len(wrong):
        raise InputError(
            f"the scores of {name} are not finite in {len(wrong)} of {len(scores)} episodes, first in number "
            f"{wrong[0]}: check the settings that its model and the features were made with"
        )


def calibrate(methods: Methods, scores: Scores) -> dict[str, tuple[float, float]]:
    """Slope and intercept for the methods that are ``calibrated``: logistic regression on all validation scores."""
    y = scores.labels.ravel().astype(np.float64)

    def loss(parameters, s):
        logits = parameters[0] * s + parameters[1]
        residual = expit(logits) - y
        return np.mean(np.logaddexp(0, logits) - y * logits), np.array([np.mean(residual * s), np.mean(residual)])

    fits = {}
    for name in (name for name in scores.methods if methods[name].calibrated):
        s = scores.methods[name].ravel().astype(np.float64)
        fits[name] = tuple(minimize(loss, (1.0, -2.0), (s,), jac=True, bounds=((1e-3, None), (None, None))).x.tolist())
    return fits


def probabilities(method: Method, scores: np.ndarray, calibration: tuple[float, float] | None = None) -> np.ndarray:
    """A method's scores as probabilities: calibrated by slope and intercept where there are any."""
    if calibration is None and not method.logits:
        return scores
    slope, intercept = calibration or (1.0, 0.0)
    return expit(slope * np.asarray(scores, np.float64) + intercept)


def summarise(methods: Methods, scores: Scores, calibration: Mapping) -> tuple[dict, dict[str, np.ndarray]]:
    """("methods", "paired", "chance", "calibration_error" as in ``results.json``; ``episode_values``)."""
    every = {name: probabilities(methods[name], s, calibration.get(name)) for name, s in scores.methods.items()}
    values = {name: multilabel_metrics(value, scores.labels) for name, value in every.items()}
    chance = multilabel_metrics(scores.chance, scores.labels)
    pairs = [(name, methods[name].against) for name in values if methods[name].against in values]
    differences = {f"{a}-{b}": {m: values[a][m] - values[b][m] for m in METRICS} for a, b in pairs}

    def with_interval(values):
        return {m: mean_and_ci95(values[m]) for m in METRICS}

    entry = {
        "methods": {name: with_interval(v) for name, v in values.items()},
        "paired": {name: with_interval(v) for name, v in differences.items()},
        "chance": with_interval(chance),
        "calibration_error": {name: calibration_error(value, scores.labels) for name, value in every.items()},
    }
    return entry, episode_values(values | {"chance": chance})


def episode_values(values: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{method: {metric: float64 [E]}} -> {"method.metric": float32 [E]}, the arrays of an ``episodes_*`` file."""
    return {f"{name}.{m}": v.astype(np.float32) for name, by_metric in values.items() for m, v in by_metric.items()}


def macro_ap(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean Ma-AP over episodes: float [E, Q, C], bool [E, Q, C]."""
    return float(multilabel_metrics(scores, labels)["macro_ap"].mean())


def results_table(results: list[dict]) -> str:
    """``results.json`` as the table that a run ends with: percent, 95 % intervals over episodes."""
    columns = (("Ma-AP", "macro_ap"), ("Mi-AP", "micro_ap"), ("Ma-F1", "macro_f1"), ("Mi-F1", "micro_f1"))

    def row(name, values, metrics=METRICS):
        cells = [f"{100 * values[m]['mean']:6.1f} ± {100 * values[m]['ci95']:3.1f}" for _, m in columns if m in metrics]
        return f"  {name:<{width}}" + "  ".join(cells)

    width = max(len(name) + 4 for result in results for name in (*result["methods"], *result["paired"]))
    lines = []
    for result in results:
        heading = f"{result['dataset']}, {result['n_shot']}-shot: {result['episodes']} episodes of novel labels"
        errors = result["calibration_error"]
        lines += [
            *("", f"{heading}, %, mean ± 95 % interval over episodes"),
            f"  {'method':<{width}}" + "  ".join(f"{title:>12}" for title, _ in columns) + "   ECE",
            row("chance", result["chance"], ("macro_ap", "micro_ap")),
            *(row(name, values) + f"  {100 * errors[name]:4.1f}" for name, values in result["methods"].items()),
            "  paired differences, method - method on the same episodes",
            *(row(pair.replace("-", " - "), values) for pair, values in result["paired"].items()),
            *(f"  {name}: theta {value}, chosen on validation labels" for name, value in result["tuned"].items()),
        ]
    calibrated = [name for name in results[0]["methods"] if name in results[0]["validation"]["calibration"]]
    lines.append("  F1 at probability 0.5, ECE: calibration error; F1 is tuned for calibrated methods only.")
    if calibrated:
        lines.append(f"  Calibrated on support and validation labels: {', '.join(calibrated)}.")
    return "\n".join(lines)
