"""One episode through the contract of a method."""

import jax
import jax.numpy as jnp

from mlfsic_jax.run import evaluate


def episode_scores(method, trained, support, labels, query, words=None):
    """Scores or probabilities [Q, C] for local features [S, L, n] and [Q, L, n], as one compiled program in float32."""

    @jax.jit
    def run(trained, support, labels, query, words):
        images = method.embed(trained, support)
        images |= method.embed_support(trained, images, labels, words)
        state = method.fit(trained, images, labels, words)
        return method.score(trained, state, method.embed(trained, query))

    support, query = (jnp.asarray(x, jnp.float32) for x in (support, query))
    return evaluate.probabilities(method, run(trained, support, jnp.asarray(labels), query, words))
