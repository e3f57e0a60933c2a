"""The models' losses, spelled out image by image; the parts have tests of their own."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax import lcm_select
from mlfsic_jax.core.lcm import LCMOptions, select_positions
from mlfsic_jax.core.model import BaseModel, JointEmbedding, attention_values
from mlfsic_jax.core.prototypes import ATTENTIONS, Prototypes

S, Q, H, W, N, D_W, C = 4, 3, 2, 3, 6, 5, 3
PROTOTYPES = {"n_heads": 2, "d_dynamic": 3, "n_dynamic": 4, "dropout": 0.0}


def episode(seed=0):
    """Support, query, their labels and word vectors."""
    rng = np.random.default_rng(seed)
    support, query = np.abs(rng.normal(size=(S, H, W, N))), np.abs(rng.normal(size=(Q, H, W, N)))
    support_labels = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 1]])
    arrays = (support, query, support_labels, rng.random((Q, C)) < 0.5, rng.normal(size=(C, D_W)))
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def build(**options):
    model = BaseModel(**{"d_joint": 8, "scale": 7.0, **PROTOTYPES, **options})
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return model, jax.jit(model.init)(keys, *episode())


@functools.partial(jax.jit, static_argnames=("model", "lcm"))
def losses(model, variables, *arguments, lcm=None, threshold=0.53, rngs=None):
    return model.apply(variables, *arguments, lcm=lcm, threshold=threshold, method="losses", rngs=rngs)


def cross_entropies(images, prototypes, labels, scale):
    """Sum over images and labels, in float64 (eqs 3, 4, 18, 19)."""
    total = 0.0
    for x, y in zip(np.asarray(images, np.float64), labels, strict=True):
        for p, y_c in zip(np.asarray(prototypes, np.float64), y, strict=True):
            s = scale * (x @ p) / np.sqrt((x @ x) * (p @ p))
            total -= np.log(1 / (1 + np.exp(-s))) if y_c else np.log(1 - 1 / (1 + np.exp(-s)))
    return total


def cross_entropies_of_regions(images, prototypes, labels, scale, top):
    """The same with the mean of an image's ``top`` highest cosines, images [Q, L, d]."""
    total = 0.0
    for regions, y in zip(np.asarray(images, np.float64), labels, strict=True):
        for p, y_c in zip(np.asarray(prototypes, np.float64), y, strict=True):
            cosines = [(x @ p) / np.sqrt((x @ x) * (p @ p)) for x in regions]
            s = scale * np.mean(sorted(cosines, reverse=True)[:top])
            total -= np.log(1 / (1 + np.exp(-s))) if y_c else np.log(1 - 1 / (1 + np.exp(-s)))
    return total


def reference_losses(
    variables, support, query, support_labels, query_labels, vectors, scale, keep=None, query_top=0, **options
):
    parameters = variables["params"]
    a_visual = np.asarray(parameters["joint"]["a_visual"]["kernel"], np.float64)
    words = np.asarray(vectors, np.float64) @ np.asarray(parameters["joint"]["a_text"]["kernel"], np.float64)
    globals_of = lambda images: [np.mean(np.asarray(x, np.float64), axis=(0, 1)) @ a_visual for x in images]  # noqa: E731
    regions = (np.asarray(support, np.float64) @ a_visual).reshape(S, H * W, -1)
    prototypes = Prototypes(**PROTOTYPES, scale=scale, **options).apply(
        {"params": parameters.get("prototype", {})},
        jnp.asarray(regions, jnp.float32),
        support_labels,
        jnp.asarray(words, jnp.float32),
        None if keep is None else keep.reshape(S, H * W),
    )
    by_words = cross_entropies(globals_of(support), words, support_labels, scale)
    if query_top:
        regions = (np.asarray(query, np.float64) @ a_visual).reshape(len(query), H * W, -1)
        return by_words, cross_entropies_of_regions(regions, prototypes, query_labels, scale, query_top)
    return by_words, cross_entropies(globals_of(query), prototypes, query_labels, scale)


