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

    The fields of a subclass are its options; their defaults and rules (``__post_init__``) stand nowhere else. The
    functions below are pure and traceable, but for ``train``. Evaluation, own photos, report and tables call nothing
    else. To add a method: subclass, and add one line to ``METHODS``.

    Notation: I images, L local positions, n channels of the backbone, S support images, Q queries, C labels.

    Attributes:
      sections: of the config, which set the options; methods of one family share theirs.
      stores: names under which ``trained`` is kept; methods with the same store are trained once, together.
      base: what ``train`` needs of the base split: "" for nothing, "images", or "labels".
      needs_words: whether the labels need word vectors.
      needs_contrast: whether every label needs a support image without it.
      calibrated: ``score`` gives standardised scores; the probability is sigmoid(slope * score + intercept), and
        these two numbers are fitted on validation labels. Otherwise scores stand for probabilities as they are.
      tuned: the leaf of ``trained`` that is chosen on validation labels, among ``candidates``; "" for none.
      on_request: leave it out of an evaluation that does not name it.
      batched: map several episodes at once (vmap); else one by one, each in the processor's cache.
      against: the plainer method that it is compared with, episode by episode.
    """

    sections: ClassVar[tuple[str, ...]] = ()
    stores: ClassVar[tuple[str, ...]] = ()
    base: ClassVar[str] = ""
    needs_words: ClassVar[bool] = False
    needs_contrast: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    tuned: ClassVar[str] = ""
    on_request: ClassVar[bool] = False
    batched: ClassVar[bool] = False
    against: ClassVar[str] = ""

    def __post_init__(self):
        """Checks the options, see ``core.options.require``."""

    def train(self, key: jax.Array, base: View) -> dict[str, Any]:
        """What the base split teaches, once.

        Args:
          key: fixes what is random.
          base: images whose labels are none of the episodes'; its inputs are local features.

        Returns:
          ``trained``: nested dicts of arrays.
        """
        return {}

    def candidates(self) -> tuple[float, ...]:
        """Values of the leaf ``tuned``."""
        return ()

    def embed(self, trained, features) -> dict[str, Any]:
        """What is computed once per image: local features float32 [I, L, n] -> arrays [I, ...]."""
        return {"pooled": features.mean(axis=1)}

    def embed_key(self, trained) -> Hashable:
        """Methods with equal keys share what ``embed`` gives."""
        return (Method.embed,) if type(self).embed is Method.embed else (self, id(trained))

    def embed_support(self, trained, images, labels, words) -> dict[str, Any]:
        """What is computed once per support image, whatever its episode; joins what ``embed`` gave.

        Args:
          trained: see ``train``.
          images: of ``embed``, [I, ...].
          labels: bool [I, C].
          words: float32 [C, d_w], word vectors.
        """
        return {}

    def fit(self, trained, images, labels, words) -> Any:
        """Adapts to one support set.

        Args:
          trained: see ``train``.
          images: of ``embed`` and ``embed_support``, [S, ...].
          labels: bool [S, C].
          words: float32 [C, d_w]; None where ``needs_words`` is False and there are none.

        Returns:
          ``state``: a pytree of arrays.
        """
        raise NotImplementedError

    def score(self, trained, state, images):
        """Scores queries: ``images`` of ``embed``, [Q, ...] -> float [Q, C]."""
        raise NotImplementedError

    def statistics(self, state) -> dict[str, Any]:
        """Scalars of a fit that are reported as means over episodes."""
        return {}

    def explain(self, trained, state, images) -> dict[str, Any] | None:
        """What a query's scores are made of, region by region, or None.

        Returns:
          "prior" float [Q, C], "pairs" float [Q, S, L, L] and "dual" float [S, C]: a score is the prior plus the sum
          over support images s and regions l and m of ``pairs[q, s, l, m] * dual[s, c]``.
        """
        return None
