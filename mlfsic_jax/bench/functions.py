"""Cases of single functions of the library: episodes, LCM, prototypes, and how an episode's cost grows."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mlfsic_jax.backbones.conv4 import convolve
from mlfsic_jax.bench import made_up
from mlfsic_jax.bench.measure import Case
from mlfsic_jax.core import lcm
from mlfsic_jax.core.episodes import sample_episodes
from mlfsic_jax.core.functional import cosine_logits
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.core.prototypes import Prototypes
from mlfsic_jax.methods import lcm as lcm_method
from mlfsic_jax.system import parallel


def sample_episode(quick: bool) -> Iterator[Case]:
    """200 episodes of COCO's train split; per episode, every label looks twice at its images."""
    n_images, n_labels, n_positives = (300, 4, 200) if quick else made_up.COCO
    labels, n = made_up.label_matrix(n_images, n_labels, n_positives), 2 if quick else 200
    bits = jax.jit(lambda key: jax.random.bits(key, (int(labels.sum()),), jnp.uint32))
    key = jax.random.key(0)
    for n_shot in (1, 5):
        yield Case(
            f"sample_episode, {n} of {n_images} x {n_labels}, {n_shot}-shot",
            lambda n_shot=n_shot: sample_episodes(key, labels, n_episodes=n, n_shot=n_shot, n_query=4),
            {"its random numbers": lambda: [bits(jax.random.fold_in(key, i)) for i in range(n)]},
            work=n * 2 * 9.0 * labels.sum(),
            kind="copy",
            targets={"seconds": 4},
        )


def lcm_select(quick: bool) -> Iterator[Case]:
    """``lcm_select`` in the joint space, and from the backbone's features with the projection."""
    n_labels, steps, side, d, n = (3, 2, 2, 8, 16) if quick else (16, 20, 7, 512, 2048)
    n_positions = side * side
    for width in (d, n):
        functions = {}
        for n_images in (2, 3) if quick else (6, 80, 320):
            features, labels, words, projection = made_up.lcm_case(n_images, side, width, n_labels, d)
            project = {} if width == d else {"projection": projection}
            select = jax.jit(functools.partial(lcm.lcm_select, steps=steps))
            functions[n_images] = select = functools.partial(select, features, labels, words, **project)
            if width == d:
                reference = {"u u' and u w' of each image": functools.partial(_products, features, words)}
                work = 2.0 * n_images * n_positions * (n_positions + n_labels) * d
            else:
                reference = {"the projection alone": functools.partial(made_up.projected, features, projection)}
                work = 2.0 * n_images * n_positions * d * (n + n_positions + n_labels)
            targets = {"ratio": 3, "pytorch": 8} if width == d else {"ratio": 1.4}
            yield Case(
                f"lcm_select, {n_images} x {side}x{side}x{width}, {n_labels} labels",
                select,
                reference,
                work=work,
                pytorch=("lcm", features, labels, words, project.get("projection"), steps),
                targets=targets if n_images == 80 else {},
            )
        few, many = list(functions)[-2:]
        yield Case(
            f"lcm_select, {many} x {side}x{side}x{width}, per image",
            functions[many],
            {f"{few} images, per image": functions[few]},
            work=work,
            per=many / few,
            targets={"ratio": 1.05},  # no slower, but for noise
        )


def tuning(quick: bool) -> Iterator[Case]:
    """LCM's fit of A_visual and A_text to the support of one episode with VOC's 6 novel labels, default epochs."""
    n_labels, n, d = (3, 16, 8) if quick else (6, 1280, 512)
    model, method = BaseModel(d_joint=d, n_heads=2), lcm_method.LCM()
    options = {"epochs": 2 if quick else method.tune_epochs, "learning_rate": method.tune_learning_rate}
    for n_shot in (1, 2) if quick else (1, 5):
        n_images = n_shot * n_labels
        features, labels, words, kernel = made_up.lcm_case(n_images, 2, n, n_labels, d)
        words, pooled = words[:, : made_up.WORD_WIDTH], features.mean(axis=(1, 2))
        joint = {"a_visual": {"kernel": kernel / n**0.5}, "a_text": {"kernel": kernel[: words.shape[1]]}}
        tune = jax.jit(functools.partial(lcm_method.tune, model, **options))
        yield Case(
            f"tuning on {n_images} x {n}, {n_labels} labels, {options['epochs']} epochs",
            functools.partial(tune, {"params": {"joint": joint}}, pooled, labels, words),
            {"its projections, there and back": functools.partial(_there_and_back, options["epochs"], pooled, kernel)},
            work=4.0 * options["epochs"] * n_images * n * d,
        )


def prototypes(quick: bool) -> Iterator[Case]:
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
    yield Case(
        f"prototypes, {n_images} x {n_positions} x {d}, {n_labels} labels",
        lambda: apply(variables, regions, labels, words),
        {"both kernel generators alone": lambda: generate(words, kernels)},
        work=made_up.prototype_work(n_labels, n_images * n_positions, d, d_dynamic),
        pytorch=("prototypes", module, variables["params"], regions, labels, words),
    )


