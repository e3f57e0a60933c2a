"""The demonstration scenes: pure in the seed, leak free, feasible to sample, and showing what the labels say."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from mlfsic_jax.data import scenes
from mlfsic_jax.data.dataset import SPLITS

SIZES = {"train": 8, "validation": 6, "novel": 6}


@pytest.fixture(scope="module")
def dataset():
    return scenes.load()


def draw_queries(labels: np.ndarray, rng: np.random.Generator, shots: int = 5, queries: int = 4) -> np.ndarray:
    """The query images of one episode: `labels` bool [I, C] -> int [C * queries], after the supports were taken."""
    free = np.ones(len(labels), bool)
    for need in (shots, queries):
        drawn = []
        for c in rng.permutation(labels.shape[1]):
            picked = rng.choice(np.flatnonzero(labels[:, c] & free), need, replace=False)
            free[picked] = False
            drawn.extend(picked)
    return np.array(drawn)


def things_of(dataset, i: int) -> list[scenes.Thing]:
    split, number = dataset.image_names[i].split("-")
    return scenes.layout(0, SPLITS.index(split), int(number))


def test_image_is_uint8_and_square(dataset):
    image = dataset.load_image(3)
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
    assert scenes.load(image_size=33, images_per_split=(1, 1, 1)).load_image(2).shape == (33, 33, 3)


def test_same_seed_same_everything_in_any_order(dataset):
    again = scenes.load()
    rows = [5, 2199, 0, 1300]
    forward = {i: dataset.load_image(i) for i in rows}
    for i in reversed(rows):
        np.testing.assert_array_equal(again.load_image(i), forward[i])
        np.testing.assert_array_equal(dataset.load_image(np.int32(i)), forward[i])
    np.testing.assert_array_equal(again.labels, dataset.labels)
    np.testing.assert_array_equal(again.word_vectors, dataset.word_vectors)
    assert again.fingerprint == dataset.fingerprint and again.image_names == dataset.image_names


def test_an_image_does_not_depend_on_the_counts(dataset):
    few = scenes.load(images_per_split=(10, 10, 10))
    i = few.image_names.index("novel-000004")
    j = dataset.image_names.index("novel-000004")
    np.testing.assert_array_equal(few.load_image(i), dataset.load_image(j))
    np.testing.assert_array_equal(few.labels[i], dataset.labels[j])


def test_a_larger_image_shows_the_same_scene(dataset):
    large = scenes.load(image_size=128)
    for i in (0, 1700):
        pooled = large.load_image(i).reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(pooled - dataset.load_image(i)).mean() < 10


def test_other_seeds_and_sizes_differ(dataset):
    other = scenes.load(seed=1)
    assert np.abs(other.load_image(0).astype(int) - dataset.load_image(0)).mean() > 5
    assert (other.labels != dataset.labels).any()
    assert not np.allclose(other.word_vectors, dataset.word_vectors)
    sizes = [scenes.load(image_size=32), scenes.load(images_per_split=(1200, 400, 601))]
    assert len({d.fingerprint for d in (dataset, other, *sizes)}) == 4


def test_images_differ_across_index_and_split(dataset):
    firsts = [dataset.load_image(int(dataset.splits[s].images[k])).tobytes() for s in SPLITS for k in range(5)]
    assert len(set(firsts)) == 15


def test_split_of_the_labels(dataset):
    columns = np.concatenate([dataset.splits[s].labels for s in SPLITS])
    assert sorted(columns) == list(range(20)) == list(range(len(set(dataset.label_names))))
    assert {s: len(dataset.splits[s].labels) for s in SPLITS} == SIZES
    assert set(dataset.label_names) == {f"{c} {s}" for c in scenes.COLOURS for s in scenes.SHAPES}
    train_words = {word for label in scenes.LABELS_OF_SPLIT["train"] for word in label.split()}
    assert train_words == {*scenes.COLOURS, *scenes.SHAPES}
    assert dataset.display_names == dataset.label_names


def test_images_carry_labels_of_their_own_split_only(dataset):
    rows = np.concatenate([dataset.splits[s].images for s in SPLITS])
    np.testing.assert_array_equal(rows, np.arange(2200))
    assert len(set(dataset.image_names)) == 2200 and dataset.image_names[17] == "train-000017"
    assert dataset.labels.dtype == bool and dataset.labels.shape == (2200, 20)
    for split in SPLITS:
        own = dataset.split_labels(split)
        assert own.sum() == dataset.labels[dataset.splits[split].images].sum()
        assert own.any(1).all()
        assert 1 <= own.sum(1).mean() <= 2
        assert own.sum(0).min() >= 5 + 4


def test_even_small_splits_serve_an_episode():
    small = scenes.load(images_per_split=(160, 120, 120))
    for split in SPLITS:
        queries = draw_queries(small.split_labels(split), np.random.default_rng(0))
        assert len(set(queries.tolist())) == 4 * SIZES[split]


def test_one_to_four_objects_as_labelled_and_visible(dataset):
    ticks = (np.arange(100) + 0.5) / 100
    counts = []
    for i in range(0, 2200, 5):
        things = things_of(dataset, i)
        counts.append(len(things))
        assert sorted(t.label for t in things if t.label >= 0) == list(np.flatnonzero(dataset.labels[i]))
        masks = [scenes.distance(t, ticks, ticks[:, None]) < 0 for t in things]
        for k, thing in enumerate(things):
            visible = masks[k] & ~np.any([np.zeros_like(masks[0]), *masks[k + 1 :]], axis=0)
            assert visible.sum() >= 0.5 * masks[k].sum()
            if thing.label >= 0:
                assert 0.03 < masks[k].mean() < 0.16
                assert thing.shape == dataset.label_names[thing.label].split()[1]
    assert set(counts) == {1, 2, 3, 4}


def test_a_distractor_has_no_label(dataset):
    for i in range(0, 2200, 5):
        for thing in things_of(dataset, i):
            if thing.label < 0 and thing.shape in scenes.SHAPES:
                assert colorsys.rgb_to_hsv(*thing.rgb)[1] < 0.6  # neutral: every label's colour is more vivid


def test_chance_is_well_below_a_third(dataset):
    rng = np.random.default_rng(0)
    for split in SPLITS:
        labels = dataset.split_labels(split)
        scores = []
        for _ in range(60):
            truth = labels[draw_queries(labels, rng)]
            noise = rng.random(truth.shape)
            scores.append(np.mean([average_precision_score(t, s) for t, s in zip(truth.T, noise.T, strict=True)]))
        assert np.mean(scores) < 0.35


def test_a_labelled_object_shows_its_colour(dataset):
    """Where a rendering with the object differs from one without it, the typical hue is the label's."""
    right, total = 0, 0
    for i in range(0, 2200, 12):
        things = things_of(dataset, i)
        for thing in (t for t in things if t.label >= 0):
            alone, without = (scenes.render(shown, np.random.default_rng(i), 64) for shown in ([thing], []))
            inside = np.abs(alone.astype(int) - without).sum(2) > 30
            ticks = (np.arange(64) + 0.5) / 64
            inside &= scenes.distance(thing, ticks, ticks[:, None]) < 0
            assert inside.mean() > 0.02
            hue = 360 * colorsys.rgb_to_hsv(*np.median(alone[inside], 0))[0]
            wanted = dataset.label_names[thing.label].split()[0]
            gaps = {colour: abs((hue - base + 180) % 360 - 180) for colour, base in scenes.COLOURS.items()}
            right, total = right + (min(gaps, key=gaps.__getitem__) == wanted), total + 1
    assert right / total > 0.98


