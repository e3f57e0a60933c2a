"""The contract of a method: a small hashable value; its state is a pytree of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import jax

    from mlfsic_jax.data.features import View

FIXED = {"fixed": True}  # metadata of a field that tells entries of ``METHODS`` apart: no config may change it


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to tell which labels an image has, from a few examples of each.

    The fields of a subclass are its options, with their only defaults and rules (``__post_init__``). Its functions are
    pure and traceable, except ``train``. Evaluation, own photos, report and tables call nothing else. To add a method,
    subclass and add one line to ``METHODS``.

    Notation: I images, L local positions, n channels of the backbone, S support images, Q queries, C labels.

    Attributes:
      sections: config sections that set the options; methods of one family share theirs.
      stores: names under which ``trained`` is kept; of methods that share a store the first of ``METHODS``
        is trained, for all.
      base: what ``train`` needs from the base split: "" for nothing, "images", or "labels".
      adapts: ``fit`` learns from the support images; a method that does not is no default for own photos.
      needs_words: labels need word vectors.
      words_from: where ``fit`` gets them: "" for those of the config, else see ``View.named_vectors``.
      needs_photos: every label needs a support image.
      needs_contrast: every label needs a support image without it.
      takes_unknown: labels of ``fit`` may be NaN, unknown, so that support sets can be filled up to sizes that share
        programs.
      calibrated: ``score`` gives standardised scores, and sigmoid(slope * score + intercept), fitted on validation
        labels, the probabilities; otherwise scores are used as probabilities.
      logits: ``score`` gives logits, whose sigmoid is taken in float64: in float32 that of 17 and more is 1.
      tuned: the leaf of ``trained`` that is chosen among ``candidates`` on validation labels; "" for none.
      on_request: left out of an evaluation that does not name it.
      batched: map several episodes at once (vmap); else one by one, each in the processor's cache.
      control: shows what chance or an untrained model does; never chosen for own photos, and not kept for them.
      against: a plainer method to compare with, episode by episode.
    """

    sections: ClassVar[tuple[str, ...]] = ()
    stores: ClassVar[tuple[str, ...]] = ()
    base: ClassVar[str] = ""
    adapts: ClassVar[bool] = True
    needs_words: ClassVar[bool] = False
    words_from: ClassVar[str] = ""
    needs_photos: ClassVar[bool] = True
    needs_contrast: ClassVar[bool] = False
    takes_unknown: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    logits: ClassVar[bool] = False
    tuned: ClassVar[str] = ""
    on_request: ClassVar[bool] = False
    batched: ClassVar[bool] = False
    control: ClassVar[bool] = False
    against: ClassVar[str] = ""

    def __post_init__(self):
        """Checks the options, see ``core.options.require``."""

    def explaining(self) -> Method:
        """The same method, keeping what ``explain`` needs, for own photos and the report."""
        return self

    def train(self, key: jax.Array, base: View) -> dict[str, Any]:
        """Learns from the base split, once.

        Args:
          key: fixes all random choices.
          base: images of labels that are in no episode; its inputs are local features.

        Returns:
          ``trained``: nested dicts of arrays.
        """
        return {}

    def candidates(self) -> tuple[float, ...]:
        """Values to try for the leaf ``tuned``."""
        return ()

    def embed(self, trained, features) -> dict[str, Any]:
        """Computed once per image: local features float32 [I, L, n] -> arrays [I, ...]."""
        return {"pooled": features.mean(axis=1)}

    def embed_key(self, trained) -> Hashable:
        """Methods with equal keys share the results of ``embed``."""
        return (Method.embed,) if type(self).embed is Method.embed else (self, id(trained))

    def embed_support(self, trained, images, labels, words) -> dict[str, Any]:
        """Computed once per support set by methods that share it, for ``fit``: what it returns joins ``images``.

        Args:
          trained: see ``train``; without the value of ``tuned``.
          images: from ``embed``, [S, ...].
          labels: bool [S, C].
          words: float32 [C, d_w], word vectors.
        """
        return {}

    def support_key(self, trained) -> Hashable:
        """Methods with equal keys share the results of ``embed_support``."""
        return self, id(trained)

    def fit(self, trained, images, labels, words) -> Any:
        """Adapts to one support set.

        Args:
          trained: see ``train``.
          images: from ``embed``, [S, ...], and what ``embed_support`` returned.
          labels: bool [S, C].
          words: float32 [C, d_w]; None where ``needs_words`` is False and there are none.

        Returns:
          ``state``: a pytree of arrays.
        """
        raise NotImplementedError

    def score(self, trained, state, images):
        """Scores queries: ``images`` from ``embed``, [Q, ...] -> float [Q, C]."""
        raise NotImplementedError

    def statistics(self, state) -> dict[str, Any]:
        """Scalars of a fit, reported as means over episodes."""
        return {}

    def explain(self, trained, state, images) -> dict[str, Any] | None:
        """Splits a query's scores, of a calibrated method before they are centred, region by region; or None.

        Returns:
          "prior" float [Q, C], "pairs" float [Q, S, L, L] and "dual" float [S, C]: a score is the prior plus the sum
          over support images s and regions l and m of ``pairs[q, s, l, m] * dual[s, c]``. Of a prior that comes from
          regions and classes also "prior_pairs" float [Q, L, C] and "classes" float [C, K].
        """
        return None
