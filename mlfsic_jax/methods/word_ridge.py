"""Ridge regression with a word prior, on pooled features or with a region kernel: our own, in closed form."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from mlfsic_jax.core import word_ridge
from mlfsic_jax.core.functional import unit
from mlfsic_jax.methods.closed_form import ClosedForm


@dataclasses.dataclass(frozen=True)
class WordRidge(ClosedForm):
    """Ridge regression on what the word prior leaves unexplained, see ``core.word_ridge``."""

    base: ClassVar[str] = "labels"
    needs_words: ClassVar[bool] = True
    needs_contrast: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    against: ClassVar[str] = "ridge"

    def fit(self, trained, images, labels, words):
        regions = images.get("regions")  # of ``RegionWordRidge``
        options = {"beta": self.beta, "regulariser": self.regulariser if regions is None else self.region_regulariser}
        adapted = word_ridge.adapt(fitted_of(trained), images["pooled"], regions, labels, words, **options)
        return {"adapted": adapted, "labels": labels}

    def score(self, trained, state, images):
        adapted = state["adapted"]
        scores = word_ridge.scores(fitted_of(trained), adapted, images["pooled"], images.get("regions"))
        return word_ridge.standardised(scores, adapted.left_out, state["labels"])


@dataclasses.dataclass(frozen=True)
class PermutedWords(WordRidge):
    """``WordRidge`` with the word of another label, the next one: what wrong words cost."""

    control: ClassVar[bool] = True
    on_request: ClassVar[bool] = True

    def fit(self, trained, images, labels, words):
        return super().fit(trained, images, labels, jnp.roll(words, 1, axis=0))


@dataclasses.dataclass(frozen=True)
class RegionWordRidge(WordRidge):
    """``WordRidge`` with a kernel that matches regions."""

    def embed(self, trained, features):
        return {"pooled": features.mean(axis=1), "regions": word_ridge.regions(fitted_of(trained), features)}

    def embed_key(self, trained):
        return RegionWordRidge.embed, id(trained["components"])

    def explain(self, trained, state, images):
        fitted, adapted = fitted_of(trained), state["adapted"]
        x = unit(images["pooled"] - fitted.mean)
        return {
            "prior": word_ridge.word_prior(fitted, x, adapted.word_vectors, adapted.beta),
            "pairs": word_ridge.region_pairs(images["regions"], adapted.support),
            "dual": adapted.dual,
        }


def fitted_of(trained) -> word_ridge.Fitted:
    """The leaves of ``core.word_ridge.Fitted`` in ``trained``, which may hold more."""
    return word_ridge.Fitted(*(trained[name] for name in word_ridge.Fitted._fields))
