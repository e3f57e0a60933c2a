import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

import mlfsic_jax
from mlfsic_jax import lcm_select, methods, multilabel_metrics
from mlfsic_jax.core import word_ridge
from mlfsic_jax.core.episodes import sample_episode, sample_episodes, sample_laso_support
from mlfsic_jax.core.lcm import LCMOptions, loss_change, select_positions
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data.features import View
from mlfsic_jax.methods import METHODS, Method
from mlfsic_jax.run import evaluate
from mlfsic_jax.run.evaluate import results_table
from mlfsic_jax.system.errors import InputError

N, C, D_W = 150, 3, 5
THRESHOLDS = (0.5, 0.53, 0.6)
EVERY_RUN = tuple(name for name, method in METHODS.items() if not method.on_request)
JOINED = ("region_word_ridge_lcm", "base_ridge", "lcm_ridge")


def create(model, *names, **options):
    """Methods, each with those of the options that it has."""
    options = {"model": model, "n_components": 6, "thresholds": THRESHOLDS, "tune_learning_rate": 0.02} | options
    fields = {
        name: {f.name for f in dataclasses.fields(METHODS[name]) if f.name == "model" or not f.metadata.get("fixed")}
        for name in names
    }
    return {name: methods.create(name, **{k: v for k, v in options.items() if k in fields[name]}) for name in names}


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    features = np.maximum(rng.normal(size=(N, 2, 2, 6)), 0).astype(np.float16)
    labels = rng.random((N, C)) < 0.4
    words = rng.normal(size=(C, D_W)).astype(np.float32)
    split = View(lambda rows: features[rows], labels, words, ("a", "b", "c"))
    model = BaseModel(d_joint=8, n_heads=2, d_dynamic=3, n_dynamic=4)
    one, y = jnp.zeros((1, 2, 2, 6)), jnp.ones((1, C))
    variables = jax.jit(model.init)(jax.random.key(1), one, one, y, y, words)
    fitted = create(model, "ridge")["ridge"].train(jax.random.key(0), split)
    return model, variables, split, features, word_ridge.Fitted(**fitted)


def trained_by(setting, made):
    """What each method is given as ``trained``; the tuned leaf holds all candidates."""
    _, variables, _, _, fitted = setting
    untrained = jax.tree.map(jnp.negative, variables)
    stores = {
        "episodes": {"variables": variables},
        "untrained": {"variables": untrained},
        "fitted": fitted and fitted._asdict(),
    }
    return {name: methods.trained_of(method, stores, method.candidates()) for name, method in made.items()}


def scores_of(setting, n_episodes=5, names=EVERY_RUN, **options):
    model, _, split, *_ = setting
    made = create(model, *names, **options)
    sizes = {"n_episodes": n_episodes, "n_shot": 2, "n_query": 3}
    return evaluate.score_episodes(made, trained_by(setting, made), split, key=jax.random.key(7), **sizes)


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def classify(queries, prototypes):
    return 1 / (1 + np.exp(-10 * unit(np.asarray(queries)) @ unit(np.asarray(prototypes)).T))