def convolutions(quick: bool) -> Iterator[Case]:
    """Conv-4's second layer on the photos of a training episode of 64 x 64 pixels, and both of its gradients."""
    n, side, width = (2, 4, 3) if quick else (40, 32, 64)
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((n, side, side, width), np.float32)) for _ in range(2))
    kernel = jnp.asarray(rng.standard_normal((3, 3, width, width), np.float32))
    columns, matrix = jnp.ones((n * side * side, 9 * width)), jnp.ones((9 * width, width))
    product = jax.jit(jnp.matmul)
    for what, program in CONVOLUTIONS.items():
        yield Case(
            f"3x3 convolution of {n} x {side}x{side}x{width}, {what}",
            functools.partial(program, x, kernel, dy),
            {"a matrix product as large": lambda: product(columns, matrix)},
            work=2.0 * columns.size * width,
            pytorch=("convolution", what, x, kernel, dy),
        )


def scaling(quick: bool) -> Iterator[Case]:
    """``lcm_select`` mapped over 1, 2, 4 and 8 devices; a CPU's are threads that share its cores."""
    n_images, side, d, n_labels, steps = (8, 2, 8, 3, 2) if quick else (320, 7, 512, 16, 20)
    arrays = made_up.lcm_case(n_images, side, d, n_labels, d)[:3]
    specs = (parallel.SHARDED, parallel.SHARDED, parallel.REPLICATED)
    functions = {}
    for n_devices in (n for n in (1, 2, 4, 8) if n <= jax.device_count()):
        mesh, select = parallel.mesh(tuple(jax.devices()[:n_devices])), functools.partial(lcm.lcm_select, steps=steps)
        mapped = jax.shard_map(select, mesh=mesh, in_specs=specs, out_specs=specs[0])
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
        functions[n_devices] = functools.partial(jax.jit(mapped), *placed)
        yield Case(
            f"lcm_select, {n_images} x {side}x{side}x{d}, mapped over {n_devices} of {len(jax.devices())} devices",
            functions[n_devices],
            {"1 device": functions[1]},
            work=2.0 * n_images * side * side * (side * side + n_labels) * d,
        )


def growth(quick: bool) -> Iterator[Case]:
    """How the cost of an episode grows with each of its sizes, the others fixed: time ~ size^exponent."""
    side, n, d = (2, 16, 8) if quick else (7, 2048, 512)
    model = BaseModel(d_joint=d, n_heads=2, d_dynamic=4) if quick else BaseModel()
    usual = {"images": 80, "labels": 16, "shots": 1, "regions": side * side}
    grid = {
        "images": (20, 40, 80, 160, 320),
        "labels": (16, 32, 64, 128),
        "shots": (1, 2, 4, 8, 16),
        "regions": (16, 49, 100, 196),
    }
    if quick:
        usual, grid = usual | {"images": 6, "labels": 3}, {name: grid[name][:2] for name in ("images", "regions")}
    run = jax.jit(functools.partial(model.apply, method=one_episode))
    for name, values in grid.items():
        by_size = {}
        for value in values:
            sizes = usual | {name: value}
            n_images = sizes["images"] if name != "shots" else sizes["labels"] * value
            support, labels, words, queries = made_up.growth_case(n_images, sizes["labels"], sizes["regions"], n)
            variables = made_up.random_variables(model, support, support, labels, labels, words)
            by_size[value] = functools.partial(run, variables, support, labels, words, queries)
        n_regions = n_images * sizes["regions"]
        yield Case(
            f"an episode, growth with {name} ({values[0]} to {values[-1]})",
            by_size[values[-1]],
            {f"{values[0]} {name}": by_size[values[0]]},
            work=2.0 * n_regions * d * (n + sizes["regions"] + sizes["labels"])
            + made_up.prototype_work(sizes["labels"], n_regions, d, model.d_dynamic),
            targets={"exponent": 1.1} if name in ("images", "labels") else {},
            sizes=by_size,
        )


def one_episode(model: BaseModel, support, labels, word_vectors, queries):
    """From cached features to LCM's scores of the queries: projection, importance, selection, prototypes, cosines."""
    regions, words = model.regions(support), model.words(word_vectors)
    keep = lcm.select_positions(model.lcm_scores(regions, labels, words, lcm.LCMOptions()), 0.53, scale=model.scale)
    prototypes = model.prototypes(regions, labels, words, keep)
    return cosine_logits(model.regions(queries)[:, 0], prototypes, model.scale)


def _there_and_back(times, x, kernel):
    return [_projection_and_gradient(x, kernel) for _ in range(times)]


@jax.jit
def _projection_and_gradient(x, kernel):
    return x.T @ (x @ kernel)


@jax.jit
def _products(features, words):
    """u u' and u w' of each image, one at a time: [S, h, w, d], [C, d] -> [S, L, L], [S, L, C]."""
    with jax.default_matmul_precision("highest"):
        u = features.reshape(len(features), -1, features.shape[-1])
        return jax.lax.map(lambda u: (u @ u.T, u @ words.T), u)


# x [B, H, W, n], kernel [3, 3, n, m] and the gradient of the output [B, H, W, m] -> the output, or a gradient
CONVOLUTIONS = {
    "forward": jax.jit(lambda x, kernel, dy: convolve(x, kernel)),
    "to its input": jax.jit(lambda x, kernel, dy: jax.vjp(lambda x: convolve(x, kernel), x)[1](dy)[0]),
    "to its kernel": jax.jit(lambda x, kernel, dy: jax.vjp(lambda k: convolve(x, k), kernel)[1](dy)[0]),
}
