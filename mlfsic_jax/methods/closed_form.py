"""Methods without a training loop, on pooled features: nearest prototypes and ridge regression."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.core import word_ridge
from mlfsic_jax.core.functional import cosine_logits, unit
from mlfsic_jax.core.options import positive, require
from mlfsic_jax.methods._training import mean_feature, pooled_features, some_regions
from mlfsic_jax.methods.base import FIXED, Method


@dataclasses.dataclass(frozen=True)
class ClosedForm(Method):
    """The family that learns from base images in closed form, by ``word_ridge.fit``; its members share the result."""

    sections: ClassVar[tuple[str, ...]] = ("ridge",)
    stores: ClassVar[tuple[str, ...]] = ("fitted",)
    base: ClassVar[str] = "images"

    beta: float = 0.5  # weight of the word prior
    regulariser: float = 1.0  # of ridge regression
    region_regulariser: float = 0.3  # of ridge regression with the region kernel
    classifier_regulariser: float = 300.0  # of the base labels' classifiers
    word_regulariser: float = 0.1  # of the map from words to classifiers
    n_components: int = 320  # directions in which regions are compared

    def __post_init__(self):
        super().__post_init__()
        fields = ("regulariser", "region_regulariser", "classifier_regulariser", "word_regulariser", "n_components")
        require(self, beta=(self.beta >= 0, "must be at least 0"), **positive(self, *fields))

    def train(self, key, base):
        features, regions = pooled_features(base), some_regions(base, np.arange(len(base.labels)))
        directions = word_ridge.principal_directions(regions, mean_feature(features), self.n_components)
        options = {"classifier_regulariser": self.classifier_regulariser, "word_regulariser": self.word_regulariser}
        fitted = word_ridge.fit(features, base.labels, base.word_vectors, directions, **options)
        return jax.device_get(fitted._asdict())


@dataclasses.dataclass(frozen=True)
class Prototypes(ClosedForm):
    """sigmoid(scale * cos(query, mean of the support images that have the label)): ProtoNet with cosine."""

    logits: ClassVar[bool] = True

    # lambda; it only sets where the threshold 0.5 lies, so precision, recall and F1 are not tuned.
    scale: float = dataclasses.field(default=10.0, metadata=FIXED)
    centred: bool = dataclasses.field(default=False, metadata=FIXED)  # compare unit features minus the base mean

    def fit(self, trained, images, labels, words):
        x = self._features(trained, images)
        return labels.astype(x.dtype).T @ x  # sum, not mean: cosine ignores scale

    def score(self, trained, state, images):
        return cosine_logits(self._features(trained, images), state, self.scale)

    def _features(self, trained, images):
        return centred_unit(trained, images) if self.centred else images["pooled"]


@dataclasses.dataclass(frozen=True)
class Ridge(ClosedForm):
    """Ridge regression onto centred targets: X_q X' (X X' + regulariser I)^-1 (Y - mean Y) + mean Y.

    Scores may leave [0, 1]: clip them where probabilities are shown; neither AP nor the threshold 0.5 needs that.
    """

    needs_contrast: ClassVar[bool] = True

    def fit(self, trained, images, labels, words):
        x = centred_unit(trained, images)
        targets = labels.astype(x.dtype)
        kernel = x @ x.T + self.regulariser * jnp.eye(len(x), dtype=x.dtype)
        dual = jax.scipy.linalg.solve(kernel, targets - targets.mean(axis=0), assume_a="pos")
        return {"weights": x.T @ dual, "mean": targets.mean(axis=0)}

    def score(self, trained, state, images):
        return centred_unit(trained, images) @ state["weights"] + state["mean"]


def centred_unit(trained, images):
    """Pooled features minus the base mean, scaled to length 1: [I, n]."""
    return unit(images["pooled"] - trained["mean"])