def test_every_method_equals_the_same_episode_done_by_hand(setting):
    model, variables, split, features, fitted = setting
    names = (*EVERY_RUN, *JOINED)
    scores = scores_of(setting, names=names, tune_epochs=0)  # tuned: tests/methods/test_lcm.py
    episodes = sample_episodes(jax.random.split(jax.random.key(7))[0], split.labels, n_episodes=5, n_shot=2, n_query=3)
    kernels = {name: np.asarray(layer["kernel"]) for name, layer in variables["params"]["joint"].items()}
    words = split.word_vectors @ kernels["a_text"]
    prototypes = jax.jit(lambda u, y, keep: model.apply(variables, u, y, words, keep, method="prototypes"))
    f = features.astype(np.float32).reshape(N, 4, 6)
    mean = f.mean((0, 1))

    def by_minus(support, pooled, y):
        """The untrained model of ``trained_by``."""
        minus = jax.tree.map(jnp.negative, variables)
        regions, joint_words = support @ -kernels["a_visual"], -words
        return classify(pooled @ -kernels["a_visual"], model.apply(minus, regions, y, joint_words, method="prototypes"))

    for e, (s, q) in enumerate(zip(*map(np.asarray, episodes), strict=True)):
        y = split.labels[s]
        np.testing.assert_array_equal(scores.labels[e], split.labels[q])
        u, pooled = f[s] @ kernels["a_visual"], (f[q] @ kernels["a_visual"]).mean(1)
        g_s, g_q = f[s].mean(1), f[q].mean(1)
        x_s, x_q = unit(g_s - mean), unit(g_q - mean)
        coefficients = np.linalg.solve(x_s.T @ x_s + np.eye(6), x_s.T @ (y - y.mean(0)))
        everything = np.ones((len(s), 4), bool)
        keep = lcm_select(features[s], y, words, projection=kernels["a_visual"], threshold=0.53).keep
        keep = np.asarray(keep).reshape(len(s), -1)
        z_s, z_q = word_ridge.regions(fitted, f[s]), word_ridge.regions(fitted, f[q])
        w = split.word_vectors
        expected = {
            "zero_shot": classify(pooled, words),
            "base": classify(pooled, prototypes(u, y, everything)),
            "base_untrained": by_minus(f[s], f[q].mean(1), y),
            "prototypes": classify(g_q, [g_s[y[:, c]].mean(0) for c in range(C)]),
            "prototypes_centered": classify(x_q, [x_s[y[:, c]].mean(0) for c in range(C)]),
            "ridge": x_q @ coefficients + y.mean(0),
        }
        ridges = {
            "word_ridge": (None, None, 1.0),
            "region_word_ridge": (z_s, z_q, 0.3),
            "region_word_ridge_lcm": (z_s * keep[..., None], z_q, 0.3),
        }
        for name, (support, queries, regulariser) in ridges.items():
            adapted = word_ridge.adapt(fitted, g_s, support, y, w, beta=0.5, regulariser=regulariser)
            value = word_ridge.scores(fitted, adapted, g_q, queries)
            expected[name] = word_ridge.standardised(value, adapted.left_out, y)
        for name, kept in (("base_ridge", everything), ("lcm_ridge", keep)):
            p = unit(np.asarray(prototypes(u, y, kept)))
            priors = [0.5 * (c - c.mean(1, keepdims=True)) for c in (unit(u.mean(1)) @ p.T, unit(pooled) @ p.T)]
            dual, left_out = word_ridge.solve(x_s @ x_s.T, priors[0], y, 1.0)
            expected[name] = word_ridge.standardised(priors[1] + x_q @ x_s.T @ dual, left_out, y)
        assert set(scores.methods) == {*expected, "lcm", "lcm_untuned", "lcm_random_scores"}
        for name, value in expected.items():
            # float32 sums in another order; logits up to 10, standardised scores divided by a spread of about 0.1
            got = evaluate.probabilities(METHODS[name], scores.methods[name][e])
            np.testing.assert_allclose(got, value, atol=2e-4, err_msg=name)
        for t, threshold in enumerate(THRESHOLDS):
            keep = lcm_select(features[s], y, words, projection=kernels["a_visual"], threshold=threshold).keep
            value = classify(pooled, prototypes(u, y, np.asarray(keep).reshape(len(s), -1)))
            for name in ("lcm", "lcm_untuned"):
                np.testing.assert_allclose(expit(scores.methods[name][t, e]), value, atol=2e-5)


