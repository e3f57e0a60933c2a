"""The LCM model (paper section 4.2), the forms of it that show what its parts add, and its controls."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mlfsic_jax.core.functional import binary_cross_entropy, cosine_logits
from mlfsic_jax.core.lcm import LCMOptions, select_positions
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.core.options import positive, require
from mlfsic_jax.methods._training import adam
from mlfsic_jax.methods.base import FIXED
from mlfsic_jax.methods.episodic import Base


@dataclasses.dataclass(frozen=True)
class LCM(LCMOptions, Base):
    """Base on the local features that Loss Change Measurement keeps.

    Its scores are those of A_visual and A_text after a fit to the support by the CM loss, since "the LCM model needs to
    be fine-tuned before it can be applied to unseen labels" (section 1). The prototypes are those of the model as it
    was trained, on fewer regions.
    """

    sections: ClassVar[tuple[str, ...]] = ("lcm",)
    tuned: ClassVar[str] = "theta"
    batched: ClassVar[bool] = False  # Adam's state of one episode fills the cache
    against: ClassVar[str] = "base"

    tune_epochs: int = 20  # section 5.1.2's number for the test phase; a step of Adam on the whole support each
    tune_learning_rate: float = 3e-4  # of Adam; the paper gives none
    tune_visual: bool = True  # False fits A_text alone
    # candidates for theta, which is chosen on validation labels
    thresholds: tuple[float, ...] = (0.51, 0.52, 0.53, 0.54, 0.55, 0.57, 0.60, 0.65)

    def __post_init__(self):
        super().__post_init__()
        between = len(self.thresholds) > 0 and all(0 < theta < 1 for theta in self.thresholds)
        require(
            self,
            thresholds=(between, "must be numbers between 0 and 1"),
            tune_epochs=(self.tune_epochs >= 0, "must be at least 0, which leaves the model as it was trained"),
            **positive(self, "tune_learning_rate"),
        )

    def candidates(self):
        return tuple(self.thresholds)

    def embed(self, trained, features):
        # float16 as in the cache: only the scores of the support are made of them.
        more = {"features": features.astype(jnp.float16), "pooled": features.mean(axis=1)}
        return super().embed(trained, features) | more

    def embed_key(self, trained):
        return LCM.embed, self.model, id(trained["variables"])

    def embed_support(self, trained, images, labels, words):
        """A_visual and A_text after the fit, "tuned"; regions and words in their space; "lcm", the raw scores."""
        words, variables, regions = self.words_of_scores(words), trained["variables"], images["joint"]
        if self.tune_epochs:
            options = {"epochs": self.tune_epochs, "learning_rate": self.tune_learning_rate, "visual": self.tune_visual}
            variables = tune(self.model, variables, images["pooled"], labels, words, **options)
        if self.tune_epochs and self.tune_visual:
            regions = self.model.apply(variables, images["features"].astype(jnp.float32)[:, None], method="regions")
        words = self.model.apply(variables, words, method="words")
        scores = self.model.lcm_scores(regions, labels, words, self)
        return {"tuned": variables["params"]["joint"], "tuned_regions": regions, "tuned_words": words, "lcm": scores}

    def support_key(self, trained):
        options = [getattr(self, field.name) for field in dataclasses.fields(LCM)]
        return type(self).words_of_scores, *options, id(trained["variables"])

    def words_of_scores(self, words):
        """The word vectors that the scores are made with."""
        return words

    def scores(self, images):
        """LCM's raw scores: float [S, L]."""
        return images["lcm"]

    def keep(self, trained, images):
        """The positions whose score reaches theta: bool [S, L]."""
        options = {"scale": self.model.scale, "score_scaling": self.score_scaling}
        return select_positions(self.scores(images), trained["theta"], **options)

    def fit(self, trained, images, labels, words):
        words, keep = self._apply(trained, words, method="words"), self.keep(trained, images)
        prototypes = self._apply(trained, images["joint"], labels, words, keep, method="prototypes")
        return {"prototypes": prototypes, "keep": keep}

    def statistics(self, state):
        return {"kept": state["keep"].mean()}


