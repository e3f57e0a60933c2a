"""The space in which images and words meet (paper section 4.1)."""

from __future__ import annotations

import flax.linen as nn
import jax


class JointEmbedding(nn.Module):
    """A_visual and A_text: two linear maps without bias into the joint space (eq 2).

    ``visual`` is linear, so it is applied to local features once and everything after lives in ``d_joint`` dimensions.
    """

    d_joint: int
    orthogonal: bool = False  # start A_visual as a (semi-)orthogonal map

    def setup(self):
        visual_init = nn.initializers.orthogonal() if self.orthogonal else nn.initializers.lecun_normal()
        self.a_visual = nn.Dense(self.d_joint, use_bias=False, kernel_init=visual_init)
        self.a_text = nn.Dense(self.d_joint, use_bias=False)

    def visual(self, features: jax.Array) -> jax.Array:
        """float [..., n] -> [..., d_joint]."""
        return self.a_visual(features)

    def text(self, word_vectors: jax.Array) -> jax.Array:
        """float [C, d_w] -> [C, d_joint]."""
        return self.a_text(word_vectors)
