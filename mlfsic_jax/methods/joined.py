"""Three ways to combine the trained model with ridge regression."""

import dataclasses
from typing import ClassVar

from mlfsic_jax.core import word_ridge
from mlfsic_jax.core.functional import cosine_logits
from mlfsic_jax.methods.base import FIXED, Method
from mlfsic_jax.methods.closed_form import centred_unit
from mlfsic_jax.methods.lcm import LCM
from mlfsic_jax.methods.word_ridge import RegionWordRidge


@dataclasses.dataclass(frozen=True)
class LCMRegions(RegionWordRidge, LCM):
    """``RegionWordRidge`` on the support regions that LCM keeps at theta = 0.53, which is not tuned."""

    sections: ClassVar[tuple[str, ...]] = ("ridge", "lcm")
    stores: ClassVar[tuple[str, ...]] = ("fitted", "episodes")
    logits: ClassVar[bool] = False  # calibrated, as ``RegionWordRidge``
    on_request: ClassVar[bool] = True
    tuned: ClassVar[str] = ""
    batched: ClassVar[bool] = False
    against: ClassVar[str] = "region_word_ridge"

    def embed(self, trained, features):
        return RegionWordRidge.embed(self, trained, features) | LCM.embed(self, trained, features)

    def embed_key(self, trained):
        return LCMRegions.embed, self.model, id(trained["variables"]), id(trained["components"])

    def keep(self, trained, images):
        return super().keep({**trained, "theta": 0.53}, images)

    def fit(self, trained, images, labels, words):
        kept = images["regions"] * self.keep(trained, images)[..., None]  # a region of length 0 has weight 0
        return super().fit(trained, images | {"regions": kept}, labels, words)

    def statistics(self, state):
        return {}


@dataclasses.dataclass(frozen=True)
class PrototypeRidge(LCMRegions):
    """``WordRidge`` with a prior from the trained model's prototypes instead of words."""

    against: ClassVar[str] = "word_ridge"

    select: bool = dataclasses.field(default=True, metadata=FIXED)  # take LCM's prototypes; else Base's

    def fit(self, trained, images, labels, words):
        joint_words = self._apply(trained, words, method="words")
        keep = self.keep(trained, images) if self.select else None
        prototypes = self._apply(trained, images["joint"], labels, joint_words, keep, method="prototypes")
        x = centred_unit(trained, images)
        dual, left_out = word_ridge.solve(x @ x.T, self._prior(images, prototypes), labels, self.regulariser)
        return {"prototypes": prototypes, "x": x, "dual": dual, "left_out": left_out, "labels": labels}

    def score(self, trained, state, images):
        scores = self._prior(images, state["prototypes"]) + centred_unit(trained, images) @ state["x"].T @ state["dual"]
        return word_ridge.standardised(scores, state["left_out"], state["labels"])

    explain = Method.explain  # no pairs of regions

    def _prior(self, images, prototypes):
        return word_ridge.centred_prior(cosine_logits(images["joint"].mean(axis=1), prototypes, 1.0), self.beta)