@dataclasses.dataclass(frozen=True)
class LCMUntuned(LCM):
    """LCM whose scores are those of the model as it was trained, whose A has not seen the support."""

    tune_epochs: int = dataclasses.field(default=0, metadata=FIXED)


@dataclasses.dataclass(frozen=True)
class LCMRandomScores(LCM):
    """LCM's scores shuffled over the positions of each image: at any theta as many are kept, which ones is chance."""

    control: ClassVar[bool] = True

    def scores(self, images):
        scores = images["lcm"]
        order = jnp.argsort(jax.random.uniform(jax.random.key(0), scores.shape), axis=-1)
        return jnp.take_along_axis(scores, order, axis=-1)


@dataclasses.dataclass(frozen=True)
class LCMPermutedWords(LCM):
    """LCM whose scores are made with the word of another label, the next one; the prototypes have the right words."""

    control: ClassVar[bool] = True
    on_request: ClassVar[bool] = True

    def words_of_scores(self, words):
        return jnp.roll(words, 1, axis=0)


@dataclasses.dataclass(frozen=True)
class LCMRandomWords(LCM):
    """LCM whose scores are made with random vectors as long as the words; the prototypes have the right words."""

    control: ClassVar[bool] = True
    on_request: ClassVar[bool] = True

    def words_of_scores(self, words):
        random = jax.random.normal(jax.random.key(0), words.shape, words.dtype)
        return random * jnp.linalg.norm(words, axis=1, keepdims=True) / jnp.linalg.norm(random, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class LCMAllTuned(LCM):
    """LCM whose prototypes and queries are made by the tuned A_visual and A_text too."""

    on_request: ClassVar[bool] = True
    against: ClassVar[str] = "base_tuned"

    def fit(self, trained, images, labels, words):
        keep = self.keep(trained, images) if self.tuned else None
        prototypes = self._apply(
            trained, images["tuned_regions"], labels, images["tuned_words"], keep, method="prototypes"
        )
        state = {"prototypes": prototypes, "joint": images["tuned"]}
        return state if keep is None else state | {"keep": keep}

    def score(self, trained, state, images):
        variables = _with_joint(trained["variables"], state["joint"])
        features = images["features"].astype(jnp.float32) if self.model.query_top else images["pooled"][:, None]
        regions = self.model.apply(variables, features[:, None], method="regions")
        return self.classify({"joint": regions}, state["prototypes"])


@dataclasses.dataclass(frozen=True)
class BaseTuned(LCMAllTuned):
    """Base after the same fit: WGA's test-time step ("Fine-Tuning"), whose optimiser its paper does not give."""

    tuned: ClassVar[str] = ""
    against: ClassVar[str] = "base"

    def candidates(self):
        return ()

    def statistics(self, state):
        return {}


def tune(
    model: BaseModel, variables, pooled, labels, words, *, epochs: int, learning_rate: float, visual: bool = True
) -> dict[str, Any]:
    """Fits A_visual and A_text to a support set by the CM loss, a step of Adam per epoch; returns new ``variables``.

    Takes pooled features of the backbone, float [S, n], labels, 0/1 or bool [S, C], and word vectors, float [C, d_w].
    Without ``visual`` A_visual stays.
    """
    joint = variables["params"]["joint"]
    fixed = {} if visual else {"a_visual": joint["a_visual"]}

    def cm_loss(fitted, _):
        tuned = _with_joint(variables, fixed | fitted)
        images = model.apply(tuned, pooled[:, None, None], method="regions")[:, 0]
        by_words = cosine_logits(images, model.apply(tuned, words, method="words"), model.scale)
        return binary_cross_entropy(by_words, labels).sum()  # eq 3

    fitted = {name: layer for name, layer in joint.items() if name not in fixed}
    fitted, _ = adam(cm_loss, fitted, jnp.arange(epochs), learning_rate=learning_rate)
    return _with_joint(variables, fixed | fitted)


def _with_joint(variables, joint) -> dict[str, Any]:
    return {**variables, "params": {**variables["params"], "joint": joint}}