@pytest.mark.parametrize("options", [{}, {"skip": False}, {"anchor": True}])
def test_losses_are_sums_over_images_and_labels(options):
    model, variables = build(**options)
    got = losses(model, variables, *episode(1))
    expected = reference_losses(variables, *episode(1), scale=7.0, **options)
    assert [x.shape for x in got] == [(), ()]
    # float32 sums of a dozen terms of size up to 7.
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, *episode(1)), got, rtol=1e-6)


@pytest.mark.parametrize("score_scaling", ["minmax", "none"])
def test_lcm_during_training_selects_what_lcm_select_does(score_scaling):
    model, variables = build()
    support, _, support_labels, _, vectors = arguments = episode(2)
    threshold = 0.6 if score_scaling == "minmax" else 0.505
    options = LCMOptions(steps=7, step_size=0.1, momentum=0.7, score_scaling=score_scaling)
    got = losses(model, variables, *arguments, lcm=options, threshold=threshold)
    joint = variables["params"]["joint"]
    keep = lcm_select(
        support,
        support_labels,
        vectors @ joint["a_text"]["kernel"],
        projection=joint["a_visual"]["kernel"],
        scale=7.0,
        threshold=threshold,
        **{name: value for name, value in dataclasses.asdict(options).items() if name != "selection"},
    ).keep
    assert 0.1 < keep.mean() < 0.9
    np.testing.assert_allclose(got, reference_losses(variables, *arguments, scale=7.0, keep=keep), rtol=1e-5)
    base = losses(model, variables, *arguments)
    assert abs(got[0] - base[0]) < 1e-5 < 1e-3 < abs(got[1] - base[1])


@pytest.mark.parametrize("score_scaling", ["minmax", "none"])
def test_lcm_at_one_half_is_the_base_model_exactly(score_scaling):
    model, variables = build()
    arguments, options = episode(3), LCMOptions(score_scaling=score_scaling)
    support, _, support_labels, _, vectors = arguments
    regions = model.apply(variables, support, method="regions")
    words = model.apply(variables, vectors, method="words")
    scores = model.apply(variables, regions, support_labels, words, options, method="lcm_scores")
    keep = select_positions(scores, 0.5, scale=7.0, score_scaling=score_scaling)
    prototypes = [model.apply(variables, regions, support_labels, words, k, method="prototypes") for k in (keep, None)]
    np.testing.assert_array_equal(*prototypes)
    # Without a mask XLA may add in another order, so the last digit of the compiled losses is free.
    base, lcm = losses(model, variables, *arguments), losses(model, variables, *arguments, lcm=options, threshold=0.5)
    np.testing.assert_allclose(lcm, base, rtol=1e-6)


def test_lcm_scores_are_those_of_lcm_select():
    model, variables = build()
    support, _, support_labels, _, vectors = episode(4)
    regions = model.apply(variables, support, method="regions")
    words = model.apply(variables, vectors, method="words")
    assert regions.shape == (S, H * W, 8) and words.shape == (C, 8)
    got = model.apply(variables, regions, support_labels, words, LCMOptions(), method="lcm_scores")
    expected = lcm_select(regions.reshape(S, H, W, 8), support_labels, words, scale=7.0)
    np.testing.assert_allclose(got, expected.score.reshape(S, H * W), atol=1e-6)


def test_gradients_with_lcm_are_finite_and_reach_every_parameter():
    model, variables = build()
    arguments = episode(5)

    def total(variables):
        return sum(losses(model, variables, *arguments, lcm=LCMOptions(), threshold=0.6))

    gradient = jax.jit(jax.grad(total))(variables)
    for path, x in jax.tree.leaves_with_path(gradient):
        assert jnp.isfinite(x).all() and jnp.abs(x).max() > 0, jax.tree_util.keystr(path)


