"""Label prototypes from the support set's local features, guided by the label's word (paper section 4.3)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlfsic_jax.core.functional import cosine_logits, unit

ATTENTIONS = ("channelwise", "standard", "global", "simple", "simple_local", "low_rank", "none")


class CrossAttention(nn.Module):
    """Channel-wise cross-attention: queries from the word, keys and values from the local features (eqs 12-14)."""

    n_heads: int  # n_a; each head sees d_joint / n_heads channels, keys and values alike
    dropout: float  # rate inside the MLP
    skip: bool  # a skip connection around the MLP (ours; the paper's equation 14 has none)
    anchor: bool  # start as the plain mean of the local features: uniform attention, identity layers, no MLP
    separate: bool = False  # standard attention, as in WGA: linear layers K_j and V_j make keys and values

    @nn.compact
    def __call__(self, regions, mask, words, train: bool):
        """See ``Prototypes``; float [M, d], bool [C, M], float [C, d] -> float [C, d]."""
        d = words.shape[-1]
        # One linear layer holds the Q_j of all heads.
        query = nn.Dense(d, use_bias=False, kernel_init=_zeros_if(self.anchor), name="query")(words)
        query = query.reshape(-1, self.n_heads, d // self.n_heads)  # [C, heads, d_a]
        keys = values = regions.reshape(-1, self.n_heads, d // self.n_heads)  # [M, heads, d_a]
        if self.separate:
            layer = functools.partial(nn.Dense, d, use_bias=False, kernel_init=_identity_if(self.anchor))
            keys = layer(name="key")(regions).reshape(keys.shape)
            values = layer(name="value")(regions).reshape(values.shape)
        logits = jnp.einsum("chd,mhd->chm", query, keys) / jnp.sqrt(d / self.n_heads)
        self.sow("intermediates", "logits", logits)  # read by ``model.attention_values``
        attention = _masked_softmax(logits, mask[:, None, :])  # [C, heads, M]
        pooled = jnp.einsum("chm,mhd->chd", attention, values).reshape(-1, d)
        hidden = nn.gelu(nn.Dense(d, name="mlp_1")(pooled), approximate=False)
        out = nn.Dense(d, name="mlp_2")(nn.Dropout(self.dropout, deterministic=not train)(hidden))
        if self.anchor:
            out = out * self.param("mlp_gate", nn.initializers.zeros, ())
        return pooled + out if self.skip else out


class SimpleAttention(nn.Module):
    """Mean of the features weighted by softmax(lambda cos(feature, word)) (appendix A.3.1)."""

    scale: float  # lambda

    @nn.compact
    def __call__(self, features, mask, words):
        """See ``Prototypes``; float [M, d], bool [C, M], float [C, d] -> float [C, d]."""
        logits = cosine_logits(words, features, self.scale)  # [C, M]
        self.sow("intermediates", "logits", logits[:, None])
        return _masked_softmax(logits, mask) @ features


class LowRankAttention(nn.Module):
    """Mean of the features weighted as in KGGR (Chen et al. 2020): softmax(f_a(P' tanh(U' feature * V' word) + b)).

    P and f_a, two linear layers in a row, are one here; their biases would cancel in the softmax. All widths are d.
    """

    @nn.compact
    def __call__(self, features, mask, words):
        """See ``Prototypes``; float [M, d], bool [C, M], float [C, d] -> float [C, d]."""
        d = words.shape[-1]
        from_features = nn.Dense(d, use_bias=False, name="feature")(features)  # [M, d]
        from_words = nn.Dense(d, use_bias=False, name="word")(words)  # [C, d]
        joint = jnp.tanh(from_words[:, None] * from_features)  # [C, M, d]
        logits = nn.Dense(1, use_bias=False, name="coefficient")(joint)[..., 0]  # [C, M]
        self.sow("intermediates", "logits", logits[:, None])
        return _masked_softmax(logits, mask) @ features


class DynamicConvolution(nn.Module):
    """Two 1x1 convolutions with kernels generated from the word (eqs 15-16)."""

    d_dynamic: int  # d_d, width between the two
    n_dynamic: int  # n_d, how many local features of a label go through: the nearest to its word by cosine
    anchor: bool  # start at zero

    @nn.compact
    def __call__(self, regions, mask, words):
        """See ``Prototypes``; float [M, d], bool [C, M], float [C, d] -> float [C, d]."""
        d, d_dynamic = words.shape[-1], self.d_dynamic

        def kernel(name, spread, fan_in, fan_out):
            # At the start the bias alone gives a kernel of fan-in scale; the words modulate it.
            inits = {"kernel_init": nn.initializers.normal(spread), "bias_init": nn.initializers.normal(fan_in**-0.5)}
            return nn.Dense(fan_in * fan_out, **inits, name=name)(words).reshape(-1, fan_in, fan_out)

        theta_1 = kernel("kernel_1", 0.02 / d**0.5, d, d_dynamic)
        theta_2 = kernel("kernel_2", 0.02, d_dynamic, d)
        n_top = min(self.n_dynamic, mask.shape[1])
        similarity = jnp.where(mask, unit(words) @ unit(regions).T, -jnp.inf)  # [C, M]
        similarity, top = jax.lax.top_k(jax.lax.stop_gradient(similarity), n_top)
        present = jnp.isfinite(similarity)[..., None]  # a label with fewer averages those it has
        u = jnp.einsum("ckd,cde->cke", regions[top], theta_1)
        u = nn.relu(nn.LayerNorm(name="norm_1")(u))
        u = jnp.einsum("cke,ced->ckd", u, theta_2)
        u = nn.relu(nn.LayerNorm(name="norm_2")(u))
        out = jnp.sum(jnp.where(present, u, 0), axis=1) / jnp.maximum(present.sum(axis=1), 1)
        return out * self.param("gate", nn.initializers.zeros, ()) if self.anchor else out


class Prototypes(nn.Module):
    """p_c = cross-attention + dynamic convolution (eq 17), or an ablation of them (section 5.4.1, appendix A.3.1)."""

    # Explained where ``CrossAttention`` and ``DynamicConvolution`` use them.
    n_heads: int = 8
    d_dynamic: int = 64
    n_dynamic: int = 16
    dropout: float = 0.1
    skip: bool = True
    anchor: bool = False
    # how p_att is made. "channelwise": the paper's; "standard": with layers for keys and values; "global": the paper's,
    # on global features; "simple" and "simple_local": ``SimpleAttention`` on global and on local features; "low_rank":
    # ``LowRankAttention``; "none": not at all. The simple ones and "low_rank" have no MLP. An image's global feature is
    # the mean of its kept local features.
    attention: str = "channelwise"
    dynamic: bool = True  # whether there is p_dyn
    scale: float = 10.0  # lambda of the simple attentions
    # Of the two parts: 0 adds them as they are, eq 17; g adds p_att / |p_att| + g p_dyn / |p_dyn|. As they are, layer
    # normalisation gives p_dyn a length that the shots do not change, and p_att gets shorter with more of them.
    balance: float = 0.0

    @nn.compact
    def __call__(self, regions, labels, words, keep=None, train: bool = False):
        """Computes the prototypes of all labels.

        Args:
          regions: float [S, L, d], the support's local features in the joint space.
          labels: 0/1 or bool [S, C]; a label's prototype uses every support image that has it.
          words: float [C, d], label embeddings in the joint space.
          keep: bool [S, L], positions to use (LCM), or None for all.
          train: whether dropout is active (needs the rng "dropout").

        Returns:
          float [C, d], finite even for a label without a support image.

        Raises:
          ValueError: there is no such attention, or neither attention nor dynamic convolution.
        """
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {ATTENTIONS}, not {self.attention!r}")
        if self.attention == "none" and not self.dynamic:
            raise ValueError("attention='none' needs dynamic=True: there is nothing else to make prototypes of")
        s, n_locals, d = regions.shape
        keep = jnp.ones((s, n_locals), bool) if keep is None else keep
        mask = (labels.astype(bool).T[:, :, None] & keep[None]).reshape(-1, s * n_locals)  # [C, S * L]
        flat = regions.reshape(-1, d)
        features, present = flat, mask
        if self.attention in ("global", "simple"):
            present = labels.astype(bool).T & keep.any(axis=1)  # [C, S]
            features = jnp.where(keep[..., None], regions, 0).sum(axis=1)  # [S, d]
            features = features / jnp.maximum(keep.sum(axis=1, keepdims=True), 1)

        attended = convolved = 0.0
        if self.attention in ("channelwise", "standard", "global"):
            separate = self.attention == "standard"
            attention = CrossAttention(self.n_heads, self.dropout, self.skip, self.anchor, separate, name="attention")
            attended = attention(features, present, words, train)
        elif self.attention in ("simple", "simple_local"):
            attended = SimpleAttention(self.scale, name="attention")(features, present, words)
        elif self.attention == "low_rank":
            attended = LowRankAttention(name="attention")(features, present, words)
        if self.dynamic:
            dynamic = DynamicConvolution(self.d_dynamic, self.n_dynamic, self.anchor, name="dynamic")
            convolved = dynamic(flat, mask, words)
        if self.balance and self.dynamic and self.attention != "none":
            return unit(attended) + self.balance * unit(convolved)
        return attended + convolved


def _identity_if(anchor: bool):
    return (lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype)) if anchor else nn.initializers.lecun_normal()


def _zeros_if(anchor: bool):
    return nn.initializers.zeros if anchor else nn.initializers.lecun_normal()


def _masked_softmax(logits, mask):
    """Softmax over the last axis where ``mask``; all zero where nothing is left."""
    highest = jnp.max(logits, axis=-1, keepdims=True, where=mask, initial=-1e30)
    weights = jnp.exp(jnp.where(mask, logits - highest, -jnp.inf))  # not exp(..) * mask: inf * 0 is NaN
    return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
