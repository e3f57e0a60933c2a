"""Cases of whole programs: feature extraction, training steps, evaluation."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlfsic_jax.bench import made_up
from mlfsic_jax.bench.measure import Case
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data.features import Cache
from mlfsic_jax.run import experiment
from mlfsic_jax.run.config import create_model, default
from mlfsic_jax.run.step import create_train_state
from mlfsic_jax.system import parallel


def features(quick: bool) -> Iterator[Case]:
    """Photos to local features, as the cache is filled."""
    name, batch, size = ("conv4", 2, 32) if quick else ("resnet50", 32, 224)
    backbone = made_up.photo_backbone(name)
    photos = np.random.default_rng(0).integers(0, 255, (batch, size, size, 3), np.uint8)
    variables = made_up.random_variables(backbone, photos)
    forward = jax.jit(backbone.apply).lower(variables, photos).compile()
    work = forward.cost_analysis()["flops"]
    n = round((work / 2) ** (1 / 3))
    square, product = jnp.ones((n, n)), jax.jit(lambda x: x @ x)
    yield Case(
        f"feature extraction, {name}, {batch} photos of {size}x{size}",
        lambda: forward(variables, photos),
        {f"a matrix product as large, {n}^3": lambda: product(square)},
        work=work,
        pytorch=("features", name, photos),
        targets={} if jax.default_backend() == "cpu" else {"peak": 0.5},
    )


def training(quick: bool) -> Iterator[Case]:
    """One step on cached features with VOC's 8 train labels."""
    side, n, n_labels = (2, 16, 3) if quick else (7, 2048, 8)
    model = BaseModel(**made_up.SMALL) if quick else BaseModel()
    cached = np.random.default_rng(0).random((20 * n_labels, side, side, n), np.float32).astype(np.float16)
    split = made_up.view(cached.__getitem__, made_up.one_label_each(20 * n_labels, n_labels))
    step, params, batch = made_up.training_step(model, split)
    n_images, d = 5 * n_labels, model.d_joint
    x = jnp.asarray(cached[:n_images], jnp.float32).reshape(-1, n)
    down, up = jnp.ones((n, d)), jnp.ones((len(x), d))
    both = jax.jit(lambda x, down, up: (x @ down, x.T @ up))
    yield Case(
        f"training step, cached, {n_images} x {side}x{side}x{n}, {n_labels} labels",
        step,
        {"its projection alone, there and back": lambda: both(x, down, up)},
        work=4.0 * len(x) * n * d + 3 * made_up.prototype_work(n_labels, n_labels * side * side, d, model.d_dynamic),
        pytorch=("training", model, params, batch, split.word_vectors),
        targets={"pytorch": 1.5},
    )


def training_memory(quick: bool) -> Iterator[Case]:
    """Training steps over a cache of COCO's size that is read from disk, a file of zeros."""
    side, n = (2, 16) if quick else (7, 2048)
    n_images, n_labels, n_positives = (300, 4, 200) if quick else made_up.COCO
    n_steps, model = (2, BaseModel(**made_up.SMALL)) if quick else (8, BaseModel())
    labels = made_up.label_matrix(n_images, n_labels, n_positives)
    with tempfile.TemporaryDirectory() as folder:
        shape, path = (n_images, side, side, n), Path(folder) / "values.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)  # takes no room: a file with a hole
        cache = Cache(shape, np.dtype(np.float16), {}, Path(folder))
        step = made_up.training_step(model, made_up.view(cache.read, labels))[0]  # the rest is freed
        rows = np.random.default_rng(0).integers(0, n_images, 5 * n_labels)
        yield Case(
            f"{n_steps} training steps, cache of {n_images} x {side}x{side}x{n}, {n_labels} labels",
            lambda: [jax.block_until_ready(step()) for _ in range(n_steps)],
            {"reading their features": lambda: sum(len(cache.read(rows)) for _ in range(n_steps))},
            work=4.0 * n_steps * len(rows) * side * side * n * model.d_joint,
            targets={"memory": 2e9},
        )


def training_end_to_end(quick: bool) -> Iterator[Case]:
    """One step from photos: Conv-4-64 with the demo's widths on a CPU, ResNet-50 elsewhere."""
    on_cpu = jax.default_backend() == "cpu"
    name, size = ("conv4", 32 if quick else 64) if quick or on_cpu else ("resnet50", 224)
    widths = made_up.SMALL if quick else {"d_joint": 128, "d_dynamic": 16} if on_cpu else {}
    model = BaseModel(**widths, backbone=made_up.photo_backbone(name, parallel.EPISODE_AXES))
    n_labels = 3 if quick else 8
    photos = np.random.default_rng(0).integers(0, 255, (20 * n_labels, size, size, 3), np.uint8)
    split = made_up.view(photos.__getitem__, made_up.one_label_each(20 * n_labels, n_labels))
    step, params, batch = made_up.training_step(model, split)
    alone, some = made_up.photo_backbone(name), photos[: 5 * n_labels]
    variables = made_up.random_variables(alone, some)

    def total(variables, photos):
        features, _ = alone.apply(variables, photos, True, mutable=["batch_stats"])
        return features.sum()

    gradient = jax.jit(jax.grad(total)).lower(variables, some).compile()
    yield Case(
        f"training step, end to end, {name}, {len(some)} photos of {size}x{size}",
        step,
        {"the backbone alone, there and back": lambda: gradient(variables, some)},
        work=gradient.cost_analysis()["flops"],
        pytorch=("training", model, params, batch, split.word_vectors, name),
        targets={} if on_cpu else {"peak": 0.5},
    )


def evaluation(quick: bool) -> Iterator[Case]:
    """VOC's 200 episodes, 1 and 5 shots, all methods and thresholds, from cached features to the table's numbers."""
    n_images, side, n, n_labels = (80, 2, 16, 6) if quick else (1600, 7, 2048, 6)
    config, shots = default(), (1, 2) if quick else (1, 5)
    config.eval.sweep_episodes = 2  # theta is chosen on next to nothing
    if quick:
        config.model.update(made_up.SMALL)
        config.eval.episodes, config.ridge.n_components = 3, 4
    some = np.random.default_rng(0).random((n_images // 20, side, side, n), np.float32).astype(np.float16)
    cached = np.concatenate([np.roll(some, shift, axis=-1) for shift in range(20)])  # faster than random numbers
    novel, base = (made_up.view(cached.__getitem__, made_up.one_label_each(n_images, k)) for k in (n_labels, 8))
    views = {"novel": novel, "validation": novel}
    variables = create_train_state(jax.random.key(0), create_model(config), base, optax.identity()).variables()

    def run():
        for n_shot in shots:
            experiment.evaluate_run(config, views, n_shot, *experiment.open_methods(config, n_shot, base, variables))

    x, projection = jnp.asarray(cached[:64], jnp.float32), jnp.ones((n, config.model.d_joint))
    batches, n_positions, d = math.ceil(n_images / 64), side * side, config.ridge.n_components
    # Of support and other images, in an episode.
    pairs = sum((k + config.eval.n_query) * k for k in shots) * n_labels**2
    settings = f"{shots[0]} and {shots[1]} shots, all methods, {len(config.lcm.thresholds)} thetas"
    yield Case(
        f"evaluation, {config.eval.episodes} episodes, {settings}",
        run,
        {"projecting its images": lambda: [made_up.projected(x, projection) for _ in range(len(shots) * batches)]},
        work=2.0 * len(shots) * n_images * n_positions * n * (config.model.d_joint + d)
        + 2.0 * config.eval.episodes * pairs * n_positions**2 * d,
        targets={"seconds": 60},
    )
