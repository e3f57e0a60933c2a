"""All peers through their one interface, on made-up images in which labels can be learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax.core.episodes import sample_episodes
from mlfsic_jax.core.metrics import mean_and_ci95, multilabel_metrics
from mlfsic_jax.data.features import View
from mlfsic_jax.methods import PEERS, laso, pla

N, EPISODES = 12, 20
# Widths and steps of milliseconds; what is not here is as in a run.
SMALL = {
    "maml": {"width": 16, "episodes": 50},
    "maml_first_order": {"width": 16, "episodes": 50},
    "laso": {"width": 16, "n_components": 8, "steps": 100},
    "pla": {"width": 16, "n_components": 8, "steps": 150, "learning_rate": 3e-3},
    "pla_words": {"width": 16, "n_components": 8, "steps": 150, "learning_rate": 3e-3},
}


def split(seed, n_labels, n_images=120):
    """An image is noise, and in one or two places the direction of each of its labels."""
    rng = np.random.default_rng(seed)
    labels = np.eye(n_labels, dtype=bool)[np.arange(n_images) % n_labels] | (rng.random((n_images, n_labels)) < 0.1)
    directions = 4 * np.linalg.qr(rng.normal(size=(N, n_labels)))[0].T
    local = rng.normal(size=(n_images, 4, N))
    for i, c in np.argwhere(labels):
        local[i, rng.permutation(4)[: rng.integers(1, 3)]] += directions[c]
    local = local.reshape(n_images, 2, 2, N).astype(np.float16)
    return View(local.__getitem__, labels, rng.normal(size=(n_labels, 6)).astype(np.float32), ("",) * n_labels)


@pytest.mark.parametrize("name", PEERS)
def test_peer_learns_novel_labels_better_than_chance(name, monkeypatch):
    # What takes long to compile: random numbers for every block's dropout, every step of the decoder.
    monkeypatch.setattr(laso, "_BLOCKS", 1)
    monkeypatch.setattr(pla, "MAX_LABELS", 2)
    base, novel = split(0, 4), split(1, 3)
    peer = PEERS[name]
    trained = peer.train(jax.random.key(0), base, n_shot=3, n_query=2, **SMALL.get(name, {}))
    assert all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(trained))
    episodes = sample_episodes(jax.random.key(1), novel.labels, n_episodes=EPISODES, n_shot=3, n_query=6)
    local = novel.inputs(np.arange(120)).reshape(120, 4, N).astype(np.float32)
    truth = novel.labels[episodes.query]

    @jax.jit
    def score(trained, keys, episodes, local, labels, words):
        def one(inputs):
            key, (support, query) = inputs
            return peer.score(trained, key, local[support], labels[support], local[query], words)

        return jax.lax.map(one, (keys, episodes))

    keys = jax.random.split(jax.random.key(2), EPISODES)
    args = (trained, keys, episodes, local, jnp.asarray(novel.labels), novel.word_vectors)
    got = np.asarray(score(*args))
    assert got.shape == truth.shape and got.dtype == np.float32
    assert (got >= 0).all() and (got <= 1).all()
    chance = np.random.default_rng(0).random(truth.shape)
    gain = multilabel_metrics(got, truth)["macro_ap"] - multilabel_metrics(chance, truth)["macro_ap"]
    gain = mean_and_ci95(gain)
    assert gain["mean"] > gain["ci95"]