@pytest.mark.parametrize(
    ("ablation", "selection"),
    [
        ({"attention": "standard", "dynamic": False}, "taylor"),
        ({"attention": "global"}, "exact"),
        ({"attention": "simple"}, "importance"),
        ({"attention": "simple_local"}, "low_importance"),
        ({"attention": "low_rank"}, "momentum"),
        ({"attention": "none"}, "importance"),
        ({"query_top": 3, "cm_loss": False, "query_loss_on": "both"}, "momentum"),
    ],
    ids=str,
)
def test_ablations_equal_an_episode_done_by_hand(setting, ablation, selection):
    _, _, split, features, _ = setting
    model = BaseModel(d_joint=8, n_heads=2, d_dynamic=3, n_dynamic=4, **ablation)
    one, y = jnp.zeros((1, 2, 2, 6)), jnp.ones((1, C))
    variables = jax.jit(model.init)(jax.random.key(1), one, one, y, y, split.word_vectors)
    scores = scores_of(
        (model, variables, split, None, None),
        2,
        ("zero_shot", "base", "lcm"),
        thresholds=(0.5, 0.6),
        selection=selection,
        tune_epochs=0,
    )
    # theta = 0.5 keeps all; logits up to 10, in float32 and by another program
    np.testing.assert_allclose(scores.methods["lcm"][0], scores.methods["base"], atol=1e-5)
    s, q = (
        np.asarray(rows)[1]
        for rows in sample_episodes(
            jax.random.split(jax.random.key(7))[0], split.labels, n_episodes=2, n_shot=2, n_query=3
        )
    )
    joint = variables["params"]["joint"]
    u = features.astype(np.float32).reshape(N, 4, 6) @ np.asarray(joint["a_visual"]["kernel"])
    words = split.word_vectors @ np.asarray(joint["a_text"]["kernel"])
    support = jnp.asarray(u[s])
    raw, _ = loss_change(support, split.labels[s], words, scale=10.0, options=LCMOptions(selection=selection))
    keep = select_positions(raw, 0.6)
    assert 0.1 < keep.mean() < 0.95
    prototypes = jax.jit(
        lambda keep: model.apply(variables, support, split.labels[s], words, keep, method="prototypes")
    )

    def by_hand(prototypes):
        if "query_top" not in ablation:
            return classify(u[q].mean(1), prototypes)
        cosines = np.sort(np.einsum("qld,cd->qcl", unit(u[q]), unit(np.asarray(prototypes))), axis=-1)
        return 1 / (1 + np.exp(-10 * cosines[..., -3:].mean(-1)))

    # float32 sums in another order; logits up to 10
    np.testing.assert_allclose(expit(scores.methods["base"][1]), by_hand(prototypes(np.ones_like(keep))), atol=2e-5)
    np.testing.assert_allclose(expit(scores.methods["lcm"][1, 1]), by_hand(prototypes(keep)), atol=2e-5)
    np.testing.assert_allclose(expit(scores.methods["zero_shot"][1]), classify(u[q].mean(1), words), atol=2e-5)


def test_theta_one_half_is_base_exactly(setting):
    scores = scores_of(setting)
    kept = scores.statistics["lcm"]["kept"]
    assert kept[0] == 1 > kept[1] > kept[2]  # every position, exactly
    # logits up to 10, float32 sums in the order of another program
    np.testing.assert_allclose(scores.methods["lcm"][0], scores.methods["base"], atol=1e-5)


def test_the_same_key_gives_the_same_episodes_for_any_number_of_them(setting):
    few, many = scores_of(setting, 3), scores_of(setting, 6)
    np.testing.assert_array_equal(few.labels, many.labels[:3])
    np.testing.assert_allclose(few.methods["base"], many.methods["base"][:3], atol=1e-5)  # batched differently


def test_without_base_images_and_thresholds_only_base_and_words(setting):
    scores = scores_of((*setting[:4], None), names=("zero_shot", "base"))
    assert set(scores.methods) == {"base", "zero_shot"} and scores.statistics == {"base": {}, "zero_shot": {}}


