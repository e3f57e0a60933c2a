"""The smallest settings with which the whole program runs. Tests that share these sizes share compiled programs."""

import json

import jax

from configs import demo

TINY = {
    "shots": (1,),
    "data.image_size": 32,
    "data.images_per_split": (80, 60, 60),
    "model.d_joint": 16,
    "model.n_heads": 2,
    "model.d_dynamic": 4,
    "model.n_dynamic": 4,
    "lcm.thresholds": (0.5, 0.53, 0.6),
    "train.epochs": 2,
    "train.warmup_epochs": 1,
    "train.episodes_per_epoch": 1,
    "train.n_query": 1,
    "train.validate_every": 1,
    "train.validation_episodes": 2,
    "eval.episodes": 4,
    "eval.sweep_episodes": 4,
    "eval.n_query": 2,
}


def scenes(folder, **changes):
    """Config of a run on generated scenes whose caches are in ``folder``."""
    config = demo.get_config()
    config.cache_dir = str(folder / "cache")
    config.update_from_flattened_dict(TINY | changes)
    return config


def longer(folder, **changes):
    """``scenes`` with four epochs of two steps, to be stopped between any two of them."""
    return scenes(folder, **{"train.epochs": 4, "train.episodes_per_epoch": 2} | changes)


def without_paths(results):
    """The content of ``results.json`` without its configs, which name folders."""
    return [{k: v for k, v in r.items() if k != "config"} for r in json.loads(json.dumps(results))]


def acting(step, at, action):
    """A training step that calls ``action`` before its call number ``at``, and a list that grows with each call."""
    calls = []

    def acts(*args, **options):
        if len(calls) + 1 == at:
            action()
        calls.append(1)
        return step(*args, **options)

    return acts, calls


def share_compiled(cache_dir):
    """Lets a command with this ``cache_dir`` use the compiled programs of the tests."""
    cache_dir.mkdir(parents=True)
    (cache_dir / "compiled").symlink_to(jax.config.jax_compilation_cache_dir, target_is_directory=True)
