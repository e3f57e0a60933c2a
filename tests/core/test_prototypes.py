"""Cross-attention and dynamic convolution against loops over labels, heads and local features (eqs 12-17)."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from mlfsic_jax.core.prototypes import ATTENTIONS, Prototypes

S, L, D, C, HEADS, D_DYN, SCALE = 4, 5, 8, 3, 2, 3, 6.0


def case(seed=0):
    rng = np.random.default_rng(seed)
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1]])
    keep = rng.random((S, L)) < 0.6
    keep[:, 0] = True
    return rng.normal(size=(S, L, D)).astype(np.float32), labels, rng.normal(size=(C, D)).astype(np.float32), keep


def build(seed=0, **options):
    """A module and parameters none of which is at its special start (zero biases, unit norms, closed gates)."""
    sizes = {"n_heads": HEADS, "d_dynamic": D_DYN, "n_dynamic": 4, "dropout": 0.0, "scale": SCALE}
    module = Prototypes(**sizes | options)
    rng = np.random.default_rng(seed)
    return module, jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), fresh(module))


def fresh(module):
    return jax.jit(module.init)(jax.random.key(0), *case()[:3])


@functools.partial(jax.jit, static_argnames=("module", "train"))
def apply(module, variables, regions, labels, words, keep=None, train=False, rngs=None):
    return module.apply(variables, regions, labels, words, keep, train, rngs=rngs)


def dense(parameters, x):
    return x @ parameters["kernel"] + parameters.get("bias", 0)


def layer_norm(parameters, x):
    normed = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
    return normed * parameters["scale"] + parameters["bias"]


def softmax(logits):
    return np.exp(logits - np.max(logits)) / np.exp(logits - np.max(logits)).sum()


def attend(module, attention, u, word):
    """p_att of one label from its features: locals, or global features of its images."""
    if module.attention == "none":
        assert attention is None
        return 0.0
    if module.attention in ("simple", "simple_local"):
        assert attention is None
        mu = softmax([SCALE * (x @ word) / np.sqrt((x @ x) * (word @ word)) for x in u])
        return sum(m * x for m, x in zip(mu, u, strict=True))
    if module.attention == "low_rank":
        assert set(attention) == {"feature", "word", "coefficient"}
        bilinear = [np.tanh(dense(attention["feature"], x) * dense(attention["word"], word)) for x in u]
        mu = softmax([dense(attention["coefficient"], b).item() for b in bilinear])
        return sum(m * x for m, x in zip(mu, u, strict=True))
    assert ("key" in attention) == ("value" in attention) == (module.attention == "standard")
    d_a, heads = D // HEADS, []
    for j in range(HEADS):
        part = slice(j * d_a, (j + 1) * d_a)
        q = dense(attention["query"], word)[part]
        keys = [(dense(attention["key"], x) if "key" in attention else x)[part] for x in u]
        values = [(dense(attention["value"], x) if "value" in attention else x)[part] for x in u]
        mu = softmax([q @ k / np.sqrt(d_a) for k in keys])
        heads.append(sum(m * v for m, v in zip(mu, values, strict=True)))
    pooled = np.concatenate(heads)
    hidden = dense(attention["mlp_1"], pooled)
    hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    attended = dense(attention["mlp_2"], hidden) * attention.get("mlp_gate", 1.0)
    return attended + pooled if module.skip or module.anchor else attended


def reference(module, variables, regions, labels, words, keep=None):
    """float64 [C, D]."""
    parameters = jax.tree.map(lambda x: np.asarray(x, np.float64), variables.get("params", {}))
    attention, dynamic = parameters.get("attention"), parameters.get("dynamic")
    assert (dynamic is not None) == module.dynamic
    regions, words = regions.astype(np.float64), words.astype(np.float64)
    keep = np.ones(regions.shape[:2], bool) if keep is None else keep
    result = []
    for c, word in enumerate(words):
        u = [regions[s, j] for s in range(len(regions)) for j in range(regions.shape[1]) if labels[s, c] and keep[s, j]]
        images = [regions[s, keep[s]].mean(axis=0) for s in range(len(regions)) if labels[s, c]]
        attended = attend(module, attention, images if module.attention in ("global", "simple") else u, word)
        if dynamic is None:
            result.append(attended)
            continue
        theta_1 = dense(dynamic["kernel_1"], word).reshape(D, D_DYN)
        theta_2 = dense(dynamic["kernel_2"], word).reshape(D_DYN, D)
        cosines = [x @ word / np.sqrt((x @ x) * (word @ word)) for x in u]
        convolved = []
        for i in np.argsort(cosines)[::-1][: module.n_dynamic]:
            inner = np.maximum(layer_norm(dynamic["norm_1"], theta_1.T @ u[i]), 0)
            convolved.append(np.maximum(layer_norm(dynamic["norm_2"], theta_2.T @ inner), 0))
        result.append(attended + np.mean(convolved, axis=0) * dynamic.get("gate", 1.0))
    return np.array(result)


# float32 sums of some ten products of size 1, and two layer norms: a few 1e-6; a wrong term moves a prototype by 0.1.
TOLERANCE = 3e-5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"skip": False}, {"anchor": True}, {"n_dynamic": 1}, {"n_dynamic": 7}, {"n_dynamic": 100}]
)
def test_is_the_loop_over_labels(options, masked):
    module, variables = build(**options)
    regions, labels, words, keep = case(1)
    keep = keep if masked else None
    if masked:
        counts = [(keep * labels[:, [c]]).sum() for c in range(C)]
        assert min(counts) < 7 < max(counts)  # with n_dynamic 7 some labels have fewer locals, some more
    got = apply(module, variables, regions, labels, words, keep)
    assert got.shape == (C, D) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference(module, variables, regions, labels, words, keep), atol=TOLERANCE)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_is_the_loop_over_labels(attention, dynamic):
    if attention == "none" and not dynamic:
        with pytest.raises(ValueError, match="attention='none' needs dynamic=True"):
            build(attention="none", dynamic=False)
        return
    module, variables = build(attention=attention, dynamic=dynamic)
    arguments = case(2)
    got = apply(module, variables, *arguments)
    np.testing.assert_allclose(got, reference(module, variables, *arguments), atol=TOLERANCE)


def test_an_attention_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="attention must be one of"):
        build(attention="cross")


def test_global_attention_with_an_anchor_is_the_loop_over_labels():
    module, variables = build(attention="global", anchor=True)
    got = apply(module, variables, *case(3))
    np.testing.assert_allclose(got, reference(module, variables, *case(3)), atol=TOLERANCE)


@pytest.mark.parametrize("attention", ["standard", "global", "simple", "simple_local", "low_rank"])
def test_every_attention_is_finite_for_a_label_and_an_image_with_nothing_left(attention):
    module, variables = build(attention=attention, dynamic=False)
    regions, labels, words, keep = case()
    labels[3, 2] = 0  # no image has label 2
    keep[0] = False  # nothing of image 0 is kept, the only one with label 0 besides image 1
    out = apply(module, variables, regions, labels, words, keep)
    expected = reference(module, variables, regions[1:], labels[1:, :2], words[:2], keep[1:])
    np.testing.assert_allclose(out[:2], expected, atol=TOLERANCE)
    gradient = jax.jit(jax.grad(lambda v, u: apply(module, v, u, labels, words, keep)[:2].sum(), (0, 1)))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((out, gradient(variables, regions))))


@pytest.mark.parametrize("label_type", [bool, np.float32])
def test_label_types(label_type):
    module, variables = build()
    regions, labels, words, keep = case()
    got = apply(module, variables, regions, labels.astype(label_type), words, keep)
    np.testing.assert_allclose(got, reference(module, variables, regions, labels, words, keep), atol=TOLERANCE)


@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_what_is_masked_does_not_matter(factor):
    module, variables = build()
    regions, labels, words, keep = case()
    labels[3, 1] = 0  # image 3 has label 2 alone
    expected = apply(module, variables, regions, labels, words, keep)
    other = regions.copy()
    other[~keep] *= -factor
    other[3] *= factor
    got = apply(module, variables, other, labels, words, keep)
    np.testing.assert_allclose(got[:2], expected[:2], atol=1e-6)


@pytest.mark.parametrize("anchor", [False, True])
def test_a_label_without_support_is_finite_and_hurts_no_other(anchor):
    module, variables = build(anchor=anchor)
    regions, labels, words, keep = case()
    labels[3, 2] = 0

    def others(variables):
        out = apply(module, variables, regions, labels, words, keep)
        return out[:2].sum(), out

    (_, got), gradient = jax.jit(jax.value_and_grad(others, has_aux=True))(variables)
    assert jnp.isfinite(got).all()
    expected = reference(module, variables, regions, labels[:, :2], words[:2], keep)
    np.testing.assert_allclose(got[:2], expected, atol=TOLERANCE)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))
    at_start = apply(module, fresh(module), regions, labels, words, keep)
    np.testing.assert_array_equal(at_start[2], np.zeros(D))  # all biases are zero there


@pytest.mark.parametrize("masked", [False, True])
def test_anchor_starts_at_the_mean_of_the_labels_locals(masked):
    module = Prototypes(n_heads=HEADS, d_dynamic=D_DYN, n_dynamic=4, anchor=True)
    regions, labels, words, keep = case()
    keep = keep if masked else np.ones_like(keep)
    variables = fresh(module)
    got = apply(module, variables, regions, labels, words, keep)
    for c in range(C):
        mean = regions[(labels[:, c] == 1)[:, None] & keep].mean(axis=0)
        np.testing.assert_allclose(got[c], mean, atol=1e-6)
    # Everything that starts closed has a way to open.
    similarity = lambda v: jnp.sum(apply(module, v, regions, labels, words, keep) * words)  # noqa: E731
    gradient = jax.jit(jax.grad(similarity))(variables)["params"]
    assert jnp.abs(gradient["attention"]["query"]["kernel"]).max() > 0
    assert gradient["attention"]["mlp_gate"] != 0 and gradient["dynamic"]["gate"] != 0


def test_dropout_is_for_training_alone():
    module, variables = build(dropout=0.5)
    case_ = case()
    plain, _ = build()
    expected = apply(plain, variables, *case_)
    np.testing.assert_allclose(apply(module, variables, *case_), expected, atol=1e-6)  # without an rng
    np.testing.assert_allclose(apply(plain, variables, *case_, train=True), expected, atol=1e-6)
    drawn = [apply(module, variables, *case_, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any() and (drawn[0] != expected).any()
    with pytest.raises(flax.errors.InvalidRngError):
        apply(module, variables, *case_, train=True)


def test_support_images_and_positions_have_no_order():
    module, variables = build()
    regions, labels, words, keep = case()
    expected = apply(module, variables, regions, labels, words, keep)
    images, positions = [2, 0, 3, 1], [4, 1, 0, 3, 2]
    got = apply(module, variables, regions[images][:, positions], labels[images], words, keep[images][:, positions])
    np.testing.assert_allclose(got, expected, atol=1e-5)  # the same float32 sums in another order


def test_labels_have_no_order_and_do_not_see_each_other():
    module, variables = build()
    regions, labels, words, keep = case()
    expected = apply(module, variables, regions, labels, words, keep)
    got = apply(module, variables, regions, labels[:, [2, 0]], words[[2, 0]], keep)
    np.testing.assert_allclose(got, expected[jnp.array([2, 0])], atol=1e-5)
