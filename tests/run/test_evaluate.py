import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mlfsic_jax import lcm_select, multilabel_metrics
from mlfsic_jax.core import word_ridge
from mlfsic_jax.core.episodes import sample_episodes, sample_laso_support
from mlfsic_jax.core.lcm import loss_change, select_positions
from mlfsic_jax.core.model import BaseModel, LCMOptions
from mlfsic_jax.data.features import View
from mlfsic_jax.run import evaluate
from mlfsic_jax.system.errors import InputError

N, C, D_W = 150, 3, 5
THRESHOLDS = (0.5, 0.53, 0.6)
RIDGE = evaluate.RidgeOptions(n_components=6, variants=True, variants_threshold=0.6)


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
    return model, variables, split, features, evaluate.fit_ridge(model, variables, split, RIDGE)


def scores_of(setting, n_episodes=5, **options):
    model, variables, split, _, fitted = setting
    options = {"thresholds": THRESHOLDS, "fitted": fitted, "ridge": RIDGE} | options
    return evaluate.score_episodes(
        model, variables, split, key=jax.random.key(7), n_episodes=n_episodes, n_shot=2, n_query=3, **options
    )


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def classify(queries, prototypes):
    return 1 / (1 + np.exp(-10 * unit(np.asarray(queries)) @ unit(np.asarray(prototypes)).T))


def test_every_method_equals_the_same_episode_done_by_hand(setting):
    model, variables, split, features, fitted = setting
    scores = scores_of(setting)
    episodes = sample_episodes(jax.random.split(jax.random.key(7))[0], split.labels, n_episodes=5, n_shot=2, n_query=3)
    kernels = {name: np.asarray(layer["kernel"]) for name, layer in variables["params"]["joint"].items()}
    words = split.word_vectors @ kernels["a_text"]
    prototypes = jax.jit(lambda u, y, keep: model.apply(variables, u, y, words, keep, method="prototypes"))
    f = features.astype(np.float32).reshape(N, 4, 6)
    mean = f.mean((0, 1))
    for e, (s, q) in enumerate(zip(*map(np.asarray, episodes), strict=True)):
        y = split.labels[s]
        np.testing.assert_array_equal(scores.labels[e], split.labels[q])
        u, pooled = f[s] @ kernels["a_visual"], (f[q] @ kernels["a_visual"]).mean(1)
        g_s, g_q = f[s].mean(1), f[q].mean(1)
        x_s, x_q = unit(g_s - mean), unit(g_q - mean)
        coefficients = np.linalg.solve(x_s.T @ x_s + np.eye(6), x_s.T @ (y - y.mean(0)))
        everything = np.ones((len(s), 4), bool)
        keep = lcm_select(features[s], y, words, projection=kernels["a_visual"], threshold=0.6).keep
        keep = np.asarray(keep).reshape(len(s), -1)
        z_s, z_q = word_ridge.regions(fitted, f[s]), word_ridge.regions(fitted, f[q])
        w = split.word_vectors
        expected = {
            "zero_shot": classify(pooled, words),
            "base": classify(pooled, prototypes(u, y, everything)),
            "prototypes": classify(g_q, [g_s[y[:, c]].mean(0) for c in range(C)]),
            "prototypes_centered": classify(x_q, [x_s[y[:, c]].mean(0) for c in range(C)]),
            "ridge": x_q @ coefficients + y.mean(0),
        }
        predictions = {
            "word_ridge": word_ridge.word_ridge(fitted, g_s, y, g_q, w),
            "region_word_ridge": word_ridge.region_word_ridge(fitted, g_s, z_s, y, g_q, z_q, w),
            "region_word_ridge_lcm": word_ridge.region_word_ridge(fitted, g_s, z_s, y, g_q, z_q, w, keep=keep),
        }
        for name, kept in (("base_ridge", everything), ("lcm_ridge", keep)):
            p = unit(np.asarray(prototypes(u, y, kept)))
            priors = [0.5 * (c - c.mean(1, keepdims=True)) for c in (unit(u.mean(1)) @ p.T, unit(pooled) @ p.T)]
            predictions[name] = word_ridge.kernel_ridge(x_s @ x_s.T, x_q @ x_s.T, *priors, y, 1.0)
        expected |= {name: word_ridge.standardised(p, y) for name, p in predictions.items()}
        assert set(scores.methods) == set(expected)
        for name, value in expected.items():
            # float32 sums in another order; logits up to 10, standardised scores divided by a spread of about 0.1
            np.testing.assert_allclose(scores.methods[name][e], value, atol=2e-4, err_msg=name)
        for t, threshold in enumerate(THRESHOLDS):
            keep = lcm_select(features[s], y, words, projection=kernels["a_visual"], threshold=threshold).keep
            value = classify(pooled, prototypes(u, y, np.asarray(keep).reshape(len(s), -1)))
            np.testing.assert_allclose(scores.lcm[t, e], value, atol=2e-5)


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
        thresholds=(0.5, 0.6),
        fitted=None,
        lcm=LCMOptions(selection=selection),
    )
    np.testing.assert_array_equal(scores.lcm[0], scores.methods["base"])
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
    raw, _ = loss_change(support, split.labels[s], words, scale=10.0, selection=selection)
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
    np.testing.assert_allclose(scores.methods["base"][1], by_hand(prototypes(np.ones_like(keep))), atol=2e-5)
    np.testing.assert_allclose(scores.lcm[1, 1], by_hand(prototypes(keep)), atol=2e-5)
    np.testing.assert_allclose(scores.methods["zero_shot"][1], classify(u[q].mean(1), words), atol=2e-5)


