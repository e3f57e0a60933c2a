import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax import evaluate, lcm_select, multilabel_metrics
from mlfsic_jax.episodes import sample_episodes
from mlfsic_jax.models import BaseModel

N, C, D_W = 150, 3, 5
THRESHOLDS = (0.5, 0.53, 0.6)


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    features = np.maximum(rng.normal(size=(N, 2, 2, 6)), 0).astype(np.float16)
    labels = rng.random((N, C)) < 0.4
    words = rng.normal(size=(C, D_W)).astype(np.float32)
    split = evaluate.SplitView(lambda rows: features[rows], labels, words, ("a", "b", "c"))
    model = BaseModel(d_joint=8, n_heads=2, d_dynamic=3, n_dynamic=4)
    one, y = jnp.zeros((1, 2, 2, 6)), jnp.ones((1, C))
    variables = model.init(jax.random.key(1), one, one, y, y, words)
    return model, variables, split, features


def scores_of(setting, n_episodes=5, **options):
    model, variables, split, features = setting
    options = {"thresholds": THRESHOLDS, "mean": features.astype(np.float32).mean((0, 1, 2))} | options
    return evaluate.score_episodes(
        model, variables, split, key=jax.random.key(7), n_episodes=n_episodes, n_shot=2, n_query=3, **options
    )


def test_every_method_equals_the_same_episode_done_by_hand(setting):
    model, variables, split, features = setting
    scores = scores_of(setting)
    episodes = sample_episodes(jax.random.split(jax.random.key(7))[0], split.labels, n_episodes=5, n_shot=2, n_query=3)
    bound = model.bind(variables)
    words = bound.words(split.word_vectors)
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)  # noqa: E731
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for e, (s, q) in enumerate(zip(*map(np.asarray, episodes), strict=True)):
        f = features.astype(np.float32)
        y = split.labels[s]
        np.testing.assert_array_equal(scores.labels[e], split.labels[q])
        u = np.asarray(bound.locals(f[s]))
        pooled = np.asarray(bound.locals(f[q])).mean(1)
        classify = lambda p, pooled=pooled: sigmoid(10 * unit(pooled) @ unit(np.asarray(p)).T)  # noqa: E731
        g_s, g_q = f[s].mean((1, 2)), f[q].mean((1, 2))
        mean = f.mean((0, 1, 2))
        x_s, x_q = unit(g_s - mean), unit(g_q - mean)
        means = lambda x, y=y: np.stack([x[y[:, c]].mean(0) for c in range(C)])  # noqa: E731
        coefficients = np.linalg.solve(x_s.T @ x_s + np.eye(6), x_s.T @ (y - y.mean(0)))
        expected = {
            "zero_shot": classify(words),
            "base": classify(bound.prototypes(u, y, words)),
            "prototypes": sigmoid(10 * unit(g_q) @ unit(means(g_s)).T),
            "prototypes_centered": sigmoid(10 * unit(x_q) @ unit(means(x_s)).T),
            "ridge": x_q @ coefficients + y.mean(0),
        }
        assert set(scores.methods) == set(expected)
        for name, value in expected.items():
            # float32 sums in another order; logits up to 10
            np.testing.assert_allclose(scores.methods[name][e], value, atol=2e-5, err_msg=name)
        for t, threshold in enumerate(THRESHOLDS):
            kernel = variables["params"]["joint"]["a_visual"]["kernel"]
            keep = lcm_select(f[s], y, words, projection=kernel, threshold=threshold).keep
            value = classify(bound.prototypes(u, y, words, keep.reshape(len(s), -1)))
            np.testing.assert_allclose(scores.lcm[t, e], value, atol=2e-5)


def test_theta_one_half_is_base_exactly(setting):
    scores = scores_of(setting)
    np.testing.assert_array_equal(scores.lcm[0], scores.methods["base"])
    assert scores.kept[0] == 1 > scores.kept[1] > scores.kept[2]


def test_the_same_key_gives_the_same_episodes_for_any_number_of_them(setting):
    few, many = scores_of(setting, 3), scores_of(setting, 6)
    np.testing.assert_array_equal(few.labels, many.labels[:3])
    np.testing.assert_allclose(few.methods["base"], many.methods["base"][:3], atol=1e-6)  # batched differently


def test_without_mean_and_thresholds_only_base_and_words(setting):
    scores = scores_of(setting, thresholds=(), mean=None)
    assert set(scores.methods) == {"base", "zero_shot"} and scores.lcm.shape[0] == 0


def test_embedding_in_batches_keeps_order(setting):
    model, variables, split, features = setting
    rows = np.random.default_rng(1).permutation(N)
    embedded = evaluate.embed(model, variables, split.inputs, rows)
    # float32 means of halves
    np.testing.assert_allclose(embedded.globals_, features[rows].astype(np.float32).mean((1, 2)), atol=1e-6)
    assert embedded.locals_.shape == (N, 4, 8)


def test_mean_feature(setting):
    model, variables, split, features = setting
    everything = evaluate.mean_feature(model, variables, split)
    np.testing.assert_allclose(everything, features.astype(np.float64).mean((0, 1, 2)), atol=1e-6)
    assert np.isfinite(evaluate.mean_feature(model, variables, split, limit=7)).all()


def test_summary_and_table(setting):
    scores = scores_of(setting, 8)
    summary = evaluate.summarise(scores, 2)
    assert tuple(summary["methods"]) == evaluate.METHODS
    lcm = multilabel_metrics(scores.lcm[2], scores.labels)["micro_f1"]
    base = multilabel_metrics(scores.methods["base"], scores.labels)["micro_f1"]
    entry = summary["paired"]["lcm-base"]["micro_f1"]
    np.testing.assert_allclose(entry["mean"], np.mean(lcm - base))
    np.testing.assert_allclose(entry["ci95"], 1.96 * np.std(lcm - base, ddof=1) / np.sqrt(8))
    result = {"dataset": "made_up", "n_shot": 2, "episodes": 8, "theta": {"chosen": 0.6}, **summary}
    table = evaluate.results_table([result])
    for name in (*evaluate.METHODS, "chance", "lcm-base, paired", "made_up, 2-shot"):
        assert name in table
    assert f"{100 * summary['methods']['base']['macro_ap']['mean']:.1f}" in table
