"""The Base and LCM models: backbone, joint embedding and prototypes together (paper section 4)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlfsic_jax.core.functional import binary_cross_entropy, cosine_logits
from mlfsic_jax.core.lcm import LCMOptions, loss_change, select_positions
from mlfsic_jax.core.options import one_of, positive, require
from mlfsic_jax.core.prototypes import ATTENTIONS, Prototypes


class JointEmbedding(nn.Module):
    """A_visual and A_text: two linear maps without bias into the joint space (eq 2).

    ``visual`` is linear, so it is applied to local features once; everything after has ``d_joint`` dimensions.
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


class BaseModel(nn.Module):
    """Joint embedding plus word-guided prototypes, on local features or, with a backbone, on photos.

    Linen rather than NNX: parameters are a plain pytree outside the module, so vmap, grad and scan over episodes need
    nothing special.

    Attributes:
      d_joint: width of the joint space, d_j.
      scale: lambda of eqs 4 and 19.
      n_heads, d_dynamic, n_dynamic, dropout, skip, attention, dynamic, balance: of ``Prototypes``.
      anchor: start at the plain prototype classifier (ours): orthogonal A_visual, uniform attention, closed gates.
      backbone: a module, photos -> local features, trained with the rest; None where inputs are local features.
      freeze_visual: keep A_visual, and a backbone, as they were initialised.
      cm_loss: train with L_cm; False is an ablation (section 5.4.1).
      query_loss_on: images in L_query: "query", or "both" support and query, WGA's ablation of the CM loss.
      query_top: k of ``query_logits``; 0 compares global features of the queries.
    """

    d_joint: int = 512
    scale: float = Prototypes.scale
    n_heads: int = Prototypes.n_heads
    d_dynamic: int = Prototypes.d_dynamic
    n_dynamic: int = Prototypes.n_dynamic
    dropout: float = Prototypes.dropout
    skip: bool = Prototypes.skip
    anchor: bool = Prototypes.anchor
    backbone: nn.Module | None = None
    attention: str = Prototypes.attention
    dynamic: bool = Prototypes.dynamic
    balance: float = Prototypes.balance
    freeze_visual: bool = False
    cm_loss: bool = True
    query_loss_on: str = "query"
    query_top: int = 0

    def __post_init__(self):
        prototypes = "must be True where attention is none: there is nothing else to make prototypes of"
        anchored = self.attention in ("channelwise", "standard", "global") or not self.anchor
        named, rule = one_of(self.attention, ATTENTIONS)
        if not anchored:
            rule = "must be channelwise, standard or global where anchor is True"
        require(
            self,
            **positive(self, "scale", "n_heads", "d_dynamic", "n_dynamic"),
            d_joint=(self.d_joint > 0 and not self.d_joint % max(self.n_heads, 1), "must be a multiple of n_heads"),
            dropout=(0 <= self.dropout < 1, "must be in [0, 1)"),
            skip=(self.skip or not self.anchor, "must be True where anchor is"),
            attention=(named and anchored, rule),
            dynamic=(self.dynamic or self.attention != "none", prototypes),
            balance=(self.balance >= 0, "must be at least 0"),
            query_loss_on=one_of(self.query_loss_on, ("query", "both")),
            query_top=(self.query_top >= 0, "must be at least 0"),
        )
        super().__post_init__()

    def setup(self):
        self.joint = JointEmbedding(self.d_joint, orthogonal=self.anchor)
        self.prototype = Prototypes(
            *(self.n_heads, self.d_dynamic, self.n_dynamic, self.dropout, self.skip, self.anchor),
            *(self.attention, self.dynamic, self.scale, self.balance),
        )

    def features(self, inputs, train: bool = False):
        """Photos float [B, H, W, 3] (with a backbone) or local features [B, h, w, n] -> [B, h, w, n] float32."""
        return self.backbone(inputs, train) if self.backbone is not None else inputs.astype(jnp.float32)

    def regions(self, features):
        """Local features [B, h, w, n] -> [B, h * w, d_joint] in the joint space."""
        return self.joint.visual(features.reshape(features.shape[0], -1, features.shape[-1]))

    def words(self, word_vectors):
        """float [C, d_w] -> [C, d_joint]."""
        return self.joint.text(word_vectors)

    def prototypes(self, regions, labels, words, keep=None, train: bool = False):
        """See ``Prototypes``."""
        return self.prototype(regions, labels, words, keep, train)

    def query_logits(self, regions, prototypes):
        """lambda times the cosine of queries and prototypes (eq 19, appendix A.3.3).

        With ``query_top`` = k, the mean of the k highest cosines between a query's local features and a prototype. The
        paper takes their sum, which ranks alike; with the mean, lambda keeps its meaning.

        Args:
          regions: float [Q, L, d], local features; their means, [Q, 1, d], suffice where ``query_top`` is 0.
          prototypes: float [C, d].

        Returns:
          float [Q, C].
        """
        if not self.query_top:
            return cosine_logits(regions.mean(axis=1), prototypes, self.scale)
        logits = cosine_logits(regions, prototypes, self.scale).swapaxes(1, 2)  # [Q, C, L]
        highest, _ = jax.lax.top_k(logits, min(self.query_top, logits.shape[-1]))
        return highest.mean(axis=-1)

    def losses(self, support, query, support_labels, query_labels, word_vectors, *, lcm=None, threshold=0.53):
        """The two losses of one training episode, summed over images and labels (eqs 3, 18).

        Args:
          support: inputs of the S support images, see ``features``.
          query: inputs of the Q query images.
          support_labels: 0/1 [S, C].
          query_labels: 0/1 [Q, C].
          word_vectors: float [C, d_w].
          lcm: ``LCMOptions`` to select regions in training too, or None.
          threshold: theta where ``lcm`` is given.

        Returns:
          (L_cm, L_query), two scalars; L_cm is 0 without ``cm_loss``.
        """
        features, n_support = self.features(jnp.concatenate([support, query]), train=True), len(support)
        regions, words = self.regions(features[:n_support]), self.words(word_vectors)
        # Pooled first where only global features are compared: A_visual is linear.
        features = features[n_support:] if self.query_top else features[n_support:].mean(axis=(1, 2), keepdims=True)
        queries = self.regions(features)
        if self.freeze_visual:
            regions, queries = jax.lax.stop_gradient((regions, queries))
        cm = jnp.zeros(())
        if self.cm_loss:
            by_words = cosine_logits(regions.mean(axis=1), words, self.scale)
            cm = binary_cross_entropy(by_words, support_labels).sum()
        keep = None
        if lcm is not None:
            frozen, frozen_words = jax.lax.stop_gradient((regions, words))
            scores = self.lcm_scores(frozen, support_labels, frozen_words, lcm)
            keep = select_positions(scores, threshold, scale=self.scale, score_scaling=lcm.score_scaling)
        prototypes = self.prototypes(regions, support_labels, words, keep, train=True)
        images, labels = queries, query_labels
        if self.query_loss_on == "both":
            own = regions if self.query_top else regions.mean(axis=1, keepdims=True)
            images, labels = jnp.concatenate([own, queries]), jnp.concatenate([support_labels, query_labels])
        return cm, binary_cross_entropy(self.query_logits(images, prototypes), labels).sum()

    def lcm_scores(self, regions, labels, words, options: LCMOptions):
        """LCM's raw scores: float [S, L, d], 0/1 [S, C], float [C, d] -> float [S, L]."""
        return loss_change(regions, labels, words, scale=self.scale, options=options)[0]

    def __call__(self, support, query, support_labels, query_labels, word_vectors):
        return self.losses(support, query, support_labels, query_labels, word_vectors)


def attention_values(model: BaseModel, variables, regions, words):
    """Attention logits of every region for every label, summed over heads: float [S, C, L].

    The papers show these maps (WGA, figure 4; Yan et al. 2025, appendix A.3.4). LCM does not change them; it only
    removes regions before the softmax. Attention on global features gives all regions of an image the same value; a
    model without attention gives 0. ``regions``, float [S, L, d_joint], and ``words``, float [C, d_joint], are those of
    ``BaseModel``.
    """
    labels = jnp.ones((len(regions), len(words)))
    shape = (*labels.shape, regions.shape[1])
    if model.attention == "none":
        return jnp.zeros(shape, words.dtype)
    _, state = model.apply(variables, regions, labels, words, method="prototypes", mutable="intermediates")
    (logits,) = state["intermediates"]["prototype"]["attention"]["logits"]  # [C, heads, S * L], or S if global
    return jnp.broadcast_to(logits.sum(axis=1).reshape(len(words), len(regions), -1).swapaxes(0, 1), shape)