ABLATIONS = [
    *({"attention": name, "dynamic": name == "none"} for name in ATTENTIONS[1:]),
    {"dynamic": False},
    {"cm_loss": False},
    {"cm_loss": False, "query_loss_on": "both"},
    {"query_top": 2},
    {"query_top": 100},
]


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_losses_of_every_ablation_by_hand_and_their_gradients(options):
    model, variables = build(**options)
    support, query, support_labels, query_labels, vectors = arguments = episode(1)

    def total(variables):
        both = losses(model, variables, *arguments)
        return sum(both), both

    (_, got), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(variables)
    options = dict(options)
    with_cm = options.pop("cm_loss", True)
    if options.pop("query_loss_on", "query") == "both":
        query, query_labels = jnp.concatenate([support, query]), jnp.concatenate([support_labels, query_labels])
    arguments = (support, query, support_labels, query_labels, vectors)
    cm, by_query = reference_losses(variables, *arguments, scale=7.0, **options)
    np.testing.assert_allclose(got, (cm if with_cm else 0, by_query), rtol=1e-5)  # float32, as above
    for path, x in jax.tree.leaves_with_path(gradient):
        assert jnp.isfinite(x).all() and jnp.abs(x).max() > 0, jax.tree_util.keystr(path)


def test_dropout_is_active_in_training_losses():
    model, variables = build(dropout=0.5)
    first, again, other = (losses(model, variables, *episode(), rngs={"dropout": jax.random.key(i)}) for i in (0, 0, 1))
    assert first == again
    assert first[0] == other[0] and abs(first[1] - other[1]) > 1e-3  # the CM loss has no dropout


def test_anchor_starts_as_nearest_mean_by_cosine():
    model, variables = build(anchor=True)
    support, query, support_labels, query_labels, vectors = episode(6)
    _, got = losses(model, variables, support, query, support_labels, query_labels, vectors)
    # N = 6 channels in 8 dimensions: the orthogonal map keeps cosines, so the joint space does not matter.
    means = [support[support_labels[:, c] == 1].mean(axis=(0, 1, 2)) for c in range(C)]
    expected = cross_entropies(query.mean(axis=(1, 2)), means, query_labels, 7.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)  # float32, as above


class Patches(nn.Module):
    """A backbone whose output says whether it was told to train."""

    @nn.compact
    def __call__(self, images, train):
        return nn.Conv(N, (4, 4), strides=(4, 4), name="patches")(images) + 100.0 * train


def test_a_backbone_turns_photos_into_local_features():
    rng = np.random.default_rng(0)
    support, query = (jnp.asarray(rng.normal(size=(n, 4 * H, 4 * W, 3)), jnp.float32) for n in (S, Q))
    rest = episode()[2:]
    model = BaseModel(d_joint=8, scale=7.0, **PROTOTYPES, backbone=Patches())
    variables = jax.jit(model.init)(jax.random.key(0), support, query, *rest)
    features = model.apply(variables, support, method="features")
    assert features.shape == (S, H, W, N) and jnp.abs(features).max() < 50
    got = losses(model, variables, support, query, *rest)
    without = {"params": {k: v for k, v in variables["params"].items() if k != "backbone"}}
    in_training = [model.apply(variables, x, True, method="features") for x in (support, query)]
    expected = losses(BaseModel(d_joint=8, scale=7.0, **PROTOTYPES), without, *in_training, *rest)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_local_features_of_half_precision_are_computed_in_float32():
    model, variables = build()
    support, *rest = episode()
    support = support.astype(jnp.float16)
    assert model.apply(variables, support, method="features").dtype == jnp.float32
    half = losses(model, variables, support, *rest)
    full = losses(model, variables, support.astype(jnp.float32), *rest)
    np.testing.assert_allclose(half, full, rtol=1e-6)  # the rest is float32; in half precision 1e-3 would be lost


