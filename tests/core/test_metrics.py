"""The eight metrics against scikit-learn and against the definition, spelled out in loops."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_score, recall_score

from mlfsic_jax.core.metrics import (
    METRICS,
    average_precision,
    bootstrap_ci95,
    calibration_error,
    mean_and_ci95,
    multilabel_metrics,
)

# Everything is float64, and the sums are short: only the order of additions differs.
TOLERANCE = 1e-12


def tied_case(rng, *shape, levels=7):
    """Scores on few levels, 0.5 among them for odd ``levels``, so that ties abound; and labels of a random density."""
    scores = rng.integers(0, levels, shape) / (levels - 1)
    return scores, rng.random(shape) < rng.choice([0.05, 0.3, 0.7])


def reference_metrics(scores, labels, threshold):
    """The paper's definitions, label by label, with scikit-learn where it has them."""
    columns = [c for c in range(labels.shape[1]) if labels[:, c].any()]
    nan, result = float("nan"), {}
    predicted = scores > threshold

    def mean(values):
        return sum(values) / len(values) if values else nan

    result["macro_ap"] = mean([average_precision_score(labels[:, c], scores[:, c]) for c in columns])
    result["macro_precision"] = mean([precision_score(labels[:, c], predicted[:, c], zero_division=0) for c in columns])
    result["macro_recall"] = mean([recall_score(labels[:, c], predicted[:, c]) for c in columns])
    if columns:
        result["micro_ap"] = average_precision_score(labels.ravel(), scores.ravel())
        result["micro_recall"] = recall_score(labels.ravel(), predicted.ravel())
    else:
        result["micro_ap"] = result["micro_recall"] = nan
    result["micro_precision"] = precision_score(labels.ravel(), predicted.ravel(), zero_division=0)
    for kind in ("macro", "micro"):
        p, r = result[f"{kind}_precision"], result[f"{kind}_recall"]
        result[f"{kind}_f1"] = 0.0 if p + r == 0 else 2 * p * r / (p + r)
    return result


def test_average_precision_is_scikit_learns_on_tied_scores():
    rng = np.random.default_rng(0)
    compared = 0
    for n in range(1, 21):
        scores, labels = tied_case(rng, 150, n, levels=int(rng.integers(2, 9)))
        got = average_precision(scores, labels)
        assert got.shape == (150,) and got.dtype == np.float64
        for one_got, one_scores, one_labels in zip(got, scores, labels, strict=True):
            if one_labels.any():
                assert abs(one_got - average_precision_score(one_labels, one_scores)) <= TOLERANCE
                compared += 1
            else:
                assert np.isnan(one_got)
    assert compared > 1500


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12))
def test_average_precision_is_the_mean_precision_at_each_positive(pairs):
    scores = np.array([s for s, _ in pairs], float)
    labels = np.array([y for _, y in pairs])
    at = [np.mean(labels[scores >= s]) for s in scores[labels]]  # a whole tie passes the threshold together
    np.testing.assert_allclose(average_precision(scores, labels), np.mean(at) if at else np.nan, atol=TOLERANCE)


def test_a_tie_never_favours_the_model_whatever_the_order():
    labels = np.array([True, True, False, False])
    scores = np.full(4, 0.3)
    for order in ([0, 1, 2, 3], [2, 3, 0, 1], [2, 0, 3, 1]):
        assert average_precision(scores, labels[order]) == 0.5
    assert average_precision(np.array([0.0, -0.0]), np.array([True, False])) == 0.5


def test_all_metrics_follow_their_definitions():
    rng = np.random.default_rng(1)
    for _ in range(120):
        shape = rng.integers(1, 12), rng.integers(1, 6)
        scores, labels = tied_case(rng, *shape)
        threshold = float(rng.choice([0.0, 0.4, 0.5, 1.0]))
        got = multilabel_metrics(scores, labels, threshold=threshold)
        assert tuple(got) == METRICS and all(type(value) is float for value in got.values())
        expected = reference_metrics(scores, labels, threshold)
        for name in METRICS:
            np.testing.assert_allclose(got[name], expected[name], atol=TOLERANCE, err_msg=name)


