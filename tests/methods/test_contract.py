"""Every method through its contract, on made-up images in which labels can be learned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax.core import word_ridge
from mlfsic_jax.core.episodes import sample_episodes
from mlfsic_jax.core.metrics import mean_and_ci95, multilabel_metrics
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.core.options import OptionError
from mlfsic_jax.data.features import View
from mlfsic_jax.methods import METHODS, Method, create, laso, pla, trained_of
from mlfsic_jax.run import evaluate

IMAGES, L, N, EPISODES = 120, 4, 12, 20
# Widths and steps of milliseconds; the other options are those of a run.
SMALL = {
    "model": BaseModel(d_joint=8, n_heads=2, d_dynamic=3, n_dynamic=4),
    "n_components": 8,
    "width": 16,
    "embedding": 6,  # as long as the word vectors, so that both decoders are trained by one program
    "training_steps": 50,
    "training_learning_rate": 1e-2,
    "epochs": 10,
    "learning_rate": 0.1,
}
STORES = sorted({store for method in METHODS.values() for store in method.stores})


def small(name):
    fields = {field.name for field in dataclasses.fields(METHODS[name])}
    return create(name, **{option: value for option, value in SMALL.items() if option in fields})


def directions_of(seed, n_labels):
    return 4 * np.linalg.qr(np.random.default_rng([seed, 1]).normal(size=(N, n_labels)))[0].T.astype(np.float32)


def head():
    """A classifier of the novel labels, which are its classes."""
    return directions_of(1, 3), np.zeros(3, np.float32)


def class_mixtures(_):
    """Every novel label is its own class, by either kind of text."""
    return np.tile(np.eye(3, dtype=np.float32), 2)


def split(seed, n_labels):
    """An image is noise, and in one or two places the direction of each of its labels."""
    rng = np.random.default_rng(seed)
    labels = np.eye(n_labels, dtype=bool)[np.arange(IMAGES) % n_labels] | (rng.random((IMAGES, n_labels)) < 0.1)
    directions = directions_of(seed, n_labels)
    local = rng.normal(size=(IMAGES, L, N))
    for i, c in np.argwhere(labels):
        local[i, rng.permutation(L)[: rng.integers(1, 3)]] += directions[c]
    local = local.reshape(IMAGES, 2, 2, N).astype(np.float16)
    words = rng.normal(size=(n_labels, 6)).astype(np.float32)
    return View(local.__getitem__, labels, words, ("",) * n_labels, head=head, named_vectors=class_mixtures)


@pytest.fixture(scope="module", autouse=True)
def compiled_sooner():
    """Without what takes long to compile: random numbers for every block's dropout, every step of the decoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laso, "_BLOCKS", 1)
        patch.setattr(pla, "MAX_LABELS", 2)
        yield


@functools.cache
def store_of(name):
    """The result of training, for each store by the first method that has it alone."""
    trainer = next(method for method in METHODS if METHODS[method].stores == (name,))
    return small(trainer).train(jax.random.key(0), split(0, 4))


def trained(name):
    method = small(name)
    return trained_of(method, {store: store_of(store) for store in method.stores}, 0.55)


def rows(images, index):
    return {name: x[index] for name, x in images.items()}


def assert_nested_dicts_of_arrays(tree):
    if isinstance(tree, dict):
        for name, branch in tree.items():
            assert isinstance(name, str)
            assert_nested_dicts_of_arrays(branch)
    else:
        assert isinstance(tree, jax.Array | np.ndarray | np.generic)


