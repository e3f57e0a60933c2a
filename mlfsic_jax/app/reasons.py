"""Why a photo of the folder got its probabilities: the names, the examples, and the regions that spoke for a label."""

import functools
from typing import Any

import numpy as np

from mlfsic_jax.app.session import Session
from mlfsic_jax.run.classifier import nearest_shots
from mlfsic_jax.run.explain import reached_through
from mlfsic_jax.run.saved import trained_of
from mlfsic_jax.system.errors import InputError

_EXAMPLES = 4  # photos that a label's score is traced to
_MATCHES = 3  # that are told of a label
_KEPT = 64  # photos whose regions are kept


class Reasons:
    """Explains photos of a session, ``describe``; the regions of those that were looked at last stay in memory."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._regions = functools.lru_cache(_KEPT)(self._embed)

    def describe(self, i: int) -> dict[str, Any]:
        """Grid, and for each label its shares, classes, heat and matches, the likeliest first; ``InputError``."""
        session = self._session
        fitted = session.fitted
        if fitted is None or np.isnan(fitted.probabilities[i]).any():
            raise InputError("this photo has no probabilities yet: wait a moment")
        x, state = session.collection.features["x"], fitted.classifier.state
        dual = np.asarray(state["fit"].dual)[: len(fitted.support)]
        pull = (x[fitted.support].astype(np.float32) @ x[i].astype(np.float32))[:, None] * dual  # [S, C]
        strongest = np.argsort(-np.abs(pull), axis=0)[:_EXAMPLES]
        rows = np.unique(strongest) if len(fitted.support) else np.zeros(0, int)
        found = self._explain(i, fitted, rows)
        columns, grid, labels = range(len(fitted.label_names)), session.predictor.grid, []
        for c in sorted(columns, key=lambda c: -fitted.probabilities[i, c]):
            pairs = found["pairs"][0] * dual[rows, c, None, None]  # [s, L, L]
            heat = pairs.sum(axis=(0, 2)) + found["prior_pairs"][0, :, c]
            classes, region = reached_through(found["classes"][c], found["prior_pairs"][0, :, c], grid[1])
            labels.append(
                {
                    **{"label": fitted.label_names[c], "probability": float(fitted.probabilities[i, c])},
                    **{"words": float(found["prior"][0, c]), "photos": float(pull[:, c].sum())},
                    **{"classes": classes, "region": region, "heat": heat.reshape(grid).round(5).tolist()},
                    "matches": _matches(pairs * (fitted.support[rows] != i)[:, None, None], fitted.support[rows], grid),
                }
            )
        return {"grid": grid, "labels": labels}

    def _embed(self, i: int, _: str) -> np.ndarray:
        """Local features, float16 [L, n]."""
        session = self._session
        row = session.collection.regions(i, nearest_shots(session.predictor, 0))
        return row["regions"].astype(np.float16)

    def _explain(self, i: int, fitted, rows: np.ndarray) -> dict[str, np.ndarray]:
        session, method = self._session, self._session.method
        trained = nearest_shots(session.predictor, fitted.classifier.trained.n_shot)
        state, features = fitted.classifier.state, session.collection.features
        few = state["fit"]._replace(support=state["fit"].support[rows], dual=state["fit"].dual[rows])
        numbers = [int(fitted.support[row]) for row in rows]
        local = [self._regions(n, session.collection.state(n)) for n in (i, *numbers)]
        regions = np.stack(local).astype(np.float32)
        image = {name: x[i : i + 1].astype(np.float32) for name, x in features.items()} | {"regions": regions[:1]}
        options = {"fit": few, "regions": regions[1:], "labels": state["labels"]}
        explained = trained.methods[method].explain(trained_of(trained, method), options, image)
        return {name: np.asarray(value) for name, value in explained.items()}


def _matches(pairs: np.ndarray, photos: np.ndarray, grid: tuple[int, int]) -> list[dict[str, Any]]:
    """The pairs of regions that add most, each example once."""
    found: dict[int, dict[str, Any]] = {}
    for flat in np.argsort(-pairs, axis=None, kind="stable")[: 50 * _MATCHES]:
        s, here, there = (int(k) for k in np.unravel_index(flat, pairs.shape))
        if pairs[s, here, there] <= 0 or len(found) == _MATCHES:
            break
        cells = {"cell": divmod(here, grid[1]), "there": divmod(there, grid[1]), "there_grid": grid}
        found.setdefault(s, {"photo": int(photos[s]), **cells, "contribution": float(pairs[s, here, there])})
    return list(found.values())
