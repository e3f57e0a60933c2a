"""How CLIP (Radford et al. 2021) goes from local features to the space that images and texts share."""

import jax
import jax.numpy as jnp

from mlfsic_jax.core.functional import unit

_HEAD = 64  # channels of one head


def pool(params, features):
    """Local features float [I, L, n] -> float [I, e] of length 1.

    ``params`` are named as in OpenAI's code. With "proj", [n, e], the first position is the class token of a
    transformer, which is projected. Else they are those of attention pooling: "positional_embedding" [1 + L, n];
    "q_proj.weight", "k_proj.weight", "v_proj.weight" [n, n] and "c_proj.weight" [e, n], each with its bias. The mean
    over positions attends to itself and to all positions.
    """
    if "proj" in params:
        return unit(features[:, 0] @ params["proj"])
    x = jnp.concatenate([features.mean(axis=1, keepdims=True), features], axis=1) + params["positional_embedding"]

    def project(name, x):
        return x @ params[f"{name}_proj.weight"].T + params[f"{name}_proj.bias"]

    def by_head(x):
        return x.reshape(*x.shape[:2], -1, min(_HEAD, x.shape[2]))

    query, key, value = by_head(project("q", x[:, :1])), by_head(project("k", x)), by_head(project("v", x))
    mixed = jax.nn.dot_product_attention(query, key, value)
    return unit(project("c", mixed.reshape(len(x), -1)))