def test_a_worked_example():
    # Label 0: AP (1/1 + 2/3) / 2, P 1/2, R 1/2. Label 1: AP 1/2, no prediction above 0.5, so P 0 and R 0.
    # Label 2 has no positive: its two false alarms count in the micro metrics alone.
    scores = [[0.9, 0.4, 0.7], [0.8, 0.5, 0.6], [0.3, 0.1, 0.2]]
    labels = [[1, 1, 0], [0, 0, 0], [1, 0, 0]]
    got = multilabel_metrics(scores, labels)
    expected = {
        "macro_ap": (5 / 6 + 1 / 2) / 2,
        "macro_precision": (1 / 2 + 0) / 2,
        "macro_recall": (1 / 2 + 0) / 2,
        "macro_f1": 1 / 4,
        # Descending: .9+ .8 .7 .6 .5 .4+ .3+ .2 .1
        "micro_ap": (1 / 1 + 2 / 6 + 3 / 7) / 3,
        "micro_precision": 1 / 4,
        "micro_recall": 1 / 3,
        "micro_f1": 2 / 7,
    }
    assert got == pytest.approx(expected, abs=TOLERANCE)


def test_macro_f1_is_of_the_mean_precision_and_recall_not_the_mean_f1():
    # P, R per label: (1, 1/2) and (1/2, 1): mean F1 2/3, F1 of the means 3/4.
    scores = np.array([[0.9, 0.9], [0.1, 0.9]])
    labels = np.array([[1, 1], [1, 0]])
    got = multilabel_metrics(scores, labels)
    assert got["macro_precision"] == got["macro_recall"] == got["macro_f1"] == 0.75


def test_a_score_at_the_threshold_is_negative():
    labels = np.array([[1], [1]])
    assert multilabel_metrics([[0.5], [np.nextafter(0.5, 1)]], labels)["macro_recall"] == 0.5
    assert multilabel_metrics([[0.2], [0.3]], labels, threshold=0.2)["micro_recall"] == 0.5


def test_labels_without_positives_are_left_out_of_macro_metrics():
    rng = np.random.default_rng(2)
    scores, labels = tied_case(rng, 10, 3)
    labels[0], labels[:, 1] = True, False
    got = multilabel_metrics(scores, labels)
    expected = multilabel_metrics(scores[:, [0, 2]], labels[:, [0, 2]])
    for name in METRICS:
        if name.startswith("macro"):
            assert got[name] == pytest.approx(expected[name], abs=TOLERANCE)
    assert got["micro_precision"] < expected["micro_precision"]  # its false alarms still count there


def test_nothing_predicted_gives_precision_and_f1_zero_and_no_positive_gives_nan():
    nothing = multilabel_metrics(np.full((4, 2), 0.4), np.eye(4, 2))
    assert [nothing[f"{k}_{m}"] for k in ("macro", "micro") for m in ("precision", "recall", "f1")] == [0.0] * 6
    empty = multilabel_metrics(np.full((4, 2), 0.6), np.zeros((4, 2)))
    assert {name for name in METRICS if np.isnan(empty[name])} == set(METRICS) - {"micro_precision"}
    assert empty["micro_precision"] == 0


def test_constant_scores_give_the_share_of_positives():
    labels = np.array([[1, 0], [1, 1], [0, 0], [0, 0]])
    got = multilabel_metrics(np.full((4, 2), 0.7), labels)
    assert (got["macro_ap"], got["micro_ap"]) == (0.375, 0.375)
    assert (got["macro_precision"], got["macro_recall"]) == (0.375, 1.0)


