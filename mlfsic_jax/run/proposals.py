"""From decisions about some photos to probabilities for all of a folder."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlfsic_jax.core import word_ridge
from mlfsic_jax.run.classifier import Classifier, Fitting, fit_embedded, nearest_shots, probabilities
from mlfsic_jax.run.evaluate import probabilities as calibrated
from mlfsic_jax.run.saved import Predictor, Trained
from mlfsic_jax.system.errors import InputError

SUPPORT = 256  # decided photos that a fit looks at, the last ones


class Fitted(NamedTuple):
    """What the decisions say about all N photos."""

    label_names: tuple[str, ...]  # C names
    probabilities: np.ndarray  # float32 [N, C]; NaN for photos without features
    support: np.ndarray  # int [S], the photos that the fit looked at
    decided: np.ndarray  # float32 [S, C]: 1, 0, or NaN for undecided
    left_out: np.ndarray  # float32 [S, C], probabilities of the support photos, each by a fit without it
    classifier: Classifier


def plain(trained: Trained, method: str) -> Trained:
    """The same without the regions, which ``Classifier.reasons`` alone needs; ``InputError`` for other methods."""
    value = trained.methods[method]
    if not value.takes_unknown:
        raise InputError(f"method {method} needs every label of every photo: use the model out of the box")
    return trained._replace(methods={method: dataclasses.replace(value, explains=False)})


def fit(
    predictor: Predictor,
    method: str,
    words: np.ndarray,
    label_names: Sequence[str],
    features: Mapping[str, np.ndarray],
    decisions: Mapping[int, Mapping[str, int]],
) -> Fitted:
    """Fits all labels to the decisions: photo number -> label -> 1 or 0.

    Args:
      predictor: the model.
      method: one that takes unknown labels.
      words: float [C, m], of the labels, as ``Method.fit`` takes them.
      label_names: C names.
      features: float16 [N, ...] of every photo, by ``Method.embed``.
      decisions: the photo that was decided last comes last.
    """
    support = np.array(list(decisions)[-SUPPORT:], int)
    rows = [[decisions[i].get(name, np.nan) for name in label_names] for i in support]
    decided = np.array(rows, np.float32).reshape(len(support), len(label_names))
    counts = (decided == 1).sum(axis=0)
    trained = plain(nearest_shots(predictor, float(np.median(counts))), method)
    images = {name: x[support].astype(np.float32) for name, x in features.items()}
    fitting = Fitting(predictor, trained, method, tuple(label_names), words)
    classifier = fit_embedded(fitting, images, targets(decided), "")
    found = probabilities(classifier, features)
    state = classifier.state
    left_out = state["fit"].left_out - word_ridge.left_out_centre(state["fit"].left_out, state["labels"])
    left_out = np.asarray(left_out)[: len(support)]
    left_out = calibrated(trained.methods[method], left_out, trained.calibration.get(method)).astype(np.float32)
    return Fitted(tuple(label_names), found, support, decided, left_out, classifier)


def targets(decided: np.ndarray) -> np.ndarray:
    """What a photo is an example of, float32 [S, C]: a label that nobody decided is no where another was confirmed."""
    confirmed = (decided == 1).any(axis=1, keepdims=True)
    return np.where(np.isnan(decided) & confirmed, 0, decided).astype(np.float32)
