"""The papers' models, trained by episodes (``run.loop``): words alone and Base; LCM is in ``methods.lcm``.

WGA itself (Yan et al. 2022) is Base with ``BaseModel(attention="standard", dynamic=False, skip=False)``.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from mlfsic_jax.core.functional import cosine_logits
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.methods._training import map_regions
from mlfsic_jax.methods.base import FIXED, Method


@dataclasses.dataclass(frozen=True)
class Episodic(Method):
    """Shared by the papers' models: ``trained["variables"]``, and local features in the joint space.

    ``train`` only initialises: an untrained model is the control that a trained one has to beat.
    """

    stores: ClassVar[tuple[str, ...]] = ("episodes",)
    base: ClassVar[str] = "labels"
    needs_words: ClassVar[bool] = True
    logits: ClassVar[bool] = True
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
        """Logits of queries: prototypes float [C, d_joint] -> [Q, C]."""
        return self.model.query_logits(images["joint"], prototypes)

    def _apply(self, trained, *arrays, method: str):
        return self.model.apply(trained["variables"], *arrays, method=method)


@dataclasses.dataclass(frozen=True)
class ZeroShot(Episodic):
    """Words alone: sigmoid(lambda cos(query, A_text w)); ignores the support images."""

    adapts: ClassVar[bool] = False

    def fit(self, trained, images, labels, words):
        return self._apply(trained, words, method="words")

    def score(self, trained, state, images):
        return cosine_logits(images["joint"].mean(axis=1), state, self.model.scale)


@dataclasses.dataclass(frozen=True)
class Base(Episodic):
    """The Base model: prototypes from all local features (section 4.3)."""

    against: ClassVar[str] = "base_untrained"

    def fit(self, trained, images, labels, words):
        words = self._apply(trained, words, method="words")
        return {"prototypes": self._apply(trained, images["joint"], labels, words, method="prototypes")}

    def score(self, trained, state, images):
        return self.classify(images, state["prototypes"])


@dataclasses.dataclass(frozen=True)
class BaseUntrained(Base):
    """Base as it was initialised, the control of a trained one."""

    stores: ClassVar[tuple[str, ...]] = ("untrained",)
    control: ClassVar[bool] = True
    against: ClassVar[str] = ""


def init(model: BaseModel, key, features, words) -> dict:
    """Fresh variables of a model for inputs like features [1, h, w, n] and word vectors [C, d_w]."""
    return _init(model, key, features, jnp.ones((1, len(words))), words)


@functools.partial(jax.jit, static_argnums=0)
def _init(model: BaseModel, key, one, labels, words) -> dict:
    params_key, dropout_key, augment_key = jax.random.split(key, 3)
    rngs = {"params": params_key, "dropout": dropout_key, "augment": augment_key}
    return model.init(rngs, one, one, labels, labels, words)
