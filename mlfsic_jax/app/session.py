"""One folder that is being labelled: decisions, features and the fit, which follows every change."""

import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlfsic_jax.app.collection import Collection
from mlfsic_jax.app.store import FILE, Label, Store
from mlfsic_jax.run import inputs, proposals
from mlfsic_jax.run.classifier import nearest_shots
from mlfsic_jax.run.saved import Predictor
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import reason, shown

ORDERS = ("suggested", "certain", "name")
SHOWN = ("all", "undecided", "yes", "no", "proposed")
_REFIT_S = 2.0  # at least between fits for nothing but further features
_BINS = 20  # of a histogram of probabilities
_FEW = 3  # decided photos of a label, below which its precision is not estimated


class Session:
    """What the page shows and changes. All methods can be called from any thread."""

    def __init__(self, store: Store, collection: Collection, predictor: Predictor, method: str) -> None:
        self.store, self.collection, self.predictor, self.method = store, collection, predictor, method
        self.fitted: proposals.Fitted | None = None
        self.fitted_version, self.fits, self._ready, self._words = -1, 0, -1, {}
        self._unread: set[tuple[str, ...]] = set()  # wordings that the text encoder cannot read
        backbone = predictor.config.backbone
        self.note = f"{method}: names reach the classes that {backbone} was trained on, and what you decide corrects it"
        self._changed, self._closed = threading.Condition(), False
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._embed, self._follow)]

    def start(self) -> None:
        """Begins to compute features, and to fit, in the background."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends both, and closes the files."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.collection.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self.store.close()

    def changed(self) -> None:
        """Has the fit follow a change."""
        with self._changed:
            self._changed.notify_all()

    def refit(self) -> None:
        """Fits to what is decided now."""
        version, labels, ready = self.store.version, self.store.labels(), self.collection.embedded == 1
        fitted = None
        if labels and self.collection.features:
            numbered = ((self.collection.number.get(name), found) for name, found in self.store.decisions().items())
            decisions = {i: found for i, found in numbered if i is not None and ready[i]}
            names, words = [label.name for label in labels], self._words_of(labels)
            fitted = proposals.fit(self.predictor, self.method, words, names, self.collection.features, decisions)
            fitted.probabilities[~ready] = np.nan  # of the others features may have come meanwhile
        self.fitted, self.fitted_version, self._ready = fitted, version, int(ready.sum())
        self.fits += 1

    def catch_up(self) -> None:
        """Fits to the last change, if need be; ``InputError`` as long as photos have no features."""
        if missing := int(np.count_nonzero(self.collection.embedded == 0)):
            raise InputError(f"{missing} photos have no probabilities yet: wait, or export what is decided alone")
        if self.fitted_version != self.store.version or self._further():
            self.refit()

    def missing(self) -> list[str]:
        """Photos that were decided and are not in the folder any more."""
        return [name for name in self.store.decisions() if name not in self.collection.number]

    def unread(self) -> list[str]:
        """Labels that the text encoder cannot read."""
        return [label.name for label in self.store.labels() if label.wordings in self._unread]

    def thresholds(self) -> dict[str, float]:
        return {label.name: label.threshold for label in self.store.labels()}

    def probabilities(self, i: int) -> dict[str, float] | None:
        """Label -> probability of photo ``i``; None where they are not known yet."""
        fitted = self.fitted
        if fitted is None or np.isnan(fitted.probabilities[i]).any():
            return None
        return {name: float(p) for name, p in zip(fitted.label_names, fitted.probabilities[i], strict=True)}

    def label(self, name: str) -> Label:
        """The label of this name; ``InputError`` if there is none."""
        for label in self.store.labels():
            if label.name == name:
                return label
        raise InputError(f"there is no label {shown(name)}")

    def photos(self, order: str, show: str, label: str) -> np.ndarray:
        """The numbers of the photos to show, in this order; ``label`` "" is for all labels together."""
        if order not in ORDERS or show not in SHOWN:
            raise InputError(f"order is one of {', '.join(ORDERS)}, show one of {', '.join(SHOWN)}")
        names = [self.label(label).name] if label else list(self.thresholds())
        decided, found, above = self._columns(names)
        known = ~np.isnan(found).any(axis=1)
        undecided = np.isnan(decided)
        kept = {
            "all": np.ones(len(found), bool),
            "undecided": undecided.all(axis=1),
            "yes": (decided == 1).any(axis=1),
            "no": (decided == 0).any(axis=1),
            "proposed": (above & undecided).any(axis=1),
        }[show]
        fitted = self.fitted
        if order == "name" or fitted is None or not names:
            rank = np.arange(len(found))
        else:
            filled = np.where(known[:, None], found, 0)
            margin = np.abs(filled - [self.thresholds().get(name, 0.5) for name in names])
            margin = np.where(undecided, margin, np.inf).min(axis=1)
            # suggested: where the model is least certain, and something is undecided
            by = {"certain": -filled.max(axis=1), "suggested": margin}[order]
            told = ~undecided.any(axis=1) if order == "suggested" else np.zeros(len(found), bool)
            rank = np.lexsort((np.arange(len(found)), by, told, ~known))
        return rank[kept[rank]]

    def describe(self, i: int) -> dict[str, Any]:
        """What the page needs to know of a photo."""
        name, (width, height) = self.collection.names[i], self.collection.size(i)
        return {
            **{"id": i, "name": name, "width": width, "height": height},
            **{"decided": self.store.decided(name), "probabilities": self.probabilities(i)},
            "error": self.collection.errors.get(i),
        }

    def counts(self) -> dict[str, dict[str, int]]:
        """Label -> how many photos were decided, and how many are proposed."""
        labels = self.store.labels()
        decided, _, above = self._columns([label.name for label in labels])
        columns = {"yes": decided == 1, "no": decided == 0, "proposed": above & np.isnan(decided)}
        return {
            label.name: {what: int(array[:, c].sum()) for what, array in columns.items()}
            for c, label in enumerate(labels)
        }

    def quality(self, name: str) -> dict[str, Any]:
        """Examples, histograms, and precision and recall of a label at its threshold.

        These are of decided photos, each scored by a fit that left it out; None below three photos, or where nothing
        is above the threshold. Photos that the model suggested are harder than others, so they rather underestimate.
        """
        label, fitted = self.label(name), self.fitted
        decided, found, _ = self._columns([name])
        decided, found = decided[:, 0], found[:, 0]

        def histogram(values):
            return np.histogram(values[~np.isnan(values)], _BINS, (0, 1))[0].tolist()

        out = {
            **{"name": name, "threshold": label.threshold, "examples": np.flatnonzero(decided == 1).tolist()},
            **{"histogram": histogram(found), "precision": None, "recall": None, "judged": 0},
            "decided_histogram": {"yes": histogram(found[decided == 1]), "no": histogram(found[decided == 0])},
        }
        if fitted is None or name not in fitted.label_names:
            return out
        c = fitted.label_names.index(name)
        judged = ~np.isnan(fitted.decided[:, c])
        truth, above = fitted.decided[judged, c] == 1, fitted.left_out[judged, c] > label.threshold
        out["judged"] = int(judged.sum())
        if len(truth) >= _FEW:
            hits = int((truth & above).sum())
            out["precision"] = hits / int(above.sum()) if above.any() else None
            out["recall"] = hits / int(truth.sum()) if truth.any() else None
        return out

    def _columns(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decisions, probabilities, both NaN where unknown, and whether these are above: [N, labels]."""
        fitted, thresholds, n = self.fitted, self.thresholds(), len(self.collection.names)
        decided, found = np.full((n, len(names)), np.nan, np.float32), np.full((n, len(names)), np.nan, np.float32)
        column = {name: c for c, name in enumerate(names)}
        for photo, values in self.store.decisions().items():
            i = self.collection.number.get(photo)
            for name, value in values.items() if i is not None else ():
                if name in column:
                    decided[i, column[name]] = value
        for c, name in enumerate(names):
            if fitted is not None and name in fitted.label_names:
                found[:, c] = fitted.probabilities[:, fitted.label_names.index(name)]
        with np.errstate(invalid="ignore"):
            return decided, found, found > [thresholds[name] for name in names]

    def _further(self) -> bool:
        """Whether there are features that the last fit did not have."""
        return int(np.count_nonzero(self.collection.embedded == 1)) != self._ready

    def _words_of(self, labels: Sequence[Label]) -> np.ndarray:
        trained = nearest_shots(self.predictor, 0)
        missing = [label for label in labels if label.wordings not in self._words]
        if missing:
            source, each = trained.methods[self.method].words_from, [label.wordings for label in missing]
            rows = inputs.class_mixtures(source, each, self.predictor.encoder)
            unread = inputs.unread(each, self.predictor.encoder)
            self._unread |= {wordings for wordings, not_read in zip(each, unread, strict=True) if not_read}
            self._words |= dict(zip(each, rows, strict=True))
        return np.stack([self._words[label.wordings] for label in labels])

    def _embed(self) -> None:
        try:
            self.collection.embed_all(self.changed)
        except Exception as error:  # a full disk, say: what is there can be labelled all the same
            self._tell("computing features stopped, start the app again to go on", error)
        self.changed()

    def _tell(self, what: str, error: Exception) -> None:
        traceback.print_exc()
        self.note = f"{what} ({reason(error)})"

    def _follow(self) -> None:
        last = 0.0
        while not self._closed:
            behind = self.store.version != self.fitted_version
            if behind or (self._further() and time.monotonic() - last > _REFIT_S):
                try:
                    self.refit()
                except Exception as error:  # the page goes on, and the next change fits again
                    self._tell("the last fit failed", error)
                    self.fitted_version = self.store.version
                last = time.monotonic()
            else:
                with self._changed:
                    if not self._closed:
                        self._changed.wait(0.5 if self._further() else 5.0)


def open_session(folder: Path, state: Path | None, predictor: Predictor, cache_dir: Path) -> Session:
    """A session on the photos of a folder; ``InputError`` where there are none, or one of the files cannot be used.

    Decisions are kept in ``state``, by default ``labels.sqlite`` in the folder.
    """
    trained = nearest_shots(predictor, 0)
    method = next(iter(trained.methods))
    collection = Collection(folder, predictor, proposals.plain(trained, method), method, cache_dir)
    return Session(Store(state or folder / FILE), collection, predictor, method)


def marked(session: Session, i: int) -> tuple[tuple[str, ...], tuple[str, ...], Mapping[str, float]]:
    """What an export says of a photo: its labels, those that it has not, and probabilities of undecided ones."""
    decided, found = session.store.decided(session.collection.names[i]), session.probabilities(i) or {}
    names = [label.name for label in session.store.labels()]
    yes, no = (tuple(name for name in names if decided.get(name) == value) for value in (1, 0))
    return yes, no, {name: found[name] for name in names if name in found and name not in decided}
