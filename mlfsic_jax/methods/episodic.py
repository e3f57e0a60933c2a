"""The papers' models, trained by episodes (``run.loop``): words alone, Base, LCM, and WGA's test-time step.

WGA itself (Yan et al. 2022) is Base with ``BaseModel(attention="standard", dynamic=False)``.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from mlfsic_jax.core.functional import binary_cross_entropy, cosine_logits
from mlfsic_jax.core.lcm import LCMOptions, select_positions
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.core.options import positive, require
from mlfsic_jax.methods._training import adam, map_regions
from mlfsic_jax.methods.base import FIXED, Method


@dataclasses.dataclass(frozen=True)
class Episodic(Method):
    """Shared by the papers' models: ``trained["variables"]``, and local features in the joint space.

    ``train`` only initialises: an untrained model is the control that a trained one has to beat.
    """

    stores: ClassVar[tuple[str, ...]] = ("episodes",)
    base: ClassVar[str] = "labels"
    needs_words: ClassVar[bool] = True
    batched: ClassVar[bool] = True

    # without a backbone, since methods see local features
    model: BaseModel = dataclasses.field(default_factory=BaseModel, metadata=FIXED)

    def train(self, key, base):
        (some,) = map_regions(base, [0], lambda regions: regions)
        return {"variables": init(self.model, key, jnp.asarray(some)[None, None], base.word_vectors)}

    def embed(self, trained, features):
        return {"joint": self._apply(trained, features[:, None], method="regions")}

    def embed_key(self, trained):
        return Episodic.embed, self.model, id(trained["variables"])

    def classify(self, images, prototypes):
        """Probabilities of queries: prototypes float [C, d_joint] -> [Q, C]."""
        return jax.nn.sigmoid(self.model.query_logits(images["joint"], prototypes))

    def _apply(self, trained, *arrays, method: str):
        return self.model.apply(trained["variables"], *arrays, method=method)


@dataclasses.dataclass(frozen=True)
class ZeroShot(Episodic):
    """Words alone: sigmoid(lambda cos(query, A_text w)); ignores the support images."""

    adapts: ClassVar[bool] = False

    def fit(self, trained, images, labels, words):
        return self._apply(trained, words, method="words")

    def score(self, trained, state, images):
        return jax.nn.sigmoid(cosine_logits(images["joint"].mean(axis=1), state, self.model.scale))


@dataclasses.dataclass(frozen=True)
class Base(Episodic):
    """The Base model: prototypes from all local features (section 4.3)."""

    def fit(self, trained, images, labels, words):
        words = self._apply(trained, words, method="words")
        return {"prototypes": self._apply(trained, images["joint"], labels, words, method="prototypes")}

    def score(self, trained, state, images):
        return self.classify(images, state["prototypes"])


@dataclasses.dataclass(frozen=True)
class LCM(LCMOptions, Base):
    """The LCM model: Base on the local features that Loss Change Measurement keeps (section 4.2)."""

    sections: ClassVar[tuple[str, ...]] = ("lcm",)
    tuned: ClassVar[str] = "theta"
    against: ClassVar[str] = "base"

    # candidates for theta, which is chosen on validation labels
    thresholds: tuple[float, ...] = (0.51, 0.52, 0.53, 0.54, 0.55, 0.57, 0.60, 0.65)

    def __post_init__(self):
        super().__post_init__()
        between = len(self.thresholds) > 0 and all(0 < theta < 1 for theta in self.thresholds)
        require(self, thresholds=(between, "must be numbers between 0 and 1"))

    def candidates(self):
        return tuple(self.thresholds)

    def embed_support(self, trained, images, labels, words):
        words = self._apply(trained, words, method="words")
        return {"lcm": self.model.lcm_scores(images["joint"], labels, words, self)}

    def keep(self, trained, images):
        """The positions whose score reaches theta: bool [S, L]."""
        options = {"scale": self.model.scale, "score_scaling": self.score_scaling}
        return select_positions(images["lcm"], trained["theta"], **options)

    def fit(self, trained, images, labels, words):
        words, keep = self._apply(trained, words, method="words"), self.keep(trained, images)
        prototypes = self._apply(trained, images["joint"], labels, words, keep, method="prototypes")
        return {"prototypes": prototypes, "keep": keep}

    def statistics(self, state):
        return {"kept": state["keep"].mean()}


@dataclasses.dataclass(frozen=True)
class FineTuned(Episodic):
    """Base after WGA's test-time step: A_visual and A_text fitted to the support by the CM loss ("Fine-Tuning").

    The paper gives neither optimiser nor length; here it is Adam, one step on the whole support per epoch.
    """

    sections: ClassVar[tuple[str, ...]] = ("fine_tuned",)
    on_request: ClassVar[bool] = True
    batched: ClassVar[bool] = False
    against: ClassVar[str] = "base"

    epochs: int = 40  # 40 is the paper's number for its baselines; 0 leaves the model as it was trained
    learning_rate: float = 1e-4  # of Adam

    def __post_init__(self):
        super().__post_init__()
        require(self, epochs=(self.epochs >= 0, "must be at least 0"), **positive(self, "learning_rate"))

    def embed(self, trained, features):
        return {"features": features, "pooled": features.mean(axis=1)}

    def embed_key(self, trained):
        return (FineTuned.embed,)

    def fit(self, trained, images, labels, words):
        options = {"epochs": self.epochs, "learning_rate": self.learning_rate}
        variables = fine_tune(self.model, trained["variables"], images["pooled"], labels, words, **options)
        tuned = {"variables": variables}
        regions = self._apply(tuned, images["features"][:, None], method="regions")
        joint_words = self._apply(tuned, words, method="words")
        prototypes = self._apply(tuned, regions, labels, joint_words, method="prototypes")
        return {"prototypes": prototypes, "joint": variables["params"]["joint"]}

    def score(self, trained, state, images):
        tuned = {"variables": _with_joint(trained["variables"], state["joint"])}
        features = images["features"] if self.model.query_top else images["pooled"][:, None]
        return self.classify({"joint": self._apply(tuned, features[:, None], method="regions")}, state["prototypes"])


def init(model: BaseModel, key, features, words) -> dict:
    """Fresh variables of a model for inputs like features [1, h, w, n] and word vectors [C, d_w]."""
    return _init(model, key, features, jnp.ones((1, len(words))), words)


@functools.partial(jax.jit, static_argnums=0)
def _init(model: BaseModel, key, one, labels, words) -> dict:
    params_key, dropout_key, augment_key = jax.random.split(key, 3)
    rngs = {"params": params_key, "dropout": dropout_key, "augment": augment_key}
    return model.init(rngs, one, one, labels, labels, words)


def fine_tune(model: BaseModel, variables, pooled, labels, words, *, epochs: int, learning_rate: float) -> dict:
    """Fits A_visual and A_text to a support set by the CM loss, a step of Adam per epoch; returns new ``variables``.

    Takes pooled features of the backbone, float [S, n], labels, 0/1 or bool [S, C], and word vectors, float [C, d_w].
    """

    def cm_loss(joint, _):
        tuned = _with_joint(variables, joint)
        images = model.apply(tuned, pooled[:, None, None], method="regions")[:, 0]
        by_words = cosine_logits(images, model.apply(tuned, words, method="words"), model.scale)
        return binary_cross_entropy(by_words, labels).sum()  # eq 3

    joint, _ = adam(cm_loss, variables["params"]["joint"], jnp.arange(epochs), learning_rate=learning_rate)
    return _with_joint(variables, joint)


def _with_joint(variables, joint) -> dict:
    return {**variables, "params": {**variables["params"], "joint": joint}}
