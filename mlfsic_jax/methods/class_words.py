"""Our own for photos of anything: names reach the classes that the backbone was trained on, a few photos correct them.

These labels are not unseen by the backbone, whose classes were chosen from the same words: numbers of these methods
stand beside those of ``no_kinds`` and ``no_names``, never alone beside the papers'.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from mlfsic_jax.core import class_words, clip, word_ridge
from mlfsic_jax.core.options import positive, require
from mlfsic_jax.methods._training import map_regions
from mlfsic_jax.methods.base import FIXED, Method

_LEAVES = ("weight", "bias", "mean", "mean_logits")
_CLIP_LEAVES = ("pooling", "mean", "mean_logits")  # of the image in CLIP's space in place of logits


@dataclasses.dataclass(frozen=True)
class ClassWordRidge(Method):
    """Ridge regression on what a prior from the backbone's classifier or CLIP's texts leaves: ``core.class_words``."""

    sections: ClassVar[tuple[str, ...]] = ("class_words",)
    stores: ClassVar[tuple[str, ...]] = ("classes",)
    base: ClassVar[str] = "images"
    needs_words: ClassVar[bool] = True
    needs_photos: ClassVar[bool] = False
    takes_unknown: ClassVar[bool] = True
    words_from: ClassVar[str] = "classes"
    calibrated: ClassVar[bool] = True
    on_request: ClassVar[bool] = True
    against: ClassVar[str] = "ridge"

    regulariser: float = 1.0  # of ridge regression
    gated: bool = True  # leave out the prior of words that mean nothing or something else, see ``core.class_words.fit``
    # keep what ``explain`` needs of every image
    explains: bool = dataclasses.field(default=False, metadata=FIXED)

    def __post_init__(self):
        super().__post_init__()
        require(self, **positive(self, "regulariser"))

    def explaining(self):
        return dataclasses.replace(self, explains=True)

    def train(self, key, base):
        head = base.head()
        rows = np.unique(np.linspace(0, len(base.labels) - 1, 512).astype(int))
        means = map_regions(base, rows, lambda regions: regions.mean(axis=1)).mean(axis=0)
        if isinstance(head, dict):
            pooled = map_regions(base, rows, lambda regions: clip.pool(head, regions)).mean(axis=0)
            return {"pooling": head, "mean": means, "mean_logits": pooled}
        weight, bias = head
        logits = map_regions(base, rows, lambda regions: (regions @ weight.T + bias).max(axis=1)).mean(axis=0)
        return {"weight": weight, "bias": bias, "mean": means, "mean_logits": logits}

    def embed(self, trained, features):
        if "pooling" in trained:
            x, logits = class_words.embed_clip(*(trained[name] for name in _CLIP_LEAVES), features)
        else:
            x, logits = class_words.embed(*(trained[name] for name in _LEAVES), features)
        return {"x": x, "l": logits} | ({"regions": features} if self.explains else {})

    def embed_key(self, trained):
        return ClassWordRidge.embed, self.explains, id(trained["mean"])

    def fit(self, trained, images, labels, words):
        mixtures, options = self.mixtures(words), {"regulariser": self.regulariser, "gated": self.gated}
        if "pooling" in trained:
            directions = class_words.directions_clip(mixtures, len(trained["mean"]))
            options["least_spread"] = 0.0  # of cosines with texts that say nothing it is not known
        else:
            mixtures = mixtures.reshape(len(words), -1, len(trained["bias"]))
            directions = class_words.directions(trained["weight"], mixtures)
            if mixtures.shape[1] == 1:  # by word vectors, whose spread is smaller, and which know no made-up words
                options["least_spread"] = 0.0
        state = {"fit": class_words.fit(directions, images["x"], images["l"], labels, **options), "labels": labels}
        return state | ({"regions": images["regions"]} if self.explains else {})

    def mixtures(self, words):
        """The labels as mixtures of classes, [C, s * K], or as CLIP's texts, [C, e]."""
        return words

    def score(self, trained, state, images):
        fitted, labels = state["fit"], state["labels"]
        scores = class_words.scores(fitted, images["x"], images["l"])
        # Not divided by their spread, which two or three photos do not tell; the prior's scale is the same everywhere.
        return scores - word_ridge.left_out_centre(fitted.left_out, labels) if len(labels) else scores

    def statistics(self, state):
        return {"beta": state["fit"].beta}

    def explain(self, trained, state, images):
        if not self.explains:
            return None
        fitted = state["fit"]
        here, there = (class_words.parts_of(trained["mean"], part["regions"]) for part in (images, state))
        found = {
            "prior": fitted.beta * class_words.prior(fitted.directions, images["x"], images["l"]),
            "pairs": jnp.einsum("qld,smd->qslm", here, there),
            "dual": fitted.dual,
        }
        if "pooling" in trained:  # attention is no sum over regions
            return found
        leaves = (trained[name] for name in _LEAVES)
        _, by_region = class_words.by_region(*leaves, fitted.directions, images["regions"])
        return found | {"prior_pairs": fitted.beta * by_region, "classes": fitted.directions[1]}


@dataclasses.dataclass(frozen=True)
class ClassWords(ClassWordRidge):
    """The prior alone, without any photo."""

    adapts: ClassVar[bool] = False
    against: ClassVar[str] = ""

    def fit(self, trained, images, labels, words):
        none = {name: value[:0] for name, value in images.items()}
        return super().fit(trained, none, labels[:0], words)


@dataclasses.dataclass(frozen=True)
class WithoutKinds(ClassWordRidge):
    """``ClassWordRidge`` without the classes that are kinds of a label, such as breeds of dogs."""

    words_from: ClassVar[str] = "classes without kinds"


@dataclasses.dataclass(frozen=True)
class WithoutNames(ClassWordRidge):
    """``WithoutKinds``, without the classes that have a label in their name, such as a dog sled, either."""

    words_from: ClassVar[str] = "classes without names"


@dataclasses.dataclass(frozen=True)
class PermutedNames(ClassWordRidge):
    """``ClassWordRidge`` with the name of another label, the next one: what wrong words cost."""

    control: ClassVar[bool] = True

    def mixtures(self, words):
        return jnp.roll(words, 1, axis=0)


@dataclasses.dataclass(frozen=True)
class MadeUpNames(ClassWordRidge):
    """``ClassWordRidge`` with made-up words for names: what names cost that mean nothing to the text encoder."""

    words_from: ClassVar[str] = "classes by made-up words"
    control: ClassVar[bool] = True