def test_attention_values_are_the_loop_over_images_labels_and_heads():
    model, variables = build()
    rng = np.random.default_rng(1)
    regions, words = rng.normal(size=(S, 5, 8)).astype(np.float32), rng.normal(size=(C, 8)).astype(np.float32)
    query = np.asarray(variables["params"]["prototype"]["attention"]["query"]["kernel"], np.float64)
    expected = np.zeros((S, C, 5))
    for s in range(S):
        for c in range(C):
            for position in range(5):
                for head in (slice(0, 4), slice(4, 8)):  # two heads of four channels
                    expected[s, c, position] += (words[c] @ query)[head] @ regions[s, position, head] / np.sqrt(4)
    got = jax.jit(attention_values, static_argnums=0)(model, variables, regions, words)
    assert got.shape == (S, C, 5)
    np.testing.assert_allclose(got, expected, atol=1e-5)  # float32 sums of eight products


@pytest.mark.parametrize("attention", ["global", "simple", "none"])
def test_attention_values_of_models_that_see_no_regions(attention):
    model, variables = build(attention=attention)
    rng = np.random.default_rng(1)
    regions, words = rng.normal(size=(S, 5, 8)).astype(np.float32), rng.normal(size=(C, 8)).astype(np.float32)
    pooled = regions.mean(axis=1)
    if attention == "simple":
        lengths = np.linalg.norm(pooled, axis=1)[:, None] * np.linalg.norm(words, axis=1)
        expected = 7 * pooled @ words.T / lengths
    elif attention == "global":
        query = np.asarray(variables["params"]["prototype"]["attention"]["query"]["kernel"])
        expected = pooled @ (words @ query).T / 2  # two heads of four channels: their sum over sqrt(4)
    else:
        expected = np.zeros((S, C))
    got = attention_values(model, variables, regions, words)
    np.testing.assert_allclose(got, np.repeat(expected[..., None], 5, axis=2), atol=1e-5)  # float32 sums


def test_what_is_kept_for_attention_values_is_no_parameter():
    _, variables = build()
    assert set(variables) == {"params"}


def initialise(module, n=6, d_w=5):
    def both(module, features, words):
        return module.visual(features), module.text(words)

    init = jax.jit(functools.partial(module.init, method=both))
    return init(jax.random.key(0), jnp.zeros((1, n)), jnp.zeros((1, d_w)))


def test_two_linear_maps_without_bias():
    rng = np.random.default_rng(0)
    module = JointEmbedding(d_joint=4)
    variables = initialise(module)
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes == {"params": {"a_visual": {"kernel": (6, 4)}, "a_text": {"kernel": (5, 4)}}}
    features, words = rng.normal(size=(2, 3, 3, 6)), rng.normal(size=(7, 5))
    for method, x, name in (("visual", features, "a_visual"), ("text", words, "a_text")):
        got = module.apply(variables, jnp.asarray(x, jnp.float32), method=method)
        kernel = np.asarray(variables["params"][name]["kernel"], np.float64)
        expected = np.stack([row @ kernel for row in x.reshape(-1, x.shape[-1])]).reshape(*x.shape[:-1], 4)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)  # float32 sums of 6 products


def test_projecting_regions_then_pooling_is_pooling_then_projecting():
    module = JointEmbedding(d_joint=4)
    variables = initialise(module)
    features = jax.random.normal(jax.random.key(1), (2, 9, 6))
    first = module.apply(variables, features, method="visual").mean(axis=1)
    last = module.apply(variables, features.mean(axis=1), method="visual")
    np.testing.assert_allclose(first, last, atol=1e-6)  # the same sum of values of size 1 in another order


@pytest.mark.parametrize(("n", "d_joint"), [(6, 9), (6, 6), (9, 6)])
def test_orthogonal_start(n, d_joint):
    variables = initialise(JointEmbedding(d_joint, orthogonal=True), n=n)
    kernel = np.asarray(variables["params"]["a_visual"]["kernel"], np.float64)
    # Isometry where the joint space has room for it, else a projection with orthonormal outputs.
    product = kernel @ kernel.T if n <= d_joint else kernel.T @ kernel
    np.testing.assert_allclose(product, np.eye(min(n, d_joint)), atol=1e-5)  # float32 QR
