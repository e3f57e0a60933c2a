"""Which regions decided, on hand-made pairs."""

import numpy as np

from mlfsic_jax.run.explain import strongest_matches


def strongest(dual, probability, pairs, **options):
    """Two support photos of 1 x 2 positions, two labels."""
    return strongest_matches(np.array(pairs), np.array(dual), np.array(probability), ["cat", "dog"], 2, **options)


def test_strongest_matches_take_each_region_once():
    pairs = [[[0.9, 0.8], [0.7, 0.1]], [[0.2, 0.3], [0.4, 0.05]]]  # [support, query region, support region]
    found = strongest([[1.0, -1.0], [0.5, 2.0]], (0.8, 0.1), pairs)
    # 0.9 takes query region 0 and photo 0's region 0; of the rest 0.5 * 0.4 is the most, above 0.1
    assert [(m.label, m.support, m.query_cell, m.support_cell) for m in found] == [
        ("cat", 0, (0, 0), (0, 0)),
        ("cat", 1, (0, 1), (0, 0)),
    ]
    np.testing.assert_allclose([m.contribution for m in found], [0.9, 0.2])


def test_regions_are_counted_row_by_row():
    pairs = np.zeros((1, 6, 6))
    pairs[0, 5, 1] = 1.0
    (found,) = strongest_matches(pairs, np.ones((1, 1)), np.array([0.9]), ["cat"], width=3)
    assert (found.query_cell, found.support_cell) == ((1, 2), (0, 1))


def test_a_label_that_no_pair_speaks_for_has_no_matches():
    assert strongest([[-1.0, 0.0], [-1.0, 0.0]], (0.8, 0.1), np.full((2, 2, 2), 0.1)) == []


def test_without_a_predicted_label_the_likeliest_is_explained():
    pairs, dual = np.full((2, 2, 2), 0.1), [[1.0, 0.0], [0.0, 1.0]]
    found = strongest(dual, (0.2, 0.3), pairs)
    assert {m.label for m in found} == {"dog"} and {m.support for m in found} == {1}
    both = strongest(dual, (0.6, 0.7), pairs)
    assert [m.label for m in both] == ["dog", "dog", "cat", "cat"]


def test_each_label_may_have_a_threshold_of_its_own():
    pairs, dual = np.full((2, 2, 2), 0.1), [[1.0, 0.0], [0.0, 1.0]]
    assert {m.label for m in strongest(dual, (0.6, 0.7), pairs, threshold=np.array([0.5, 0.9]))} == {"cat"}


def test_matches_lie_in_so_many_support_photos_at_most():
    pairs = [[[0.9, 0.1], [0.1, 0.2]], [[0.8, 0.1], [0.1, 0.7]]]
    dual = [[1.0, 0.0], [1.0, 0.0]]
    assert [m.support for m in strongest(dual, (0.9, 0.1), pairs)] == [0, 1]
    assert [m.support for m in strongest(dual, (0.9, 0.1), pairs, max_supports=1)] == [0, 0]
