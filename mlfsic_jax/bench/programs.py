"""Cases of whole programs: feature extraction, training steps, evaluation."""

import contextlib
import functools
import importlib.util
import io
import itertools
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlfsic_jax.bench import made_up
from mlfsic_jax.bench.measure import Case
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data.dataset import ImageDataset
from mlfsic_jax.data.features import Cache
from mlfsic_jax.data.transforms import resize
from mlfsic_jax.run import experiment, inputs, proposals
from mlfsic_jax.run.config import create_model, default
from mlfsic_jax.run.step import create_train_state
from mlfsic_jax.system import parallel

_LARGE = 32  # photos in a batch for any processor


def features(quick: bool) -> Iterator[Case]:
    """Photos to local features, as predictions and caches get them, beside the large batches of any processor."""
    on_cpu, several = jax.default_backend() == "cpu", f"in batches of {_LARGE}"
    cases = (("mobilenet_v2", 192, 224), ("efficientnet_lite0", 96, 320), ("resnet50", 32, 224))
    for name, n, size in (("conv4", 4, 32),) if quick else cases:
        photos = np.random.default_rng(0).integers(0, 255, (n, size, size, 3), np.uint8)
        of = made_up.photo_backbone(name), made_up.backbone_variables(name, size)
        case = Case(
            f"feature extraction, {name}, {n} photos of {size}x{size}",
            functools.partial(inputs.features_of, *of, photos),
            {several: functools.partial(_in_large_batches, *of, photos)},
            work=_operations(*of, photos),
            pytorch=("features", name, photos),
            targets={} if on_cpu or name != "resnet50" else {"peak": 0.5},
        )
        yield case
        if name == "mobilenet_v2" and on_cpu and importlib.util.find_spec("openvino"):
            from mlfsic_jax.bench import openvino_reference

            peer = {"OpenVINO": openvino_reference.features(*of, photos)}
            yield case._replace(name=f"{case.name}, peer", references=peer, targets={"ratio": 1 / 0.9})


def extraction(quick: bool) -> Iterator[Case]:
    """A folder of JPEGs to a cache of local features, beside the backbone alone and the large batches."""
    on_cpu = jax.default_backend() == "cpu"
    n, cases = (4, (("conv4", 32),)) if quick else (256, (("mobilenet_v2", 224), ("efficientnet_lite0", 320)))
    for name, size in cases:
        of, config = (made_up.photo_backbone(name), made_up.backbone_variables(name, size)), default()
        with tempfile.TemporaryDirectory() as folder:
            dataset = made_up.dataset(made_up.jpegs(Path(folder), n))
            config.backbone, config.data.image_size, config.cache_dir = name, size, f"{folder}/cache"
            read = functools.partial(_resized, dataset, size)
            photos = np.stack([*map(read, range(n))])
            references = {
                "overhead": ("the backbone alone", functools.partial(inputs.features_of, *of, photos), 1 / 0.85),
                "gain": (f"in batches of {_LARGE}", functools.partial(_read_in_large_batches, *of, read, n), 1 / 2.5),
            }
            for kind, (reference, function, ratio) in references.items():
                yield Case(
                    f"{n} JPEGs of 500x375 to a cache, {name}, {kind}",
                    functools.partial(_fill_cache, config, dataset, *of),
                    {reference: function},
                    work=_operations(*of, photos),
                    targets={"ratio": ratio} if on_cpu else {},
                )


def _resized(dataset: ImageDataset, size: int, i: int) -> np.ndarray:
    return resize(dataset.load_image(i), size)


def _fill_cache(config, dataset: ImageDataset, backbone, variables) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # progress
        cache = inputs.feature_cache(config, dataset, backbone, variables, "made up")
    shutil.rmtree(cache.path)


def _in_large_batches(backbone, variables, photos: Iterable[np.ndarray]) -> list[np.ndarray]:
    remaining = iter(photos)
    batches = iter(lambda: list(itertools.islice(remaining, _LARGE)), [])
    return [np.asarray(inputs.backbone_features(backbone, variables, np.stack(some))) for some in batches]


def _read_in_large_batches(backbone, variables, read, n: int) -> list[np.ndarray]:
    photos = parallel.prefetch(read, range(n), readers=4, ahead=2 * _LARGE)
    return [x.astype(np.float16) for x in _in_large_batches(backbone, variables, photos)]


def _operations(backbone, variables, photos: np.ndarray) -> float:
    """The work of a backbone, from XLA's count for one photo."""
    return len(photos) * inputs.backbone_features.lower(backbone, variables, photos[:1]).cost_analysis()["flops"]


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


def refit(quick: bool) -> Iterator[Case]:
    """What a click in the app takes: a fit to all that is decided, and the probabilities of all photos."""
    n_photos, n_labels, n_decided, n, n_classes = (20, 3, 9, 8, 12) if quick else (5000, 20, 100, 1280, 1000)
    rng, name = np.random.default_rng(0), "class_word_ridge"
    features = {"x": rng.normal(size=(n_photos, n)), "l": rng.normal(size=(n_photos, n_classes))}
    features = {key: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16) for key, x in features.items()}
    names = tuple(map(str, range(n_labels)))
    decisions = {i: {label: int(rng.random() < 0.3) for label in names} for i in range(n_decided)}
    words = rng.random((n_labels, 2 * n_classes)).astype(np.float32)
    fit = functools.partial(
        proposals.fit, made_up.class_word_model(n, n_classes), name, words, names, features, decisions
    )
    directions, apply = rng.normal(size=(n + n_classes, n_labels)), jax.jit(lambda a, b: a @ b)
    both = np.concatenate([features["x"], features["l"]], axis=1)
    yield Case(
        f"refit, {n_decided} of {n_photos} photos decided, {n_labels} labels",
        lambda: fit().probabilities,
        {"the prior of all photos alone": lambda: apply(both, directions.astype(np.float32))},
        work=2.0 * n_photos * (n + n_classes) * n_labels + 2.0 * n_photos * n_decided * n,
        targets={"seconds": 0.5},
    )