@pytest.mark.parametrize("store", STORES)
def test_training_gives_nested_dicts_of_arrays(store):
    assert store_of(store)
    assert_nested_dicts_of_arrays(store_of(store))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_value(name):
    method = METHODS[name]
    assert create(name) == method and hash(create(name)) == hash(method)
    assert list(METHODS.values()).count(method) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.beta = 1.0
    assert method.stores and method.base in ("images", "labels")
    assert method.against in ("", *METHODS)
    assert bool(method.tuned) == (method.tuned == "theta") and (not method.tuned or len(method.candidates()) > 1)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_goes_through_its_contract(name):
    method, given, novel = small(name), trained(name), split(1, 3)
    local = jnp.asarray(novel.inputs(np.arange(IMAGES)).reshape(IMAGES, L, N), jnp.float32)
    labels, words = jnp.asarray(novel.labels), jnp.asarray(novel.words(method.words_from))
    images = jax.jit(method.embed)(given, local)
    assert images and all(isinstance(x, jax.Array) and len(x) == IMAGES for x in images.values())
    hash((method.embed_key(given), method.support_key(given)))
    alone = jax.jit(method.embed)(given, local[5:6])
    for part, value in alone.items():  # image by image
        np.testing.assert_allclose(value[0], images[part][5], atol=1e-5, err_msg=part)

    @jax.jit
    def episode(given, support, query):
        given_words, truth, s = words if method.needs_words else None, labels[support], rows(images, support)
        extra = method.embed_support(given, s, truth, given_words)
        assert not s.keys() & extra.keys()
        state = method.fit(given, s | extra, truth, given_words)
        return method.score(given, state, rows(images, query)), method.statistics(state)

    episodes = sample_episodes(jax.random.key(1), novel.labels, n_episodes=EPISODES, n_shot=3, n_query=6)
    truth = novel.labels[episodes.query]
    got, statistics = jax.jit(jax.vmap(episode, (None, 0, 0)))(given, *episodes)
    assert got.shape == truth.shape == (EPISODES, 18, 3) and got.dtype == np.float32 and np.isfinite(got).all()
    assert all(x.shape == (EPISODES,) for x in statistics.values())
    first, _ = episode(given, *(x[0] for x in episodes))
    np.testing.assert_allclose(got[0], first, atol=2e-3)  # float32, tens of steps on the support
    if method.on_request and not method.calibrated:
        probabilities = evaluate.probabilities(method, got)
        assert (probabilities >= 0).all() and (probabilities <= 1).all()
    if not {"episodes", "untrained"} & set(method.stores):  # an untrained model need not beat chance
        chance = np.random.default_rng(0).random(truth.shape)
        gain = multilabel_metrics(got, truth)["macro_ap"] - multilabel_metrics(chance, truth)["macro_ap"]
        gain = mean_and_ci95(gain)
        assert gain["mean"] > gain["ci95"]


@pytest.mark.parametrize("name", METHODS)
def test_an_explanation_adds_up_to_the_scores(name):
    method, novel = small(name).explaining(), split(1, 3)
    if type(method).explain is Method.explain:
        assert method.explain({}, None, {}) is None and method == small(name)
        return
    given, local = trained(name), novel.inputs(np.arange(9)).reshape(9, L, N).astype(np.float32)
    images = method.embed(given, jnp.asarray(local))
    labels, support = jnp.asarray(novel.labels[:6]), rows(images, slice(6))
    words = novel.words(method.words_from)
    support |= method.embed_support(given, support, labels, words)
    state = method.fit(given, support, labels, words)
    queries = rows(images, slice(6, 9))
    parts = method.explain(given, state, queries)
    raw = parts["prior"] + np.einsum("qslm,sc->qc", parts["pairs"], parts["dual"])
    n = 6 if method.adapts else 0
    assert parts["pairs"].shape == (3, n, L, L) and parts["dual"].shape == (n, 3)
    if "adapted" in state:
        expected = word_ridge.standardised(raw, state["adapted"].left_out, labels)
    else:
        expected = raw - word_ridge.left_out_centre(state["fit"].left_out, labels) if n else raw
    if "prior_pairs" in parts:
        by_region = parts["prior_pairs"].sum(axis=1)
        np.testing.assert_allclose(by_region - by_region.mean(axis=1, keepdims=True), parts["prior"], atol=1e-4)
    np.testing.assert_allclose(method.score(given, state, queries), expected, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_an_option_is_changed_or_refused_with_its_rule(name):
    method, refused = METHODS[name], []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name == "model":
            changed = create(name, model=BaseModel(scale=7.0))
            assert changed.model.scale == 7 and changed != method
        elif not isinstance(value, bool | str | tuple):
            changed = create(name, **{field.name: value + 1 if isinstance(value, int) else value / 2})
            assert changed != method and getattr(METHODS[name], field.name) == value
            try:
                create(name, **{field.name: -1})
            except OptionError as error:
                assert set(error.mistakes) == {field.name}
                rule = error.mistakes[field.name]
                assert f"{field.name} = -1: {rule}" in str(error) and rule.startswith("must be ")
                refused.append(field.name)
    assert refused or [field.name for field in dataclasses.fields(method)] == ["model"]


def test_a_tuned_method_needs_its_value():
    stores = {"episodes": {"variables": 1}}
    assert trained_of(METHODS["lcm"], stores, (0.5, 0.6))["theta"].shape == (2,)
    assert trained_of(METHODS["base"], stores) == {"variables": 1}
    with pytest.raises(ValueError, match="LCM needs a value of theta"):
        trained_of(METHODS["lcm"], stores)


def test_what_create_refuses():
    with pytest.raises(ValueError, match="no method 'rdige': choose one of zero_shot, prototypes"):
        create("rdige")
    with pytest.raises(TypeError, match="regularizer"):
        create("ridge", regularizer=2.0)
    with pytest.raises(OptionError, match="thresholds = \\(\\): must be numbers between 0 and 1"):
        create("lcm", thresholds=())
    with pytest.raises(OptionError, match="operations = .*: must be some of union, intersection"):
        create("laso", operations=("sum",))
    with pytest.raises(OptionError, match="steps = 0: must be a whole number of at least 1"):
        create("lcm", steps=0)