def test_theta_one_half_is_base_exactly(setting):
    scores = scores_of(setting)
    np.testing.assert_array_equal(scores.lcm[0], scores.methods["base"])
    assert scores.kept[0] == 1 > scores.kept[1] > scores.kept[2]


def test_the_same_key_gives_the_same_episodes_for_any_number_of_them(setting):
    few, many = scores_of(setting, 3), scores_of(setting, 6)
    np.testing.assert_array_equal(few.labels, many.labels[:3])
    np.testing.assert_allclose(few.methods["base"], many.methods["base"][:3], atol=1e-6)  # batched differently


def test_without_base_images_and_thresholds_only_base_and_words(setting):
    scores = scores_of(setting, thresholds=(), fitted=None)
    assert set(scores.methods) == {"base", "zero_shot"} and scores.lcm.shape[0] == 0


def test_embedding_in_batches_keeps_order(setting):
    model, variables, split, features, fitted = setting
    rows = np.random.default_rng(1).permutation(N)
    embedded = evaluate.embed(model, variables, split.inputs, rows, fitted)
    # float32 means of halves
    np.testing.assert_allclose(embedded.pooled, features[rows].astype(np.float32).mean((1, 2)), atol=1e-6)
    assert embedded.regions.shape == (N, 4, 8) and embedded.regions.shape == (N, 4, 6)


def test_the_fit_is_on_all_base_images(setting):
    _, _, split, features, fitted = setting
    pooled = features.astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(fitted.mean, pooled.mean(0), atol=1e-6)
    direct = word_ridge.fit(pooled, split.labels, split.word_vectors, fitted.components)
    np.testing.assert_allclose(fitted.mapping, direct.mapping, atol=1e-4)


def test_calibration_is_logistic_regression(setting):
    scores = scores_of(setting, 20)
    slope, intercept = evaluate.calibrate(scores)["word_ridge"]
    s = scores.methods["word_ridge"].ravel()
    reference = LogisticRegression(C=np.inf).fit(s[:, None], scores.labels.ravel())
    # two optimisers, each stops when its loss hardly falls
    np.testing.assert_allclose(
        [slope, intercept], [max(reference.coef_[0, 0], 1e-3), reference.intercept_[0]], atol=5e-3
    )


def test_summary_and_table(setting):
    scores = scores_of(setting, 8)
    summary, values = evaluate.summarise(scores, 2, {name: (1.0, -1.0) for name in evaluate.CALIBRATED})
    assert tuple(summary["methods"]) == (*evaluate.METHODS, *evaluate.VARIANTS)
    assert 0 < summary["calibration_error"]["region_word_ridge"] < 1
    lcm = multilabel_metrics(scores.lcm[2], scores.labels)["micro_f1"]
    base = multilabel_metrics(scores.methods["base"], scores.labels)["micro_f1"]
    entry = summary["paired"]["lcm-base"]["micro_f1"]
    np.testing.assert_allclose(entry["mean"], np.mean(lcm - base))
    np.testing.assert_allclose(entry["ci95"], 1.96 * np.std(lcm - base, ddof=1) / np.sqrt(8))
    np.testing.assert_array_equal(values["lcm.micro_f1"], lcm.astype(np.float32))
    for name, metrics in summary["methods"].items():  # of the values of all episodes the summary is the mean
        for metric, value in metrics.items():
            assert values[f"{name}.{metric}"].shape == (8,)
            np.testing.assert_allclose(values[f"{name}.{metric}"].mean(), value["mean"], atol=1e-6)  # float32
    result = {"dataset": "made_up", "n_shot": 2, "episodes": 8, "theta": {"chosen": 0.6}, **summary}
    table = evaluate.results_table([result])
    for name in (*evaluate.METHODS, "chance", "lcm - base", "made_up, 2-shot"):
        assert name in table
    assert f"{100 * summary['methods']['base']['macro_ap']['mean']:.1f}" in table


