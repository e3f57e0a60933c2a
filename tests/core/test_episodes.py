"""Episodes: valid, reproducible, and distributed as the documented procedure says."""

import collections
import fractions
import itertools
import json
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from mlfsic_jax import Episode, sample_episode
from mlfsic_jax.core.episodes import InfeasibleEpisode, sample_episodes, sample_laso_support

KEY = jax.random.key(0)


def random_labels(n_images=40, n_labels=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random((n_images, n_labels)) < 0.35
    labels[: 10 * n_labels] |= np.tile(np.eye(n_labels, dtype=bool), (10, 1))  # every label has ten images at least
    return labels


LABELS = random_labels()


def check(episode, labels, n_shot, n_query):
    """What every episode promises, image by image; ``episode`` may have a leading axis of episodes."""
    labels, n_labels = np.asarray(labels), labels.shape[1]
    assert isinstance(episode, Episode)
    assert episode.support.dtype == episode.query.dtype == jnp.int32
    supports, queries = np.atleast_2d(episode.support), np.atleast_2d(episode.query)
    assert supports.shape[1:] == (n_labels * n_shot,) and queries.shape[1:] == (n_labels * n_query,)
    for support, query in zip(supports, queries, strict=True):
        for c in range(n_labels):  # label-major
            for image in [*support[c * n_shot : (c + 1) * n_shot], *query[c * n_query : (c + 1) * n_query]]:
                assert 0 <= image < len(labels) and labels[image, c]
        drawn = [*support.tolist(), *query.tolist()]
        assert len(set(drawn)) == len(drawn)  # no image twice, support and query disjoint


@pytest.mark.parametrize(("n_shot", "n_query"), [(1, 4), (5, 2)])
def test_episodes_are_valid(n_shot, n_query):
    check(sample_episodes(KEY, LABELS, n_episodes=30, n_shot=n_shot, n_query=n_query), LABELS, n_shot, n_query)


def test_eager_jit_and_vmap_give_the_same_episode():
    draw = lambda key: sample_episode(key, LABELS, n_shot=2, n_query=3)  # noqa: E731
    keys = jax.random.split(KEY, 3)
    one_by_one = jax.tree.map(lambda *x: jnp.stack(x), *map(draw, keys))
    check(one_by_one, LABELS, 2, 3)
    chex.assert_trees_all_equal(one_by_one, jax.jit(jax.vmap(draw))(keys))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], one_by_one), jax.jit(draw)(keys[1]))
    assert len(np.unique(one_by_one.support, axis=0)) == 3


def test_64_bit_types_change_no_episode():
    expected = sample_episodes(KEY, LABELS, n_episodes=5, n_shot=2, n_query=3)
    laso = sample_laso_support(KEY, LABELS, n_shot=2)
    with jax.enable_x64(True):
        found = sample_episodes(KEY, LABELS, n_episodes=5, n_shot=2, n_query=3)
        np.testing.assert_array_equal(sample_laso_support(KEY, LABELS, n_shot=2), laso)
    check(found, LABELS, 2, 3)
    chex.assert_trees_all_equal(found, expected)


def test_many_episodes_are_single_ones_with_folded_keys():
    many = sample_episodes(KEY, LABELS, n_episodes=18, n_shot=2, n_query=3)
    assert many.support.shape == (18, 8) and many.query.shape == (18, 12)
    for i in range(18):
        one = sample_episode(jax.random.fold_in(KEY, i), LABELS, n_shot=2, n_query=3)
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], many), one)