def test_embedding_in_batches_keeps_order(setting):
    model, _, split, features, _ = setting
    rows = np.random.default_rng(1).permutation(N)
    made = create(model, *EVERY_RUN)
    trained = trained_by(setting, made)
    embedded = evaluate.embed(made, trained, split, rows)
    arrays = {name: embedded[method.embed_key(trained[name])] for name, method in made.items()}
    # float32 means of halves
    for name in ("ridge", "region_word_ridge"):
        np.testing.assert_allclose(arrays[name]["pooled"], features[rows].astype(np.float32).mean((1, 2)), atol=1e-6)
    assert arrays["lcm"]["joint"].shape == (N, 4, 8) and arrays["region_word_ridge"]["regions"].shape == (N, 4, 6)
    assert arrays["lcm"] is arrays["lcm_untuned"] and len(embedded) == 5  # what is alike is computed once


def test_the_fit_is_on_all_base_images(setting):
    _, _, split, features, fitted = setting
    pooled = features.astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(fitted.mean, pooled.mean(0), atol=1e-6)
    direct = word_ridge.fit(pooled, split.labels, split.word_vectors, fitted.components)
    np.testing.assert_allclose(fitted.mapping, direct.mapping, atol=1e-4)


def test_calibration_is_logistic_regression(setting):
    scores = scores_of(setting, 20)
    made = create(setting[0], *EVERY_RUN)
    calibration = evaluate.calibrate(made, scores)
    assert list(calibration) == ["word_ridge", "region_word_ridge"]
    slope, intercept = calibration["word_ridge"]
    s = scores.methods["word_ridge"].ravel()
    reference = LogisticRegression(C=np.inf).fit(s[:, None], scores.labels.ravel())
    # two optimisers, each stops when its loss hardly falls
    np.testing.assert_allclose(
        [slope, intercept], [max(reference.coef_[0, 0], 1e-3), reference.intercept_[0]], atol=5e-3
    )


def test_summary_and_table(setting):
    names = (*EVERY_RUN, *JOINED)
    made, scores = create(setting[0], *names), scores_of(setting, 8, names)
    at_one_theta = {name: value[2] for name, value in scores.methods.items() if made[name].tuned}
    scores = scores._replace(methods=scores.methods | at_one_theta)
    calibration = {name: (1.0, -1.0) for name, method in made.items() if method.calibrated}
    summary, values = evaluate.summarise(made, scores, calibration)
    assert tuple(summary["methods"]) == names
    assert 0 < summary["calibration_error"]["region_word_ridge"] < 1
    lcm, base = (multilabel_metrics(expit(scores.methods[n]), scores.labels)["micro_f1"] for n in ("lcm", "base"))
    entry = summary["paired"]["lcm-base"]["micro_f1"]
    np.testing.assert_allclose(entry["mean"], np.mean(lcm - base))
    np.testing.assert_allclose(entry["ci95"], 1.96 * np.std(lcm - base, ddof=1) / np.sqrt(8))
    assert summary["paired"].keys() >= {"word_ridge-ridge", "region_word_ridge-ridge", "lcm_ridge-word_ridge"}
    np.testing.assert_array_equal(values["lcm.micro_f1"], lcm.astype(np.float32))
    for name, metrics in summary["methods"].items():  # the summary is the mean of all episodes' values
        for metric, value in metrics.items():
            assert values[f"{name}.{metric}"].shape == (8,)
            np.testing.assert_allclose(values[f"{name}.{metric}"].mean(), value["mean"], atol=1e-6)  # float32
    result = {"dataset": "made_up", "n_shot": 2, "episodes": 8, "tuned": {"lcm": 0.6}, **summary}
    table = results_table([result | {"validation": {"calibration": calibration}}])
    for name in (*names, "chance", "lcm - base", "made_up, 2-shot", "lcm: theta 0.6"):
        assert name in table
    assert f"{100 * summary['methods']['base']['macro_ap']['mean']:.1f}" in table