def test_lasos_protocol_draws_supports_of_its_own_and_queries_all_the_rest(setting, monkeypatch):
    model, variables, split, features, fitted = setting
    may_support = np.arange(N) % 3 == 0
    laso = split._replace(support=may_support)
    options = {"key": jax.random.key(3), "n_episodes": 3, "n_shot": 2, "n_query": 1}
    options |= {"thresholds": THRESHOLDS, "fitted": fitted, "ridge": RIDGE}
    whole = evaluate.score_episodes(model, variables, laso, **options)
    assert whole.labels.shape == (3, (~may_support).sum(), C)
    np.testing.assert_array_equal(whole.labels[1], split.labels[~may_support])
    # 100 queries in batches of 32: every query is scored by itself, so only the order of float32 sums differs.
    monkeypatch.setattr(evaluate, "_QUERY_BATCH", 32)
    parts = evaluate.score_episodes(model, variables, laso, **options)
    for name, value in whole.methods.items():
        np.testing.assert_allclose(parts.methods[name], value, atol=2e-4, err_msg=name)
    np.testing.assert_allclose(parts.lcm, whole.lcm, atol=1e-5)
    np.testing.assert_allclose(parts.kept, whole.kept)

    # One episode by hand, with the support that its key draws.
    pool = np.flatnonzero(may_support)
    key = jax.random.fold_in(jax.random.split(jax.random.key(3))[0], 2)
    s = pool[sample_laso_support(key, split.labels[pool], n_shot=2)]
    x = unit(features.astype(np.float32).reshape(N, 4, 6).mean(1) - np.asarray(fitted.mean))
    y = split.labels[s].astype(np.float32)
    coefficients = np.linalg.solve(x[s].T @ x[s] + np.eye(6), x[s].T @ (y - y.mean(0)))
    expected = x[~may_support] @ coefficients + y.mean(0)
    np.testing.assert_allclose(whole.methods["ridge"][2], expected, atol=2e-4)


def nearest(trained, key, support, labels, query, word_vectors):
    """A made-up peer that sees all it is given: of every label the best support photo, and a little noise."""
    near = jnp.exp(-jnp.abs(query.mean(1)[:, None] - support.mean(1)).sum(-1))  # [Q, S]
    best = jnp.where(labels, near[..., None], 0).max(axis=1)
    return trained * best + 0.01 * jax.random.uniform(key, best.shape) + 1e-3 * word_vectors[:, 0]


@pytest.mark.parametrize("laso", [False, True])
def test_peers_see_the_episodes_of_the_other_methods(setting, monkeypatch, laso):
    _, _, split, features, _ = setting
    if laso:
        split = split._replace(support=np.arange(N) % 3 == 0)
    monkeypatch.setattr(evaluate, "_QUERY_BATCH", 32)  # 100 queries of LaSO's protocol in four parts
    key, options = jax.random.key(7), {"n_episodes": 3, "n_shot": 2, "n_query": 3}
    got, truth = evaluate.score_peer(nearest, 0.5, split, key=key, **options, name="nearest")
    episode_key, peer_key = jax.random.split(key)
    supports, queries = evaluate.draw(episode_key, split, *options.values())
    f = features.astype(np.float32).reshape(N, 4, 6)
    for e, (s, q, k) in enumerate(zip(supports, queries, jax.random.split(peer_key, 3), strict=True)):
        np.testing.assert_array_equal(truth[e], split.labels[q])
        first, done = q[:32], min(len(q), 32)  # noise is drawn for each part anew
        filled = np.concatenate([first, np.full(min(32, len(q)) - done, first[-1])])
        expected = nearest(0.5, k, f[s], split.labels[s], f[filled], split.word_vectors)
        np.testing.assert_allclose(got[e, :done], expected, atol=1e-5)  # float32, under jit
    if not laso:
        np.testing.assert_array_equal(truth, scores_of(setting, 3, thresholds=(), fitted=None).labels)
    else:  # the last part is filled up: its last query stands at the right place
        last = nearest(0.5, k, f[s], split.labels[s], f[[*q[96:], *([q[-1]] * 28)]], split.word_vectors)
        np.testing.assert_allclose(got[2, 96:], last[:4], atol=1e-5)


class Halved(nn.Module):
    """A backbone in miniature."""

    @nn.compact
    def __call__(self, photos, train: bool = False):
        return photos * self.param("scale", nn.initializers.constant(0.5), ())


def test_peers_get_the_features_of_a_trained_backbone(setting):
    model, variables, split, features, _ = setting
    assert evaluate.with_features(model, variables, split) is split  # frozen: these are the inputs
    model = BaseModel(d_joint=8, n_heads=2, d_dynamic=3, n_dynamic=4, backbone=Halved())
    variables = {"params": variables["params"] | {"backbone": {"scale": jnp.float32(0.25)}}}
    view = evaluate.with_features(model, variables, split)
    rows = np.array([5, 149, 5])
    np.testing.assert_array_equal(view.inputs(rows), features[rows] * np.float16(0.25))  # a quarter is exact
    assert view.labels is split.labels


def test_scores_that_are_not_finite_are_refused(setting):
    evaluate.require_finite("lcm", np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"scores of lcm are not finite in 2 of 3 episodes, the first is number 1"):
        evaluate.require_finite("lcm", np.array([[0.0, 0.0], [np.nan, 0.0], [0.0, -np.inf]]))
    model, variables, *rest = setting
    spoilt = jax.tree.map(lambda x: x * jnp.nan, variables)
    with pytest.raises(InputError, match=r"scores of \w+ are not finite in 5 of 5 episodes"):
        scores_of((model, spoilt, *rest))