@pytest.mark.parametrize(("platform", "at_once"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_accelerators_draw_many_episodes_at_once(platform, at_once):
    draw = jax.jit(lambda key: sample_episodes(key, LABELS, n_episodes=7, n_shot=2, n_query=3))
    program = draw.trace(KEY).lower(lowering_platforms=(platform,)).as_text()
    assert (f"tensor<7x{len(LABELS)}xi1>" in program) == at_once  # the free images of all episodes


def test_the_numbers_drawn_for_a_key_stay_the_same():
    """Episodes are named by their keys: results in the README and in people's papers depend on these very draws."""
    label, image = np.nonzero(LABELS.T)
    n_entries, n_labels = len(label), LABELS.shape[1]
    for seed in range(5):
        key = jax.random.key(seed)
        bits = np.asarray(jax.random.bits(jax.random.fold_in(key, 0), (n_entries + 2 * n_labels,)))
        taken, expected = [], []
        for take, phase in ((2, bits[n_entries : n_entries + n_labels]), (3, bits[n_entries + n_labels :])):
            drawn = {}
            for c in np.argsort(phase):
                own = np.flatnonzero(label == c)
                in_order = image[own[np.argsort(bits[own])]]
                drawn[c] = [i for i in in_order if i not in taken][:take]
                taken += drawn[c]
            expected.append(np.concatenate([drawn[c] for c in range(n_labels)]))
        got = sample_episode(key, LABELS, n_shot=2, n_query=3)
        np.testing.assert_array_equal(got.support, expected[0])
        np.testing.assert_array_equal(got.query, expected[1])


def test_reproducible_whatever_the_type_of_the_labels():
    one = sample_episode(KEY, LABELS, n_shot=1, n_query=1)
    for labels in (LABELS.copy(), LABELS.astype(np.float32), jnp.asarray(LABELS), LABELS.astype(int).tolist()):
        chex.assert_trees_all_equal(one, sample_episode(KEY, labels, n_shot=np.int64(1), n_query=1))
    other = sample_episode(jax.random.key(1), LABELS, n_shot=1, n_query=1)
    assert (other.support != one.support).any() and (other.query != one.query).any()


def test_labels_changed_in_place_are_seen():
    labels = np.zeros((12, 2), bool)
    labels[:6, 0] = labels[6:, 1] = True
    check(sample_episode(KEY, labels, n_shot=2, n_query=2), labels, 2, 2)
    labels[:] = ~labels
    check(sample_episode(KEY, labels, n_shot=2, n_query=2), labels, 2, 2)


def test_a_single_labels_draw_is_uniform():
    labels = np.zeros((15, 1), bool)
    images = np.delete(np.arange(15), [0, 6, 14])
    labels[images] = True
    drawn = sample_episodes(KEY, labels, n_episodes=6600, n_shot=1, n_query=1)
    pairs = np.zeros((15, 15), int)
    np.add.at(pairs, (np.asarray(drawn.support)[:, 0], np.asarray(drawn.query)[:, 0]), 1)
    assert pairs.sum() == pairs[np.ix_(images, images)].sum() and np.trace(pairs) == 0
    # All ordered pairs equally likely, 50 of each expected. The seed is fixed, so the test either holds or not.
    assert chisquare([pairs[i, j] for i in images for j in images if i != j]).pvalue > 0.01
    assert chisquare(pairs.sum(axis=1)[images]).pvalue > 0.01
    assert chisquare(pairs.sum(axis=0)[images]).pvalue > 0.01


def exact_distribution(images):
    """Probability of each (support, query) for one image each, by walking through all turns of the procedure."""
    outcomes = collections.Counter()

    def turns(turns_left, drawn, probability):
        if not turns_left:
            outcomes[tuple(drawn[turn] for turn in sorted(drawn))] += probability
            return
        turn, *rest = turns_left
        free = [i for i in images[turn[1]] if i not in drawn.values()]
        for image in free:  # none free: this attempt is thrown away
            turns(rest, {**drawn, turn: image}, probability / len(free))

    orders = list(itertools.permutations(range(len(images))))
    for first, second in itertools.product(orders, orders):
        walk = [(0, c) for c in first] + [(1, c) for c in second]
        turns(walk, {}, fractions.Fraction(1, len(orders) ** 2))
    total = sum(outcomes.values())
    return {outcome: float(p / total) for outcome, p in outcomes.items()}, float(total)


@pytest.mark.parametrize("images", [({0, 1, 2}, {1, 2, 3}), ({0, 1, 2, 3}, {2, 3, 4})])
def test_two_overlapping_labels_follow_the_documented_procedure(images):
    expected, success = exact_distribution(images)
    assert success < 1  # some attempts run out of images
    labels = np.array([[i in images[c] for c in (0, 1)] for i in range(max(images[1]) + 1)])
    n = 8000
    drawn = sample_episodes(jax.random.key(7), labels, n_episodes=n, n_shot=1, n_query=1)
    counts = collections.Counter(map(tuple, np.concatenate([drawn.support, drawn.query], axis=1).tolist()))
    assert set(counts) <= set(expected)
    outcomes = sorted(expected)
    assert chisquare([counts[o] for o in outcomes], [n * expected[o] for o in outcomes]).pvalue > 0.01


def test_exactly_enough_images_always_succeeds():
    # Label c has images 0 .. 2c + 1, in a shuffled numbering: its own must be 2c and 2c + 1, and a walk in a random
    # order almost never finds that.
    n_labels, rng = 9, np.random.default_rng(0)
    numbering = rng.permutation(2 * n_labels)
    labels = np.zeros((2 * n_labels, n_labels), bool)
    for c in range(n_labels):
        labels[numbering[: 2 * c + 2], c] = True
    drawn = sample_episodes(KEY, labels, n_episodes=20, n_shot=1, n_query=1)
    check(drawn, labels, 1, 1)
    for support, query in zip(np.asarray(drawn.support), np.asarray(drawn.query), strict=True):
        for c in range(n_labels):
            assert {support[c], query[c]} == set(numbering[2 * c : 2 * c + 2])


@settings(max_examples=60)
@given(st.permutations(range(30)))
def test_feasible_is_drawn_and_infeasible_is_refused_with_the_reason(order):
    # Three labels on ten images, always 11 positives (one compiled program), two images needed for each label.
    labels = np.zeros(30, bool)
    labels[order[:11]] = True
    labels = labels.reshape(10, 3)
    subsets = [list(s) for r in (1, 2, 3) for s in itertools.combinations(range(3), r)]
    feasible = all(labels[:, s].any(axis=1).sum() >= 2 * len(s) for s in subsets)  # Hall's theorem
    if feasible:
        return check(sample_episode(KEY, labels, n_shot=1, n_query=1), labels, 1, 1)
    with pytest.raises(InfeasibleEpisode) as caught:
        sample_episode(KEY, labels, n_shot=1, n_query=1)
    error = caught.value
    assert error.need == 2 and error.counts == [labels[:, c].sum() for c in error.labels]
    assert error.images == labels[:, error.labels].any(axis=1).sum() < 2 * len(error.labels)


def test_two_labels_that_share_nine_images_are_refused_by_name():
    labels = np.zeros((40, 3), bool)
    labels[:9, 0] = labels[:9, 2] = labels[9:, 1] = True
    with pytest.raises(ValueError) as caught:
        sample_episode(KEY, labels, n_shot=5, n_query=4)
    message = str(caught.value)
    for part in ("label 0 (9 images)", "label 2 (9 images)", "9 distinct images together", "9 images a label", "18"):
        assert part in message
    assert "label 1" not in message
    assert "dog (9 images), cat (9 images)" in caught.value.describe(["dog", "cat"])
    with pytest.raises(ValueError, match="label 2"):
        jax.jit(lambda key: sample_episode(key, labels, n_shot=5, n_query=4))(KEY)
    labels[9:18, 2] = True  # enough for both
    check(sample_episode(KEY, labels, n_shot=5, n_query=4), labels, 5, 4)


def test_a_rare_and_an_absent_label_are_refused():
    labels = np.ones((30, 3), bool)
    labels[4:, 1] = False
    with pytest.raises(ValueError, match=r"label 1 \(4 images\).*needs 5 images"):
        sample_episode(KEY, labels, n_shot=1, n_query=4)
    labels[:, 1] = False
    with pytest.raises(ValueError, match=r"label 1 \(0 images\).*needs 2 images"):
        sample_episodes(KEY, labels, n_episodes=2, n_shot=1, n_query=1)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_traced_labels_are_a_type_error(transform):
    with pytest.raises(TypeError, match="concrete"):
        transform(lambda labels: sample_episode(KEY, labels, n_shot=1, n_query=1))(jnp.asarray(LABELS))


@pytest.mark.parametrize(
    "labels", [LABELS[0], LABELS[None], np.zeros((0, 3)), np.zeros((3, 0)), LABELS * 2, LABELS - 1.0, LABELS * np.nan]
)
def test_malformed_labels_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be"):
        sample_episode(KEY, labels, n_shot=1, n_query=1)


@pytest.mark.parametrize("count", [0, -1, 1.0, "1", True, None])
def test_malformed_counts_are_refused(count):
    for name in ("n_shot", "n_query"):
        with pytest.raises(ValueError, match=name):
            sample_episode(KEY, LABELS, **{"n_shot": 1, "n_query": 1, name: count})


def test_new_keys_do_not_recompile(caplog):
    labels = random_labels(23, 2)  # a shape of its own: the first draw traces and compiles

    def compilations(key):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            sample_episode(key, labels, n_shot=1, n_query=2)
        return sum("Compiling" in record.getMessage() for record in caplog.records)

    keys = [jax.random.key(i) for i in range(4)]
    assert compilations(keys[0]) > 0
    assert [compilations(key) for key in keys[1:]] == [0, 0, 0]


def test_one_trace_under_jit():
    draw = jax.jit(chex.assert_max_traces(lambda key: sample_episode(key, LABELS, n_shot=1, n_query=1), n=1))
    for i in range(3):
        check(draw(jax.random.key(i)), LABELS, 1, 1)


@pytest.fixture(scope="module")
def coco(shared):
    with np.load(shared / "data" / "coco2014_labels80.npz") as archive:
        labels, names = archive["labels"].astype(bool), archive["names"].tolist()
    return labels, names, json.loads((shared / "data" / "splits.json").read_text(encoding="utf-8"))["coco"]


def test_all_of_coco(coco):
    labels, _, _ = coco
    assert labels.shape == (122218, 80)
    check(sample_episodes(KEY, labels, n_episodes=2, n_shot=5, n_query=4), labels, 5, 4)


@pytest.mark.parametrize(("split", "n_images", "n_labels"), [("train", 26690, 52), ("novel", 3934, 16)])
def test_splits_of_coco(coco, split, n_images, n_labels):
    labels, names, splits = coco
    columns = [names.index(name) for name in splits[split]]
    inside = labels[:, columns]
    inside = inside[inside.any(axis=1) & ~np.delete(labels, columns, axis=1).any(axis=1)]
    assert inside.shape == (n_images, n_labels)
    check(sample_episodes(KEY, inside, n_episodes=5, n_shot=5, n_query=4), inside, 5, 4)


@pytest.mark.parametrize("n_shot", [1, 3])
def test_lasos_support_has_k_images_per_label_where_that_is_possible(n_shot):
    rng = np.random.default_rng(0)
    alone = np.repeat(np.eye(5, dtype=bool), 10, axis=0)  # images of one label: K per label can be met exactly
    labels = np.concatenate([alone, rng.random((100, 5)) < 0.3])
    sizes = set()
    for seed in range(20):
        support = sample_laso_support(jax.random.key(seed), labels, n_shot=n_shot)
        assert len(set(support.tolist())) == len(support) and support.dtype == np.int32
        assert labels[support].sum(axis=0).tolist() == [n_shot] * 5
        sizes.add(len(support))
    assert len(sizes) > 1 and max(sizes) <= 5 * n_shot
    again = sample_laso_support(jax.random.key(7), labels, n_shot=n_shot)
    np.testing.assert_array_equal(again, sample_laso_support(jax.random.key(7), labels, n_shot=n_shot))


def test_lasos_support_overshoots_least_where_it_must():
    labels = np.random.default_rng(1).random((30, 4)) < 0.6  # few images of one label
    for seed in range(10):
        support = sample_laso_support(jax.random.key(seed), labels, n_shot=3)
        counts, free = [0] * 4, set(range(30))
        for image in support.tolist():  # a replay of the rule, image by image
            serves = [c for c in range(4) if counts[c] == min(counts) and labels[image, c]]

            def overshoot(i, counts=counts):
                return sum(max(counts[c] + 1 - 3, 0) for c in range(4) if labels[i, c])

            assert any(overshoot(image) == min(overshoot(i) for i in free if labels[i, c]) for c in serves)
            free.remove(image)
            counts = [n + int(has) for n, has in zip(counts, labels[image], strict=True)]
        assert min(counts) >= 3 and counts == labels[support].sum(axis=0).tolist()


def test_lasos_support_needs_k_images_of_every_label():
    labels = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
    with pytest.raises(InfeasibleEpisode, match=r"label 2 \(1 images\).*needs 2 images a label"):
        sample_laso_support(jax.random.key(0), labels, n_shot=2)