def test_leading_axes_are_episodes():
    rng = np.random.default_rng(3)
    scores, labels = tied_case(rng, 3, 4, 9, 5)
    labels[1, 2] = False  # an episode without any positive does not touch the others
    got = multilabel_metrics(scores, labels)
    for i in range(3):
        for j in range(4):
            one = multilabel_metrics(scores[i, j], labels[i, j])
            for name in METRICS:
                assert got[name].shape == (3, 4)
                np.testing.assert_allclose(got[name][i, j], one[name], atol=TOLERANCE, err_msg=name)


def test_jax_arrays_of_any_float_and_label_type():
    rng = np.random.default_rng(4)
    scores, labels = tied_case(rng, 8, 3, levels=5)  # multiples of 1/4, exact in bfloat16
    labels[0] = True
    expected = multilabel_metrics(scores, labels)
    for dtype in (jnp.float32, jnp.bfloat16):
        for label_type in (bool, np.uint8, np.float32):
            assert multilabel_metrics(jnp.asarray(scores, dtype), labels.astype(label_type)) == expected


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([[np.nan, 0.1]], [[1, 0]], "finite"),
        ([[np.inf, 0.1]], [[1, 0]], "finite"),
        ([[0.2, 0.1]], [[1, 2]], "0 or 1"),
        ([[0.2, 0.1]], [[1, 0.5]], "0 or 1"),
        ([[0.2, 0.1]], [[1, np.nan]], "0 or 1"),
        ([[0.2, 0.1]], [[1], [0]], r"\(1, 2\), labels \(2, 1\)"),
        ([0.2, 0.1], [1, 0], "images, labels"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "images, labels"),
        (np.zeros((2, 0)), np.zeros((2, 0)), "images, labels"),
    ],
)
def test_malformed_input_is_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        multilabel_metrics(scores, labels)


def test_mean_and_ci95():
    # Standard deviation of 1 2 3 4 with n - 1: sqrt(5 / 3); standard error sqrt(5 / 3) / 2.
    assert mean_and_ci95([1, 2, 3, 4]) == {"mean": 2.5, "ci95": pytest.approx(1.96 * np.sqrt(5 / 12), rel=1e-12)}
    assert mean_and_ci95(np.full(5, 0.25)) == {"mean": 0.25, "ci95": 0.0}


def test_bootstrap_interval():
    rng = np.random.default_rng(0)
    values = rng.gamma(2.0, size=50)  # skewed
    got = bootstrap_ci95(values)
    assert got == bootstrap_ci95(values) and got["mean"] == values.mean()
    resampled = rng.choice(values, (100_000, 50)).mean(axis=1)
    spread = resampled.std()
    # A 2.5 % quantile of 9,999 draws has a standard error of 0.027 standard deviations: four of them.
    np.testing.assert_allclose([got["low"], got["high"]], np.quantile(resampled, [0.025, 0.975]), atol=0.11 * spread)
    # Of many values it is the normal approximation, up to that error.
    many = rng.normal(0.1, 1.0, 2000)
    got, half = bootstrap_ci95(many), mean_and_ci95(many)["ci95"]
    np.testing.assert_allclose([got["low"], got["high"]], [many.mean() - half, many.mean() + half], atol=0.06 * half)
    assert bootstrap_ci95(np.full(4, 0.25)) == {"mean": 0.25, "low": 0.25, "high": 0.25}


def test_calibration_error():
    rng = np.random.default_rng(0)
    p, y = rng.random(500) * 1.2 - 0.1, rng.random(500) < 0.4
    error = 0.0
    for b in range(15):
        inside = [i for i in range(500) if min(int(min(max(p[i], 0), 1) * 15), 14) == b]
        if inside:
            error += len(inside) / 500 * abs(np.clip(p[inside], 0, 1).mean() - y[inside].mean())
    np.testing.assert_allclose(calibration_error(p.reshape(50, 10), y.reshape(50, 10)), error)
    assert calibration_error(y.astype(float), y) == 0
