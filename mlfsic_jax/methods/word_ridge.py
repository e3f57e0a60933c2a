"""Ridge regression with a word prior, on pooled features or with a region kernel: our own, in closed form."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from mlfsic_jax.core import word_ridge
from mlfsic_jax.core.functional import unit
from mlfsic_jax.methods.closed_form import Fitted


@dataclasses.dataclass(frozen=True)
class WordRidge(Fitted):
    """``core.word_ridge.word_ridge``: ridge regression on what the word prior leaves unexplained."""

    base: ClassVar[str] = "labels"
    needs_words: ClassVar[bool] = True
    needs_contrast: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    against: ClassVar[str] = "ridge"

    def fit(self, trained, images, labels, words):
        fitted = fitted_of(trained)
        options = {"beta": self.beta, "regulariser": self.regulariser}
        adapted = word_ridge.adapt(fitted, images["pooled"], None, labels, words, **options)
        return {"adapted": adapted, "labels": labels}

    def score(self, trained, state, images):
        scores = word_ridge.scores(fitted_of(trained), state["adapted"], images["pooled"])
        return standardised(scores, state["adapted"].left_out, state["labels"])


@dataclasses.dataclass(frozen=True)
class RegionWordRidge(WordRidge):
    """``core.word_ridge.region_word_ridge``: the kernel matches regions."""

    def embed(self, trained, features):
        regions = word_ridge.regions(fitted_of(trained), features)
        return {"pooled": features.mean(axis=1), "regions": regions}

    def embed_key(self, trained):
        return RegionWordRidge.embed, id(trained["components"])

    def fit(self, trained, images, labels, words):
        options = {"beta": self.beta, "regulariser": self.region_regulariser}
        arrays = (images["pooled"], images["regions"], labels, words)
        return {"adapted": word_ridge.adapt(fitted_of(trained), *arrays, **options), "labels": labels}

    def score(self, trained, state, images):
        adapted = state["adapted"]
        scores = word_ridge.scores(fitted_of(trained), adapted, images["pooled"], images["regions"])
        return standardised(scores, adapted.left_out, state["labels"])

    def explain(self, trained, state, images):
        fitted, adapted = fitted_of(trained), state["adapted"]
        x = unit(images["pooled"] - fitted.mean)
        return {
            "prior": word_ridge.word_prior(fitted, x, adapted.word_vectors, adapted.beta),
            "pairs": word_ridge.region_pairs(images["regions"], adapted.support),
            "dual": adapted.dual,
        }


def standardised(scores, left_out, labels):
    """``core.word_ridge.standardised``: float [Q, C], [S, C], 0/1 [S, C] -> [Q, C]."""
    return word_ridge.standardised(word_ridge.Prediction(scores, left_out), labels)


def fitted_of(trained) -> word_ridge.Fitted:
    """The leaves of ``core.word_ridge.Fitted`` in ``trained``, which may hold more."""
    return word_ridge.Fitted(*(trained[name] for name in word_ridge.Fitted._fields))
