"""The Base and LCM models: backbone, joint embedding, prototypes put together (paper section 4)."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlfsic_jax.joint_embedding import JointEmbedding
from mlfsic_jax.lcm import loss_change, select_positions
from mlfsic_jax.losses import binary_cross_entropy
from mlfsic_jax.prototypes import Prototypes
from mlfsic_jax.similarity import cosine_logits


class LCMOptions(NamedTuple):
    """How LCM runs inside the model; fields as in ``lcm_select``."""

    steps: int = 20
    step_size: float = 1.0
    momentum: float = 0.95
    score_scaling: str = "minmax"


class BaseModel(nn.Module):
    """Joint embedding plus word-guided prototypes, on local features or, with a backbone, on photos.

    Linen rather than NNX: parameters are a plain pytree outside of the module, so vmap, grad and scan over episodes
    need nothing special.

    Attributes:
      d_joint: width of the joint space, d_j.
      scale: lambda of eqs 4 and 19.
      prototypes: fields of ``Prototypes``.
      anchor: start at the plain prototype classifier (ours): orthogonal A_visual, uniform attention, closed gates.
      backbone: a module photos -> local features trained with the rest, or None where inputs are local features.
    """

    d_joint: int = 512
    scale: float = 10.0
    n_heads: int = 8
    d_dynamic: int = 64
    n_dynamic: int = 16
    dropout: float = 0.1
    skip: bool = True
    anchor: bool = False
    backbone: nn.Module | None = None

    def setup(self):
        self.joint = JointEmbedding(self.d_joint, orthogonal=self.anchor)
        self.prototype = Prototypes(self.n_heads, self.d_dynamic, self.n_dynamic, self.dropout, self.skip, self.anchor)

    def features(self, inputs, train: bool = False):
        """Photos float [B, H, W, 3] (with a backbone) or local features [B, h, w, n] -> [B, h, w, n] float32."""
        return self.backbone(inputs, train) if self.backbone is not None else inputs.astype(jnp.float32)

    def locals(self, features):
        """Local features [B, h, w, n] -> [B, h * w, d_joint] in the joint space."""
        return self.joint.visual(features.reshape(features.shape[0], -1, features.shape[-1]))

    def words(self, word_vectors):
        """float [C, d_w] -> [C, d_joint]."""
        return self.joint.text(word_vectors)

    def prototypes(self, locals_, labels, words, keep=None, train: bool = False):
        """See ``Prototypes``."""
        return self.prototype(locals_, labels, words, keep, train)

    def losses(self, support, query, support_labels, query_labels, word_vectors, *, lcm=None, threshold=0.53):
        """The two losses of one training episode, summed over images and labels (eqs 3, 18).

        Args:
          support: inputs of the S support images, see ``features``.
          query: inputs of the Q query images.
          support_labels: 0/1 [S, C].
          query_labels: 0/1 [Q, C].
          word_vectors: float [C, d_w].
          lcm: ``LCMOptions`` to select regions during training too, or None.
          threshold: theta where ``lcm`` is given.

        Returns:
          (L_cm, L_query), two scalars.
        """
        features = self.features(jnp.concatenate([support, query]), train=True)
        locals_, words = self.locals(features), self.words(word_vectors)
        pooled, n_support = locals_.mean(axis=1), len(support)
        cm = binary_cross_entropy(cosine_logits(pooled[:n_support], words, self.scale), support_labels)
        keep = None
        if lcm is not None:
            frozen, frozen_words = jax.lax.stop_gradient((locals_[:n_support], words))
            scores = self.lcm_scores(frozen, support_labels, frozen_words, lcm)
            keep = select_positions(scores, threshold, scale=self.scale, score_scaling=lcm.score_scaling)
        prototypes = self.prototypes(locals_[:n_support], support_labels, words, keep, train=True)
        query = binary_cross_entropy(cosine_logits(pooled[n_support:], prototypes, self.scale), query_labels)
        return cm.sum(), query.sum()

    def lcm_scores(self, locals_, labels, words, options: LCMOptions):
        """LCM's raw scores: float [S, L, d], 0/1 [S, C], float [C, d] -> float [S, L]."""
        score, _ = loss_change(
            locals_,
            labels,
            words,
            scale=self.scale,
            steps=options.steps,
            step_size=options.step_size,
            momentum=options.momentum,
        )
        return score

    def __call__(self, support, query, support_labels, query_labels, word_vectors):
        return self.losses(support, query, support_labels, query_labels, word_vectors)


def attention_values(model: BaseModel, variables, locals_, words):
    """What the attention gives every region for every label: the sum over its heads, before the softmax.

    These are the maps that the papers show (WGA, figure 4; Yan et al. 2025, appendix A.3.4). LCM does not change them,
    it only takes regions away before the softmax.

    Args:
      model: the model.
      variables: its parameters.
      locals_: float [S, L, d_joint], local features in the joint space, see ``BaseModel.locals``.
      words: float [C, d_joint], see ``BaseModel.words``.

    Returns:
      float [S, C, L].
    """
    labels = jnp.ones((len(locals_), len(words)))
    _, state = model.apply(variables, locals_, labels, words, method="prototypes", mutable="intermediates")
    (logits,) = state["intermediates"]["prototype"]["attention"]["logits"]  # [C, heads, S * L]
    return logits.sum(axis=1).reshape(len(words), *locals_.shape[:2]).swapaxes(0, 1)
