"""Which regions of the support photos decided: for own photos and the report alike."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlfsic_jax.data.class_words import class_names

THRESHOLD = 0.5  # a label is predicted where its probability is higher
_CLASSES = 5  # that a label is said to be reached through
_MAX_LABELS = 4
_MAX_PAIRS = {1: 3, 2: 2}  # per label, by the number of labels to explain; 1 for more labels


class Match(NamedTuple):
    """A region of a query that met a region of a support photo."""

    label: str  # whose score the pair raises
    support: int  # index of the support photo
    query_cell: tuple[int, int]  # (row, column) on the query's grid
    support_cell: tuple[int, int]  # likewise on the support photo's
    contribution: float  # what the pair adds to the label's score


def strongest_matches(
    pairs: np.ndarray,
    dual: np.ndarray,
    probability: np.ndarray,
    label_names: Sequence[str],
    width: int,
    *,
    threshold: float | np.ndarray = THRESHOLD,
    max_supports: int = 2,
) -> list[Match]:
    """The pairs of regions that add most to the scores of a query's predicted labels, or of its likeliest one.

    ``pairs`` float [S, L, L] and ``dual`` float [S, C] are those of ``Method.explain`` for one query, ``probability``
    float [C] what was predicted for it, ``threshold`` a float or [C]. A row of the grid has ``width`` of its L
    positions. The matches lie in ``max_supports`` support photos at most, the likeliest label comes first, and within
    a label no region occurs twice, of the query or of a support photo.
    """
    order, predicted = np.argsort(-probability, kind="stable"), probability > threshold
    explained = [c for c in order if predicted[c]][:_MAX_LABELS] or [order[0]]
    per_label = _MAX_PAIRS.get(len(explained), 1)
    matches: list[Match] = []
    supports: set[int] = set()
    for c in explained:
        contributions = pairs * dual[:, c, None, None]  # [S, L, L]
        used: set = set()
        for flat in np.argsort(-contributions, axis=None, kind="stable"):
            s, here, there = (int(i) for i in np.unravel_index(flat, contributions.shape))
            if len(used) == 2 * per_label or contributions[s, here, there] <= 0:
                break
            if here in used or (s, there) in used or (len(supports) == max_supports and s not in supports):
                continue
            used |= {here, (s, there)}
            supports.add(s)
            cells = divmod(here, width), divmod(there, width)
            matches.append(Match(label_names[c], s, *cells, float(contributions[s, here, there])))
    return matches


def reached_through(
    weights: np.ndarray, by_region: np.ndarray, width: int
) -> tuple[tuple[tuple[str, float], ...], tuple[int, int]]:
    """ImageNet's classes that a name was reached through, and the (row, column) where a photo spoke for it most.

    ``weights`` float [K], of the label's mixture of classes, and ``by_region`` float [L] are of ``Method.explain``.
    """
    names, top = class_names(), np.argsort(-weights)[:_CLASSES]
    return tuple((names[k], float(weights[k])) for k in top if weights[k] > 0), divmod(int(by_region.argmax()), width)
