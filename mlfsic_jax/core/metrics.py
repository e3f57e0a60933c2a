"""The eight metrics of multi-label few-shot classification (paper section 5.1.2).

Plain NumPy in float64: exact ties and exact agreement with scikit-learn matter more here than a device.
"""

import numpy as np

METRICS = tuple(f"{kind}_{name}" for kind in ("macro", "micro") for name in ("ap", "precision", "recall", "f1"))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean of the precision at each positive, by descending score: float [..., N], bool [..., N] -> float64 [...].

    Equal scores count as one threshold, as in scikit-learn: a tie never favours the model. NaN without a positive.
    """
    order = np.argsort(-scores, axis=-1, kind="stable")
    scores = np.take_along_axis(scores, order, axis=-1)
    labels = np.take_along_axis(labels, order, axis=-1)
    n = scores.shape[-1]
    precision = np.cumsum(labels, axis=-1) / np.arange(1, n + 1)
    # Every member of a run of equal scores takes the precision at the run's end.
    run_ends = np.concatenate([scores[..., 1:] != scores[..., :-1], np.ones((*scores.shape[:-1], 1), bool)], axis=-1)
    end = np.where(run_ends, np.arange(n), n - 1)
    end = np.minimum.accumulate(end[..., ::-1], axis=-1)[..., ::-1]
    at_positives = np.where(labels, np.take_along_axis(precision, end, axis=-1), 0.0).sum(axis=-1)
    return _ratio(at_positives, labels.sum(axis=-1), empty=np.nan)


def multilabel_metrics(scores, labels, *, threshold: float = 0.5) -> dict:
    """Macro and micro average precision, precision, recall and F1 of one episode, or of many at once.

    A label without a positive image is left out of the macro metrics; a label with no predicted positive has
    precision 0. Macro-F1 is 2PR / (P + R) of macro precision and recall (CF1 of Zhu et al. 2017), micro-F1 the same of
    the micro pair (OF1).

    Args:
      scores: probabilities, float [..., N, C] (images, labels); leading axes are independent episodes. An
        image has a label where its score is above ``threshold``; AP uses the order of the scores alone.
      labels: ground truth of the same shape, 0/1 or bool.
      threshold: decision threshold on ``scores``.

    Returns:
      ``METRICS`` as fractions: floats for one episode, float64 arrays [...] for many. NaN where undefined (no
      positive at all).

    Raises:
      ValueError: shapes differ or are not [..., N, C], a score is not finite, a label is not 0 or 1.
    """
    scores = np.asarray(scores, np.float64)
    truth = np.asarray(labels)
    if scores.ndim < 2 or scores.shape != truth.shape or 0 in scores.shape:
        raise ValueError(f"scores {scores.shape}, labels {truth.shape}: both must be [..., images, labels], not empty")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    if truth.dtype != bool and not np.isin(truth, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    truth = truth.astype(bool)

    predicted = scores > threshold
    hits = (predicted & truth).sum(axis=-2)  # [..., C]
    n_predicted, n_positive = predicted.sum(axis=-2), truth.sum(axis=-2)
    has_positive = n_positive > 0

    def macro(per_label):  # mean over the labels that have a positive
        total = np.where(has_positive, per_label, 0.0).sum(axis=-1)
        return _ratio(total, has_positive.sum(axis=-1), empty=np.nan)

    pairs = (*scores.shape[:-2], -1)
    result = {
        "macro_ap": macro(average_precision(scores.swapaxes(-1, -2), truth.swapaxes(-1, -2))),
        "macro_precision": macro(_ratio(hits, n_predicted)),
        "macro_recall": macro(_ratio(hits, n_positive)),
        "micro_ap": average_precision(scores.reshape(pairs), truth.reshape(pairs)),
        "micro_precision": _ratio(hits.sum(axis=-1), n_predicted.sum(axis=-1)),
        "micro_recall": _ratio(hits.sum(axis=-1), n_positive.sum(axis=-1), empty=np.nan),
    }
    for kind in ("macro", "micro"):
        p, r = result[f"{kind}_precision"], result[f"{kind}_recall"]
        result[f"{kind}_f1"] = _ratio(2 * p * r, p + r)
    return {name: result[name] if scores.ndim > 2 else float(result[name]) for name in METRICS}


def calibration_error(probabilities, labels, bins: int = 15) -> float:
    """Expected calibration error: |mean probability - share of positives| over bins of equal width, weighed by size.

    ``probabilities`` are floats, clipped to [0, 1]; ``labels``, 0/1 or bool, have the same shape, which is any.
    """
    p, y = np.clip(np.ravel(probabilities), 0, 1).astype(np.float64), np.ravel(labels)
    which = np.minimum((p * bins).astype(int), bins - 1)
    gaps = np.bincount(which, p, bins) - np.bincount(which, y, bins)
    return float(np.abs(gaps).sum() / len(p))


def mean_and_ci95(values: np.ndarray) -> dict[str, float]:
    """Mean over episodes, float [E >= 2], and the half-width of its 95 % interval, 1.96 standard errors."""
    values = np.asarray(values, np.float64)
    return {"mean": float(values.mean()), "ci95": float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))}


def bootstrap_ci95(values: np.ndarray) -> dict[str, float]:
    """Mean over episodes, float [E >= 2], and its 95 % bootstrap interval: "mean", "low" and "high".

    The interval lies between percentiles of 9,999 resampled means. Two methods on the same episodes can be told apart
    where the interval of their differences excludes 0.
    """
    from scipy.stats import bootstrap  # takes half a second to import

    values = np.asarray(values, np.float64)
    resampling = {"n_resamples": 9999, "method": "percentile", "rng": np.random.default_rng(0)}
    low, high = bootstrap((values,), np.mean, **resampling).confidence_interval
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def _ratio(a, b, empty: float = 0.0):
    """a / b, and ``empty`` where b is 0; NaN stays NaN."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), empty), where=b != 0)