def test_word_vectors_lean_on_their_attributes(dataset):
    def cosines(noise):
        noisy, clean = scenes.word_vectors(0, noise)
        return (noisy * clean).sum(1) / np.linalg.norm(noisy, axis=1)

    assert dataset.word_vectors.shape == (20, 50) and dataset.word_vectors.dtype == np.float32
    np.testing.assert_array_equal(dataset.word_vectors, scenes.word_vectors(0, 0.48)[0])
    assert 0.87 < cosines(0.48).mean() < 0.93
    np.testing.assert_allclose(cosines(0.0), 1, atol=1e-5)
    assert cosines(2.0).mean() < 0.6
    assert np.isfinite(dataset.word_vectors).all()


def test_notes_say_it_is_a_demonstration(dataset):
    assert dataset.name == "scenes"
    assert "demonstration" in " ".join(dataset.notes) and "nothing about photos" in " ".join(dataset.notes)


@pytest.mark.parametrize(
    "arguments",
    [
        {"image_size": 0},
        {"image_size": 64.0},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": True},
        {"images_per_split": (10, 10)},
        {"images_per_split": 10},
        {"images_per_split": (10, 0, 10)},
        {"word_noise": -0.1},
        {"word_noise": float("nan")},
        {"word_noise": "some"},
    ],
)
def test_bad_arguments_are_one_clear_line(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))) as error:
        scenes.load(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("i", [-1, 2200, 0.5])
def test_bad_image_numbers(dataset, i):
    with pytest.raises(ValueError, match="image number"):
        dataset.load_image(i)
