"""How fast this machine does it: python -m mlfsic_jax.benchmark [--rows=lcm_select,evaluation] [--json] [--quick].

One table. Every row is timed beside a reference of its own, in turns and in the same process, so that a slow or a busy
machine slows both; the smallest of many times counts. Ratios are against that reference, "peak" is the share of the
fastest matrix product ("mm") or copy that the same process reached, memory is the process's highest so far, and
"PyTorch" is how many times longer plain batched PyTorch takes for the same, where both run on the same device. Data are
made up, in the sizes of the real ones. Every name in --rows is measured in a process of its own.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from mlfsic_jax import backbones
from mlfsic_jax.bench import torch_reference
from mlfsic_jax.core.episodes import sample_episodes
from mlfsic_jax.core.functional import cosine_logits
from mlfsic_jax.core.lcm import lcm_select, select_positions
from mlfsic_jax.core.model import BaseModel, LCMOptions
from mlfsic_jax.core.prototypes import Prototypes
from mlfsic_jax.data.features import Cache, View
from mlfsic_jax.run import evaluate, train
from mlfsic_jax.run.config import default
from mlfsic_jax.run.inputs import PhotoBackbone
from mlfsic_jax.system import parallel
from mlfsic_jax.system.command import Parser, cli_errors
from mlfsic_jax.system.errors import InputError

COCO = (26690, 52, 40000)  # images, labels and positives of its train split
WORD_WIDTH = 300
_SMALL = {"d_joint": 8, "n_heads": 2, "d_dynamic": 4, "n_dynamic": 4}  # the model with --quick
_SECONDS = 4.0  # of measuring, for each set of functions that take turns
_AT_LEAST = ("pytorch", "peak")
_NOISE = 1.05  # what may be lost where "no slower" is asked


class Row(NamedTuple):
    """One line of the table.

    Attributes:
      name: what was measured, and its size.
      seconds: the smallest of many times.
      reference: what it is compared with.
      ratio: ``seconds`` over the reference's.
      work: matrix products in multiply-adds x 2, or bytes read and written, that cannot be avoided.
      kind: of ``work``: "mm" or "copy".
      memory: bytes, the highest resident so far; on an accelerator of its memory.
      pytorch: name of a PyTorch program -> its seconds over ``seconds``.
      targets: what the project asks for: a field -> its highest value, for ``_AT_LEAST`` the lowest.
      exponent: of a power law, for rows about growth.
      peak: the share of the machine's peak; added when all peaks are known.
    """

    name: str
    seconds: float
    reference: str
    ratio: float
    work: float
    kind: str
    memory: int
    pytorch: dict[str, float]
    targets: dict[str, float]
    exponent: float | None = None
    peak: float | None = None

    def missed(self) -> list[str]:
        """The targets that this row misses, in words; of several PyTorch programs the fastest counts."""
        found = self._asdict() | {"pytorch": min(self.pytorch.values(), default=None)}
        lines = []
        for field, limit in self.targets.items():
            at_least = field in _AT_LEAST
            if found[field] is not None and (found[field] < limit if at_least else found[field] > limit):
                asked = f"asked for at {'least' if at_least else 'most'} {limit:.3g}"
                lines.append(f"{self.name}: {field} {found[field]:.3g}, {asked}")
        return lines


def measure(
    name: str,
    function: Callable[[], Any],
    references: Mapping[str, Callable[[], Any]],
    *,
    work: float,
    kind: str = "mm",
    pytorch: Mapping[str, Callable[[], Any]] | None = None,
    targets: Mapping[str, float] | None = None,
    per: float = 1,
    quick: bool = False,
) -> Row:
    """Times ``function`` in turns with its one reference, then the PyTorch programs.

    Args:
      name: see ``Row``.
      function: what is measured; called with nothing.
      references: one name -> one function.
      work: see ``Row``.
      kind: see ``Row``.
      pytorch: programs for the same numbers.
      targets: see ``Row``.
      per: the reference's time is multiplied by this.
      quick: few repeats, as tests want it.
    """
    budget = 0.0 if quick else _SECONDS
    ((reference, other),) = references.items()
    times = fastest({"": function, reference: other}, budget)
    memory = peak_memory()  # before PyTorch is loaded
    seconds = times[""]
    # Not in turns with ours: its threads go on spinning for a while, and would take our cores.
    by_torch = fastest(pytorch or {}, budget)
    return Row(
        name,
        seconds,
        reference,
        seconds / (per * times[reference]),
        work,
        kind,
        memory,
        {k: t / seconds for k, t in by_torch.items()},
        {} if quick else dict(targets or {}),
    )


def fastest(functions: Mapping[str, Callable[[], Any]], budget: float) -> dict[str, float]:
    """The shortest time of each function in seconds: called in turns for ``budget`` seconds, at least twice."""
    for function in functions.values():
        jax.block_until_ready(function())  # compiles
    shortest, end, rounds = dict.fromkeys(functions, math.inf), time.perf_counter() + budget, 0
    while functions and (rounds < 2 or time.perf_counter() < end):
        rounds += 1
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            shortest[name] = min(shortest[name], time.perf_counter() - start)
    return shortest


def peak_memory() -> int:
    """Bytes: the highest that this process has held so far, on an accelerator in that one's memory."""
    held = jax.devices()[0].memory_stats()
    unit = 1 if sys.platform == "darwin" else 1024
    return held["peak_bytes_in_use"] if held else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peaks(quick: bool) -> dict[str, float]:
    """What the machine can do at best: "mm" operations a second in a matrix product, "copy" bytes a second."""
    on_cpu = jax.default_backend() == "cpu"
    n, dtype = (2048, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    n = 256 if quick else n
    matrix, array = jnp.ones((n, n), dtype), jnp.ones(n * n * 16, jnp.float32)
    # In place: new memory costs a CPU's kernel several times what the copy itself does.
    product, increase = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy():
        nonlocal array
        array = increase(array)
        return array

    times = fastest({"mm": lambda: product(matrix), "copy": copy}, 0.0 if quick else _SECONDS)
    return {"mm": 2 * n**3 / times["mm"], "copy": 2 * array.nbytes / times["copy"]}


def made_up_labels(n_images: int, n_labels: int, n_positives: int) -> np.ndarray:
    """Bool [I, C]: a few frequent labels and many rare ones, as in COCO."""
    rng = np.random.default_rng(0)
    share = np.geomspace(1, 200, n_labels)
    counts = np.maximum(n_positives * share / share.sum(), 14).astype(int)
    labels = np.zeros((n_images, n_labels), bool)
    for c, count in enumerate(np.minimum(counts, n_images)):
        labels[rng.choice(n_images, count, replace=False), c] = True
    return labels


def sample_episode_rows(quick: bool) -> Iterator[Row]:
    """200 episodes of COCO's train split; per episode, every label looks twice at its images."""
    n_images, n_labels, n_positives = (300, 4, 200) if quick else COCO
    labels, n = made_up_labels(n_images, n_labels, n_positives), 2 if quick else 200
    bits = jax.jit(lambda key: jax.random.bits(key, (int(labels.sum()),)))
    key = jax.random.key(0)
    for n_shot in (1, 5):
        yield measure(
            f"sample_episode, {n} of {n_images} x {n_labels}, {n_shot}-shot",
            lambda n_shot=n_shot: sample_episodes(key, labels, n_episodes=n, n_shot=n_shot, n_query=4),
            {"its random numbers": lambda: [bits(jax.random.fold_in(key, i)) for i in range(n)]},
            work=n * 2 * 9.0 * labels.sum(),
            kind="copy",
            targets={"seconds": 4},
            quick=quick,
        )


def feature_rows(quick: bool) -> Iterator[Row]:
    """Photos to local features, as the cache is filled."""
    name, batch, size = ("conv4", 2, 32) if quick else ("resnet50", 32, 224)
    backbone = photo_backbone(name)
    photos = np.random.default_rng(0).integers(0, 255, (batch, size, size, 3), np.uint8)
    variables = random_variables(backbone, photos)
    forward = jax.jit(backbone.apply).lower(variables, photos).compile()
    work = forward.cost_analysis()["flops"]
    n = round((work / 2) ** (1 / 3))
    square, product = jnp.ones((n, n)), jax.jit(lambda x: x @ x)
    yield measure(
        f"feature extraction, {name}, {batch} photos of {size}x{size}",
        lambda: forward(variables, photos),
        {f"a matrix product as large, {n}^3": lambda: product(square)},
        work=work,
        pytorch=torch_reference.features(name, photos),
        targets={} if jax.default_backend() == "cpu" else {"peak": 0.5},
        quick=quick,
    )


def lcm_rows(quick: bool) -> Iterator[Row]:
    """``lcm_select`` in the joint space, and from the backbone's features with the projection."""
    n_labels, steps, side, d, n = (3, 2, 2, 8, 16) if quick else (16, 20, 7, 512, 2048)
    n_positions = side * side
    for width in (d, n):
        functions = {}
        for n_images in (2, 3) if quick else (6, 80, 320):
            features, labels, words, projection = lcm_case(n_images, side, width, n_labels, d)
            project = {} if width == d else {"projection": projection}
            select = functools.partial(jax.jit(functools.partial(lcm_select, steps=steps)), features, labels, words)
            functions[n_images] = select = functools.partial(select, **project)
            if width == d:
                reference = {"u u' and u w' of each image": functools.partial(products_alone, features, words)}
                work = 2.0 * n_images * n_positions * (n_positions + n_labels) * d
            else:
                reference = {"the projection alone": functools.partial(projection_alone, features, projection)}
                work = 2.0 * n_images * n_positions * d * (n + n_positions + n_labels)
            targets = {}
            if n_images == 80:
                targets = {"ratio": 3, "pytorch": 8} if width == d else {"ratio": 1.4}
            yield measure(
                f"lcm_select, {n_images} x {side}x{side}x{width}, {n_labels} labels",
                select,
                reference,
                work=work,
                pytorch=torch_reference.lcm(features, labels, words, project.get("projection"), steps),
                targets=targets,
                quick=quick,
            )
        few, many = list(functions)[-2:]
        yield measure(
            f"lcm_select, {many} x {side}x{side}x{width}, per image",
            functions[many],
            {f"{few} images, per image": functions[few]},
            work=work,
            per=many / few,
            targets={"ratio": _NOISE},
            quick=quick,
        )


def prototype_rows(quick: bool) -> Iterator[Row]:
    """The prototypes of 16 labels from 5 shots, with all positions."""
    n_labels, n_shot, n_positions, d, d_dynamic = (3, 2, 4, 8, 4) if quick else (16, 5, 49, 512, 64)
    module = Prototypes(n_heads=2 if quick else 8, d_dynamic=d_dynamic, n_dynamic=4 if quick else 16)
    rng, n_images = np.random.default_rng(0), n_labels * n_shot
    regions = jnp.asarray(rng.random((n_images, n_positions, d)), jnp.float32)
    words = jnp.asarray(rng.normal(size=(n_labels, d)), jnp.float32)
    labels = jnp.asarray(np.repeat(np.eye(n_labels, dtype=bool), n_shot, axis=0))
    variables = jax.jit(module.init)(jax.random.key(0), regions, labels, words)
    apply = jax.jit(module.apply)
    kernels = [variables["params"]["dynamic"][name]["kernel"] for name in ("kernel_1", "kernel_2")]
    generate = jax.jit(lambda words, kernels: [words @ kernel for kernel in kernels])
    yield measure(
        f"prototypes, {n_images} x {n_positions} x {d}, {n_labels} labels",
        lambda: apply(variables, regions, labels, words),
        {"both kernel generators alone": lambda: generate(words, kernels)},
        work=prototype_work(n_labels, n_images * n_positions, d, d_dynamic),
        pytorch=torch_reference.prototypes(module, variables["params"], regions, labels, words),
        quick=quick,
    )


def training_rows(quick: bool) -> Iterator[Row]:
    """One step on cached features with VOC's 8 train labels, and many over a cache of COCO's size, mapped from disk."""
    side, n, n_labels = (2, 16, 3) if quick else (7, 2048, 8)
    model = BaseModel(**_SMALL) if quick else BaseModel()
    rng = np.random.default_rng(0)
    features = rng.random((20 * n_labels, side, side, n), np.float32).astype(np.float16)
    labels = np.tile(np.eye(n_labels, dtype=bool), (20, 1))
    split = split_view(lambda rows: features[rows], labels)
    step, params, batch = training_step(model, split)
    n_images, d = 5 * n_labels, model.d_joint
    x = jnp.asarray(features[:n_images], jnp.float32).reshape(-1, n)
    down, up = jnp.ones((n, d)), jnp.ones((len(x), d))
    both = jax.jit(lambda x, down, up: (x @ down, x.T @ up))
    yield measure(
        f"training step, cached, {n_images} x {side}x{side}x{n}, {n_labels} labels",
        step,
        {"its projection alone, there and back": lambda: both(x, down, up)},
        work=4.0 * len(x) * n * d + 3 * prototype_work(n_labels, n_labels * side * side, d, model.d_dynamic),
        pytorch=torch_reference.training(model, params, batch, split.word_vectors),
        targets={"pytorch": 1.5},
        quick=quick,
    )


def memory_rows(quick: bool) -> Iterator[Row]:
    """Training steps over a cache of COCO's size that is read from disk, a file of zeros."""
    side, n = (2, 16) if quick else (7, 2048)
    n_images, n_labels, n_positives = (300, 4, 200) if quick else COCO
    n_steps = 2 if quick else 8
    model = BaseModel(**_SMALL) if quick else BaseModel()
    labels = made_up_labels(n_images, n_labels, n_positives)
    with tempfile.TemporaryDirectory() as folder:
        shape, path = (n_images, side, side, n), Path(folder) / "values.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)  # takes no room: a file with a hole
        cache = Cache(shape, np.dtype(np.float16), {}, Path(folder))
        split = split_view(cache.read, labels)
        step = training_step(model, split)[0]  # the rest is freed
        rows = np.random.default_rng(0).integers(0, n_images, 5 * n_labels)
        yield measure(
            f"{n_steps} training steps, cache of {n_images} x {side}x{side}x{n}, {n_labels} labels",
            lambda: [jax.block_until_ready(step()) for _ in range(n_steps)],
            {"reading their features": lambda: sum(len(cache.read(rows)) for _ in range(n_steps))},
            work=4.0 * n_steps * len(rows) * side * side * n * model.d_joint,
            targets={"memory": 2e9},
            quick=quick,
        )


def end_to_end_rows(quick: bool) -> Iterator[Row]:
    """One step from photos: Conv-4-64 with the demo's widths on a CPU, ResNet-50 elsewhere."""
    on_cpu = jax.default_backend() == "cpu"
    name, size = ("conv4", 32 if quick else 64) if quick or on_cpu else ("resnet50", 224)
    widths = _SMALL if quick else {"d_joint": 128, "d_dynamic": 16} if on_cpu else {}
    model = BaseModel(**widths, backbone=photo_backbone(name, parallel.EPISODE_AXES))
    n_labels = 3 if quick else 8
    photos = np.random.default_rng(0).integers(0, 255, (20 * n_labels, size, size, 3), np.uint8)
    split = split_view(lambda rows: photos[rows], np.tile(np.eye(n_labels, dtype=bool), (20, 1)))
    step, params, batch = training_step(model, split)
    alone, some = photo_backbone(name), photos[: 5 * n_labels]
    variables = random_variables(alone, some)

    def total(variables, photos):
        features, _ = alone.apply(variables, photos, True, mutable=["batch_stats"])
        return features.sum()

    gradient = jax.jit(jax.grad(total)).lower(variables, some).compile()
    yield measure(
        f"training step, end to end, {name}, {len(some)} photos of {size}x{size}",
        step,
        {"the backbone alone, there and back": lambda: gradient(variables, some)},
        work=gradient.cost_analysis()["flops"],
        pytorch=torch_reference.training(model, params, batch, split.word_vectors, name),
        targets={} if on_cpu else {"peak": 0.5},
        quick=quick,
    )


def evaluation_rows(quick: bool) -> Iterator[Row]:
    """VOC's 200 episodes, 1 and 5 shots, all methods and thresholds, from cached features to the table's numbers."""
    n_images, side, n, n_episodes = (80, 2, 16, 3) if quick else (1600, 7, 2048, 200)
    model = BaseModel(**_SMALL) if quick else BaseModel()
    options = evaluate.RidgeOptions(n_components=4) if quick else evaluate.RidgeOptions()
    rng, n_labels, n_query = np.random.default_rng(0), 6, 4
    some = rng.random((n_images // 20, side, side, n), np.float32).astype(np.float16)
    features = np.concatenate([np.roll(some, shift, axis=-1) for shift in range(20)])  # faster than random numbers
    novel = split_view(lambda rows: features[rows], np.tile(np.eye(n_labels, dtype=bool), (n_images, 1))[:n_images])
    base = split_view(lambda rows: features[rows], np.tile(np.eye(8, dtype=bool), (n_images, 1))[:n_images])
    state = train.create_train_state(jax.random.key(0), model, base, train.create_optimizer(1e-4, 1, 9, "cosine")[0])
    thresholds = tuple(default().lcm.thresholds)
    shots = (1, 2) if quick else (1, 5)

    def run():
        fitted = evaluate.fit_ridge(model, state.variables(), base, options)
        for n_shot in shots:
            scores = evaluate.score_episodes(
                model,
                state.variables(),
                novel,
                key=jax.random.key(1),
                n_episodes=n_episodes,
                n_shot=n_shot,
                n_query=n_query,
                thresholds=thresholds,
                fitted=fitted,
                ridge=options,
            )
            evaluate.summarise(scores, 0, {})

    x, projection = jnp.asarray(features[:64], jnp.float32), jnp.ones((n, model.d_joint))
    batches, n_positions, d = math.ceil(n_images / 64), side * side, options.n_components
    pairs = sum((k + n_query) * k for k in shots) * n_labels**2  # of support and other images, in an episode
    yield measure(
        f"evaluation, {n_episodes} episodes, {shots[0]} and {shots[1]} shots, all methods, {len(thresholds)} thetas",
        run,
        {"projecting its images": lambda: [projection_alone(x, projection) for _ in range(len(shots) * batches)]},
        work=2.0 * len(shots) * n_images * n_positions * n * (model.d_joint + d)
        + 2.0 * n_episodes * pairs * n_positions**2 * d,
        targets={"seconds": 60},
        quick=quick,
    )


def scaling_rows(quick: bool) -> Iterator[Row]:
    """``lcm_select`` mapped over 1, 2, 4 and 8 devices; a CPU's are threads that share its cores."""
    n_images, side, d, n_labels, steps = (8, 2, 8, 3, 2) if quick else (320, 7, 512, 16, 20)
    features, labels, words, _ = lcm_case(n_images, side, d, n_labels, d)
    split, copied = PartitionSpec(parallel.AXIS), PartitionSpec()
    functions = {}
    for n_devices in (n for n in (1, 2, 4, 8) if n <= jax.device_count()):
        devices = jax.devices()[:n_devices]
        mesh = jax.make_mesh((n_devices,), (parallel.AXIS,), axis_types=(AxisType.Auto,), devices=devices)
        select = functools.partial(lcm_select, steps=steps)
        mapped = jax.shard_map(select, mesh=mesh, in_specs=(split, split, copied), out_specs=split)
        shardings = [jax.sharding.NamedSharding(mesh, spec) for spec in (split, split, copied)]
        placed = [jax.device_put(x, where) for x, where in zip((features, labels, words), shardings, strict=True)]
        functions[n_devices] = functools.partial(jax.jit(mapped), *placed)
        yield measure(
            f"lcm_select, {n_images} x {side}x{side}x{d}, mapped over {n_devices} of {len(jax.devices())} devices",
            functions[n_devices],
            {"1 device": functions[1]},
            work=2.0 * n_images * side * side * (side * side + n_labels) * d,
            quick=quick,
        )


def growth_rows(quick: bool) -> Iterator[Row]:
    """How the cost of an episode grows with each of its sizes, the others fixed: time ~ size^exponent."""
    side, n, d = (2, 16, 8) if quick else (7, 2048, 512)
    model = BaseModel(d_joint=d, n_heads=2, d_dynamic=4) if quick else BaseModel()
    usual = {"images": 80, "labels": 16, "shots": 1, "locals": side * side}
    grid = {
        "images": (20, 40, 80, 160, 320),
        "labels": (16, 32, 64, 128),
        "shots": (1, 2, 4, 8, 16),
        "locals": (16, 49, 100, 196),
    }
    if quick:
        usual, grid = usual | {"images": 6, "labels": 3}, {name: grid[name][:2] for name in ("images", "locals")}
    run = jax.jit(functools.partial(one_episode, model))
    for name, values in grid.items():
        functions = {}
        for value in values:
            sizes = usual | {name: value}
            n_images = sizes["images"] if name != "shots" else sizes["labels"] * value
            support, labels, words, queries = growth_case(n_images, sizes["labels"], sizes["locals"], n)
            variables = random_variables(model, support, support, labels, labels, words)
            functions[value] = functools.partial(run, variables, support, labels, words, queries)
        times = fastest({str(value): f for value, f in functions.items()}, 0.0 if quick else 2 * _SECONDS)
        exponent = float(np.polyfit(np.log(values), np.log(list(times.values())), 1)[0])
        linear = name in ("images", "labels")
        yield Row(
            f"an episode, growth with {name} ({values[0]} to {values[-1]})",
            times[str(values[-1])],
            f"{values[0]} {name}",
            times[str(values[-1])] / times[str(values[0])],
            2.0 * n_images * sizes["locals"] * d * (n + sizes["locals"] + sizes["labels"])
            + prototype_work(sizes["labels"], n_images * sizes["locals"], d, model.d_dynamic),
            "mm",
            peak_memory(),
            {},
            {} if quick or not linear else {"exponent": 1.1},
            exponent,
        )


ROWS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "sample_episode": sample_episode_rows,
    "features": feature_rows,
    "lcm_select": lcm_rows,
    "prototypes": prototype_rows,
    "training": training_rows,
    "training_memory": memory_rows,
    "training_end_to_end": end_to_end_rows,
    "evaluation": evaluation_rows,
    "scaling": scaling_rows,
    "growth": growth_rows,
}


def lcm_case(n_images: int, side: int, width: int, n_labels: int, d: int):
    """Local features as after a ReLU [S, h, w, width], labels [S, C], words [C, d], a projection [width, d]."""
    rng = np.random.default_rng(0)
    features = np.maximum(rng.standard_normal((n_images, side, side, width), np.float32), 0)
    labels = rng.random((n_images, n_labels)) < 0.1
    words, projection = (rng.standard_normal((k, d), np.float32) for k in (n_labels, width))
    return tuple(map(jnp.asarray, (features, labels, words, projection)))


@jax.jit
def products_alone(features, words):
    """u u' and u w' of each image, one at a time: [S, h, w, d], [C, d] -> [S, L, L], [S, L, C]."""
    with jax.default_matmul_precision("highest"):
        u = features.reshape(len(features), -1, features.shape[-1])
        return jax.lax.map(lambda u: (u @ u.T, u @ words.T), u)


@jax.jit
def projection_alone(features, projection):
    """[S, h, w, n], [n, d] -> [S, h, w, d]."""
    return jnp.matmul(features, projection, precision="highest")


def prototype_work(n_labels: int, n_locals: int, d: int, d_dynamic: int) -> float:
    """Operations of a prototype's matrix products: attention there and back, similarity to the words, generators."""
    return 2.0 * n_labels * d * (3 * n_locals + 2 * d * d_dynamic)


def photo_backbone(name: str, axis_name=None) -> PhotoBackbone:
    """A backbone for photos as they are stored, without augmentation."""
    spec = backbones.BACKBONES[name]
    return PhotoBackbone(backbones.create(name, axis_name), spec.mean, spec.std)


def random_variables(module, *arguments):
    """Variables of fan-in scale, without compiling the module's own initialisers, which takes longer than all else."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim < 2:
            return jnp.full(leaf.shape, float(path[-1].key in ("scale", "var")))
        scale = np.float32(math.prod(leaf.shape[:-1]) ** -0.5)
        return jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(module.init, jax.random.key(0), *arguments))


def split_view(inputs: Callable[[np.ndarray], np.ndarray], labels: np.ndarray) -> View:
    """A split with random words."""
    words = np.random.default_rng(1).standard_normal((labels.shape[1], WORD_WIDTH), np.float32)
    return View(inputs, labels, words, tuple(map(str, range(labels.shape[1]))))


def training_step(model: BaseModel, split: View):
    """A function that reads an episode of 1 shot and 4 queries a label and trains on it.

    Episodes are drawn beforehand: training draws an epoch's at once.

    Returns:
      (the function, the parameters at the start without the backbone's, one episode as ``train.Batch``).
    """
    optimizer, _ = train.create_optimizer(1e-4, 1, 1000, "cosine")
    key, state = parallel.replicate(
        (jax.random.key(0), train.create_train_state(jax.random.key(1), model, split, optimizer))
    )
    params = {name: jax.device_get(tree) for name, tree in state.params.items() if name != "backbone"}
    drawn = sample_episodes(jax.random.key(2), split.labels, n_episodes=16, n_shot=1, n_query=4)
    episodes = itertools.cycle(zip(*map(np.asarray, drawn), strict=True))

    def read(support, query):
        return train.Batch(split.inputs(support), split.inputs(query), split.labels[support], split.labels[query])

    def step():
        nonlocal state
        state, losses = train.train_step(
            *(state, key, jax.tree.map(lambda x: x[None], read(*next(episodes))), split.word_vectors),
            model=model,
            optimizer=optimizer,
            gamma=1.0,
            shared=jax.device_count() == 1,  # one episode a step
        )
        return losses

    return step, params, read(*next(episodes))


def growth_case(n_images: int, n_labels: int, n_positions: int, n: int):
    """Support features [S, L, 1, n], labels, word vectors and the global features of 64 queries."""
    rng = np.random.default_rng(0)
    support = np.maximum(rng.standard_normal((n_images, n_positions, 1, n), np.float32), 0)
    labels = np.arange(n_images)[:, None] % n_labels == np.arange(n_labels)
    words, queries = (rng.standard_normal((k, w), np.float32) for k, w in ((n_labels, WORD_WIDTH), (64, n)))
    return tuple(map(jnp.asarray, (support, labels, words, queries[:, None, None])))


def one_episode(model: BaseModel, variables, support, labels, word_vectors, queries):
    """From cached features to LCM's scores of the queries: projection, importance, selection, prototypes, cosines."""
    return model.apply(variables, support, labels, word_vectors, queries, method=_episode)


def _episode(model: BaseModel, support, labels, word_vectors, queries):
    regions, words = model.regions(support), model.words(word_vectors)
    keep = select_positions(model.lcm_scores(regions, labels, words, LCMOptions()), 0.53, scale=model.scale)
    prototypes = model.prototypes(regions, labels, words, keep)
    return cosine_logits(model.regions(queries)[:, 0], prototypes, model.scale)


def machine() -> str:
    """The line above the table: processor or accelerator, cores, versions."""
    device = jax.devices()[0]
    name = device.device_kind
    cpus = Path("/proc/cpuinfo")
    if device.platform == "cpu":
        lines = cpus.read_text().splitlines() if cpus.exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor()
    versions = [f"jax {jax.__version__}"]
    if torch_reference.is_comparable():
        import torch

        versions.append(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {', '.join(versions)}"


def measure_here(name: str, quick: bool) -> dict[str, Any]:
    """All rows of one name, measured in this process; the machine's peaks last: their arrays count as memory too."""
    rows = [row._asdict() for row in ROWS[name](quick)]
    return {"machine": machine(), "rows": rows, "peaks": peaks(quick)}


def measure_in_a_process(name: str, quick: bool) -> dict[str, Any]:
    """``measure_here`` in a process of its own.

    Raises:
      InputError: it failed; says how to see why.
    """
    command = [sys.executable, "-m", "mlfsic_jax.benchmark", f"--rows={name}", "--here", "--json"]
    env = dict(os.environ)
    if name == "scaling":  # more threads than cores, else devices that wait for each other can wait for ever
        flags = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        env |= {"XLA_FLAGS": flags.strip(), "NPROC": "32"}
    done = subprocess.run([*command, *(["--quick"] if quick else [])], env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{name} could not be measured, see above (exit status {done.returncode})")
    return json.loads(done.stdout)


def table(of: str, rows: Sequence[Row]) -> str:
    """The machine, the columns' names and the rows."""
    columns = f"{'':<66}{'seconds':>9}{'ratio':>8}  {'to':<38}{'peak':>10}{'memory':>10}  PyTorch"
    return "\n".join([of, columns, *map(_line, rows)])


def _line(row: Row) -> str:
    pytorch = ", ".join(f"{ratio:.1f}x ({name})" for name, ratio in row.pytorch.items())
    growth = "" if row.exponent is None else f"exponent {row.exponent:.2f}"
    return (
        f"{row.name:<66}{row.seconds:>9.2g}{row.ratio:>8.2f}  {row.reference:<38}"
        f"{100 * row.peak:>3.0f} % {row.kind:<4}{row.memory / 1e9:>7.2f} GB  {pytorch}{growth}"
    ).rstrip()


def run(names: Sequence[str], *, quick: bool, here: bool, as_json: bool) -> list[Row]:
    """Measures and prints.

    Args:
      names: of ``ROWS``.
      quick: tiny sizes, which prove that it works and say nothing.
      here: in this process.
      as_json: prints one JSON object instead of the table.

    Raises:
      InputError: an unknown name, or a process that failed.
    """
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise InputError(f"--rows: no rows {', '.join(unknown)}: choose among {', '.join(ROWS)}")
    parts = []
    for name in names:
        if not here:
            print(f"measuring {name}", file=sys.stderr, flush=True)
        parts.append((measure_here if here else measure_in_a_process)(name, quick))
    # What else the machine did may have slowed the measurement of a peak: the best of all processes counts.
    best = {kind: max(part["peaks"][kind] for part in parts) for kind in ("mm", "copy")}
    rows = [Row(**row) for part in parts for row in part["rows"]]
    rows = [row._replace(peak=row.work / row.seconds / best[row.kind]) for row in rows]
    missed = [line for row in rows for line in row.missed()]
    of = f"{parts[0]['machine']}; peaks {best['mm'] / 1e9:.0f} GFLOP/s (mm), {best['copy'] / 1e9:.1f} GB/s (copy)"
    if as_json:
        values = [row._asdict() for row in rows]
        print(json.dumps({"machine": parts[0]["machine"], "peaks": best, "rows": values, "missed": missed}))
    else:
        print("\n".join([table(of, rows), *(["targets missed:", *missed] if missed else [])]))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags in, a table out."""
    parser = Parser("mlfsic_jax.benchmark", __doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"what to measure, of {', '.join(ROWS)}; default all")
    parser.add_argument("--json", action="store_true", help="for machines: one JSON object")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds: to see that it works")
    parser.add_argument("--here", action="store_true", help="in this process, for a profiler")
    flags = parser.parse_args(arguments)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)  # which devices it looked for in vain
    with cli_errors("nothing was printed"):
        run([name.strip() for name in flags.rows.split(",")], quick=flags.quick, here=flags.here, as_json=flags.json)
