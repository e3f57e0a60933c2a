"""LCM, its forms and its controls through their contract, against Adam and ``lcm_select`` by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax import lcm_select
from mlfsic_jax.methods import create, lcm
from tests.methods.episode import episode_scores
from tests.methods.papers import C, Q, S, adam_by_hand, build, by_hand, episode

EPOCHS, RATE = 12, 0.02  # longer steps than the default's: this joint space is small
LCM = {"steps": 6, "momentum": 0.8}


@functools.partial(jax.jit, static_argnums=0, static_argnames="epochs")
def tune(model, variables, support, labels, vectors, *, epochs, learning_rate=1e-4):
    options = {"epochs": epochs, "learning_rate": learning_rate}
    return lcm.tune(model, variables, support.mean(axis=1), labels, vectors, **options)


def scores(name, model, variables, arrays, theta=0.55, **options):
    options = {"tune_epochs": EPOCHS, "tune_learning_rate": RATE} | options
    if name == "lcm_untuned":
        options = {}
    options |= {} if name == "base_tuned" else LCM
    method = create(name, model=model, **options)
    return episode_scores(method, {"variables": variables, "theta": np.float32(theta)}, *arrays)


def kept(variables, support, labels, vectors, theta):
    """The positions that ``lcm_select`` keeps with the A_visual and A_text of some variables."""
    joint = {name: jnp.asarray(layer["kernel"]) for name, layer in variables["params"]["joint"].items()}
    select = functools.partial(lcm_select, scale=7.0, threshold=theta, **LCM)
    return select(support[:, None], labels, vectors @ joint["a_text"], projection=joint["a_visual"]).keep[:, 0]


def tuned_by_hand(variables, support, labels, vectors):
    (a_visual, a_text), _ = adam_by_hand(variables, support, labels, vectors, EPOCHS, RATE)
    joint = {
        name: {"kernel": jnp.asarray(x, jnp.float32)} for name, x in {"a_visual": a_visual, "a_text": a_text}.items()
    }
    return {**variables, "params": {**variables["params"], "joint": joint}}


@pytest.mark.parametrize(("epochs", "rate"), [(1, 1e-3), (40, 1e-3), (40, 1e-4)])
def test_tuning_is_adam_on_the_cm_loss_of_the_support(epochs, rate):
    model, variables = build()
    support, labels, _, vectors = episode(1)
    tuned = tune(model, variables, support, labels, vectors, epochs=epochs, learning_rate=rate)
    weights, losses = adam_by_hand(variables, support, labels, vectors, epochs, rate)
    assert all(after < before for before, after in itertools.pairwise(losses))
    joint = tuned["params"]["joint"]
    for name, expected in zip(("a_visual", "a_text"), weights, strict=True):
        # Weights of size 0.5 in float32 over 40 steps; a step of Adam moves every weight by about the rate.
        np.testing.assert_allclose(joint[name]["kernel"], expected, atol=1e-5)
        assert np.abs(joint[name]["kernel"] - variables["params"]["joint"][name]["kernel"]).max() > 0.5 * rate
    for path, x in jax.tree.leaves_with_path(variables["params"]["prototype"]):
        np.testing.assert_array_equal(x, functools.reduce(lambda t, k: t[k.key], path, tuned["params"]["prototype"]))


@pytest.mark.parametrize("name", ["lcm_untuned", "lcm", "lcm_permuted_words"])
def test_prototypes_are_those_of_the_model_on_the_regions_that_lcm_select_keeps(name):
    """Whatever chose the regions: words of other labels, or A tuned to the support."""
    model, variables = build()
    support, labels, _, vectors = arrays = episode(6)
    seen = np.roll(vectors, 1, axis=0) if "words" in name else vectors
    of_scores = variables if name == "lcm_untuned" else tuned_by_hand(variables, support, labels, seen)
    keep = kept(of_scores, support, labels, seen, 0.55)
    assert 0.1 < keep.mean() < 0.95
    expected = by_hand(model, variables, *arrays, keep)
    # LCM's features are kept in float16, which flips no region here
    np.testing.assert_allclose(scores(name, model, variables, arrays), expected, atol=1e-5)


def test_forms_of_lcm_select_by_different_scores():
    """Else two rows of a table would be one."""
    model, variables = build()
    arrays, found = episode(6), {}
    for name in ("lcm", "lcm_untuned", "lcm_random_scores", "lcm_permuted_words", "lcm_random_words", "lcm_all_tuned"):
        found[name] = np.concatenate([scores(name, model, variables, episode(seed)).ravel() for seed in range(4)])
    for one, other in itertools.combinations(found, 2):
        assert np.abs(found[one] - found[other]).max() > 1e-3, (one, other)
    np.testing.assert_array_equal(
        scores("lcm_untuned", model, variables, arrays), scores("lcm", model, variables, arrays, tune_epochs=0)
    )


def test_random_scores_keep_as_many_regions():
    model, variables = build()
    support, labels, _, vectors = episode(6)
    found = {}
    for name in ("lcm", "lcm_random_scores"):
        method, trained = create(name, model=model, **LCM), {"variables": variables, "theta": np.float32(0.55)}
        images = method.embed(trained, support)
        images |= method.embed_support(trained, images, labels, vectors)
        found[name] = np.asarray(method.keep(trained, images))
    assert found["lcm"].shape == (S, support.shape[1]) and not np.array_equal(*found.values())
    np.testing.assert_array_equal(*(keep.sum(axis=1) for keep in found.values()))


@pytest.mark.parametrize("options", [{}, {"attention": "channelwise", "dynamic": True}, {"query_top": 2}], ids=str)
def test_all_tuned_is_the_tuned_model_as_if_it_were_trained(options):
    model, variables = build(**options)
    support, labels, _, vectors = arrays = episode(3)
    tuned = tuned_by_hand(variables, support, labels, vectors)
    got = scores("base_tuned", model, variables, arrays)
    assert got.shape == (Q, C)
    untuned = create("base", model=model)
    np.testing.assert_allclose(
        got, episode_scores(untuned, {"variables": tuned}, *arrays), atol=2e-3
    )  # float16 features
    assert np.abs(got - episode_scores(untuned, {"variables": variables}, *arrays)).max() > 1e-2
    got = scores("lcm_all_tuned", model, variables, arrays)
    np.testing.assert_allclose(got, scores("lcm_untuned", model, tuned, arrays), atol=2e-3)


def test_without_epochs_all_tuned_is_the_trained_model():
    model, variables = build()
    arrays = episode(2)
    got = scores("base_tuned", model, variables, arrays, tune_epochs=0)
    np.testing.assert_allclose(got, by_hand(model, variables, *arrays), atol=1e-3)  # float16 features


def test_what_kept_means():
    model, variables = build()
    support, labels, _, vectors = episode(6)
    method, trained = create("lcm_untuned", model=model, **LCM), {"variables": variables, "theta": np.float32(0.6)}
    images = method.embed(trained, support)
    images |= method.embed_support(trained, images, labels, vectors)
    state = method.fit(trained, images, labels, vectors)
    assert method.statistics(state)["kept"] == kept(variables, support, labels, vectors, 0.6).mean()