def test_lasos_protocol_draws_supports_of_its_own_and_queries_all_the_rest(setting, monkeypatch):
    model, _, split, features, fitted = setting
    may_support = np.arange(N) % 3 == 0
    laso = split._replace(support=may_support)
    made = create(model, "ridge", "region_word_ridge", "base", "lcm")
    trained, options = trained_by(setting, made), {"key": jax.random.key(3), "n_episodes": 3, "n_shot": 2, "n_query": 1}
    whole = evaluate.score_episodes(made, trained, laso, **options)
    assert whole.labels.shape == (3, (~may_support).sum(), C)
    np.testing.assert_array_equal(whole.labels[1], split.labels[~may_support])
    # 100 queries in batches of 32: every query is scored by itself, so only the order of float32 sums differs.
    monkeypatch.setattr(evaluate, "_QUERY_BATCH", 32)
    parts = evaluate.score_episodes(made, trained, laso, **options)
    for name, value in whole.methods.items():
        np.testing.assert_allclose(parts.methods[name], value, atol=2e-4, err_msg=name)
    np.testing.assert_allclose(parts.methods["lcm"], whole.methods["lcm"], atol=1e-5)
    np.testing.assert_allclose(parts.statistics["lcm"]["kept"], whole.statistics["lcm"]["kept"])

    # One episode by hand, with the support that its key draws.
    pool = np.flatnonzero(may_support)
    key = jax.random.fold_in(jax.random.split(jax.random.key(3))[0], 2)
    s = pool[sample_laso_support(key, split.labels[pool], n_shot=2)]
    x = unit(features.astype(np.float32).reshape(N, 4, 6).mean(1) - np.asarray(fitted.mean))
    y = split.labels[s].astype(np.float32)
    coefficients = np.linalg.solve(x[s].T @ x[s] + np.eye(6), x[s].T @ (y - y.mean(0)))
    expected = x[~may_support] @ coefficients + y.mean(0)
    np.testing.assert_allclose(whole.methods["ridge"][2], expected, atol=2e-4)


@dataclasses.dataclass(frozen=True)
class Nearest(Method):
    """A made-up peer that sees all it is given: the best support photo of every label, and a little of the words."""

    on_request: ClassVar[bool] = True

    def embed(self, trained, features):
        return {"regions": features}

    def fit(self, trained, images, labels, words):
        return {"mean": images["regions"].mean(1), "labels": labels, "words": words}

    def score(self, trained, state, images):
        near = jnp.exp(-jnp.abs(images["regions"].mean(1)[:, None] - state["mean"]).sum(-1))  # [Q, S]
        best = jnp.where(state["labels"], near[..., None], 0).max(axis=1)
        return trained["weight"] * best + 1e-3 * state["words"][:, 0]


@pytest.mark.parametrize("laso", [False, True])
def test_peers_see_the_episodes_of_the_other_methods(setting, monkeypatch, capsys, laso):
    _, _, split, features, _ = setting
    if laso:
        split = split._replace(support=np.arange(N) % 3 == 0)
    monkeypatch.setattr(evaluate, "_QUERY_BATCH", 32)  # 100 queries of LaSO's protocol in four parts
    key, options = jax.random.key(7), {"n_episodes": 3, "n_shot": 2, "n_query": 3}
    trained = {"weight": np.float32(0.5)}
    got = evaluate.score_episodes({"nearest": Nearest()}, {"nearest": trained}, split, key=key, **options)
    assert "nearest: " in capsys.readouterr().err  # its progress
    supports, queries = evaluate.draw(jax.random.split(key)[0], split, *options.values())
    f = features.astype(np.float32).reshape(N, 4, 6)
    for e, (s, q) in enumerate(zip(supports, queries, strict=True)):
        np.testing.assert_array_equal(got.labels[e], split.labels[q])
        near = np.exp(-np.abs(f[q].mean(1)[:, None] - f[s].mean(1)).sum(-1))
        best = np.where(split.labels[s], near[..., None], 0).max(axis=1)
        expected = 0.5 * best + 1e-3 * split.word_vectors[:, 0]
        np.testing.assert_allclose(got.methods["nearest"][e], expected, atol=1e-5)  # float32, under jit
    if not laso:
        np.testing.assert_array_equal(got.labels, scores_of(setting, 3, ("base",)).labels)


def test_one_method_on_episodes_of_ones_own(setting):
    model, _, split, features, fitted = setting
    made = create(model, "ridge", "region_word_ridge", "lcm")
    trained = trained_by(setting, made)
    keys = jax.random.split(jax.random.key(7))[0]
    episodes = sample_episodes(keys, split.labels, n_episodes=3, n_shot=2, n_query=3)
    expected = scores_of(setting, 3, tuple(made))
    for name, method in made.items():
        data = features, split.labels, split.word_vectors
        scores, truth = mlfsic_jax.evaluate(method, trained[name], *data, episodes)
        np.testing.assert_array_equal(truth, expected.labels)
        given = evaluate.probabilities(method, expected.methods[name])
        np.testing.assert_allclose(scores, given, atol=1e-6, err_msg=name)
    # A single episode, without words, for a method that needs none.
    one = sample_episode(jax.random.fold_in(keys, 1), split.labels, n_shot=2, n_query=3)
    scores, truth = mlfsic_jax.evaluate(made["ridge"], trained["ridge"], features, split.labels, None, one)
    np.testing.assert_array_equal(truth[0], split.labels[np.asarray(one.query)])
    x = unit(features.astype(np.float32).reshape(N, 4, 6).mean(1) - np.asarray(fitted.mean))
    s, q = map(np.asarray, one)
    y = split.labels[s].astype(np.float32)
    by_hand = x[q] @ np.linalg.solve(x[s].T @ x[s] + np.eye(6), x[s].T @ (y - y.mean(0))) + y.mean(0)
    np.testing.assert_allclose(scores[0], by_hand, atol=2e-4)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_probabilities_near_one_rank_as_their_logits(scale):
    """In float32 the sigmoid of 17 is 1, and all of them would rank alike."""
    rng = np.random.default_rng(0)
    features = 1 + 0.3 * rng.random((200, 1, 1, 6), np.float32)  # cosines of 0.98 and more
    labels = rng.random((200, 3)) < 0.4
    features[..., :3] += 0.2 * labels[:, None, None]
    episodes = sample_episodes(jax.random.key(0), labels, n_episodes=4, n_shot=3, n_query=20)
    scores, truth = mlfsic_jax.evaluate(
        methods.closed_form.Prototypes(scale=scale), {}, features, labels, None, episodes
    )
    assert scores.min() > 1 / (1 + np.exp(-0.97 * scale)) and scores.max() < 1
    support, query = (features[np.asarray(rows), 0, 0] for rows in episodes)
    of_label = np.einsum("esc,esn->ecn", labels[np.asarray(episodes.support)], support)
    cosines = np.einsum("eqn,ecn->eqc", unit(query.astype(np.float64)), unit(of_label.astype(np.float64)))
    got, expected = (multilabel_metrics(x, truth)["macro_ap"] for x in (scores, cosines))
    np.testing.assert_allclose(got, expected, atol=5e-3)  # float32 cosines: of 60 queries two may change places


def test_scores_that_are_not_finite_are_refused(setting):
    evaluate.require_finite("lcm", np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"scores of lcm are not finite in 2 of 3 episodes, first in number 1"):
        evaluate.require_finite("lcm", np.array([[0.0, 0.0], [np.nan, 0.0], [0.0, -np.inf]]))
    model, variables, *rest = setting
    spoilt = jax.tree.map(lambda x: x * jnp.nan, variables)
    with pytest.raises(InputError, match=r"scores of \w+ are not finite in 5 of 5 episodes"):
        scores_of((model, spoilt, *rest))
