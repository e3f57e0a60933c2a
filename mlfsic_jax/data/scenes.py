"""Built-in demonstration data: photo-like scenes of coloured shapes, rendered on the fly from a seed.

A label is a colour and a shape (``"red circle"``). The training labels have every colour and every shape; validation
and novel labels combine them otherwise. An image shows one to four objects: one to three with labels of its split, and
distractors whose shape or colour is not in the vocabulary. Everything is a function of seed, split and image number.
"""

import colorsys
import hashlib
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from mlfsic_jax.data.dataset import SPLITS, ImageDataset, Split

GENERATOR_VERSION = 1  # increase it when a seed renders other pixels or labels

COLOURS = {"red": 0, "yellow": 50, "green": 125, "blue": 215, "purple": 285}  # name -> hue in degrees
SHAPES = ("circle", "square", "triangle", "star")
LABELS_OF_SPLIT = {
    "train": (
        "red circle", "red triangle", "yellow square", "yellow star",
        "green circle", "green square", "blue triangle", "purple star",
    ),
    "validation": ("yellow circle", "yellow triangle", "green star", "blue circle", "blue square", "purple triangle"),
    "novel": ("red square", "red star", "green triangle", "blue star", "purple circle", "purple square"),
}  # fmt: skip
LABELS = tuple(label for split in SPLITS for label in LABELS_OF_SPLIT[split])

LABELS_PER_IMAGE = (0.85, 0.14, 0.01)  # probability of one, two and three labelled objects
MAX_OBJECTS = 4
MIN_VISIBLE = 0.6  # least visible share of an object's area
WORD_DIM = 50

_OTHER_SHAPES = ("crescent", "bar", "ring", "cross")
_NEUTRALS = ((0.0, 0.0, 0.25), (0.0, 0.0, 0.55), (0.0, 0.0, 0.9), (0.07, 0.45, 0.42), (0.1, 0.25, 0.75))  # HSV
_REACH = {"circle": 1.0, "square": 1.2, "triangle": 1.4, "star": 1.4, "bar": 1.3, "cross": 1.25}  # relative size
_LAYOUT_GRID = 40
_STREAM_LABELS, _STREAM_LAYOUT, _STREAM_PIXELS = range(3)


class Thing(NamedTuple):
    """One object of a scene, in units of the image's width."""

    label: int  # column of its label, -1 for a distractor
    shape: str  # one of ``SHAPES`` or ``_OTHER_SHAPES``
    rgb: np.ndarray  # float [3] in 0..1
    centre: tuple[float, float]  # (x, y)
    radius: float  # distance from the centre to the outermost point
    stretch: float  # ratio of its two axes
    angle: float  # rotation in radians


def load(
    *,
    image_size: int = 64,
    images_per_split: tuple[int, ...] = (1200, 400, 600),
    seed: int = 0,
    word_noise: float = 0.48,
) -> ImageDataset:
    """Describes the scenes, which do not depend on the image size (in pixels); images are rendered on demand.

    ``word_noise`` is the length of the noise in a label's word vector, relative to the sum of its colour's and its
    shape's vector: the cosine between noisy and clean vector is about 1 / sqrt(1 + word_noise**2), 0.9 by default.
    ``ValueError`` for an argument out of range.
    """
    size = _integer("image_size", image_size, 16, 1024)
    seed = _integer("seed", seed, 0, 2**32 - 1)
    if not isinstance(images_per_split, (tuple, list)) or len(images_per_split) != len(SPLITS):
        raise ValueError(f"images_per_split must be three numbers (train, validation, novel), not {images_per_split!r}")
    counts = tuple(_integer("images_per_split", n, 1, 10**6) for n in images_per_split)
    if not (isinstance(word_noise, (int, float)) and 0 <= word_noise < math.inf):
        raise ValueError(f"word_noise must be a finite number >= 0, not {word_noise!r}")

    where = [(split, i) for split, n in enumerate(counts) for i in range(n)]
    labels = np.zeros((len(where), len(LABELS)), bool)
    for row, (split, i) in enumerate(where):
        labels[row, scene_labels(seed, split, i)] = True

    def load_image(i: int) -> np.ndarray:
        """uint8 [S, S, 3]: image number i."""
        split, index = where[_integer("image number", i, 0, len(where) - 1)]
        things = layout(seed, split, index)
        return render(things, np.random.default_rng([seed, split, index, _STREAM_PIXELS]), size)

    images = np.split(np.arange(len(where), dtype=np.int32), np.cumsum(counts)[:-1])
    columns = [np.array([LABELS.index(label) for label in LABELS_OF_SPLIT[split]], np.int32) for split in SPLITS]
    identity = repr(("scenes", GENERATOR_VERSION, seed, size, counts))
    return ImageDataset(
        name="scenes",
        label_names=LABELS,
        display_names=LABELS,
        image_names=tuple(f"{SPLITS[split]}-{i:06d}" for split, i in where),
        labels=labels,
        load_image=load_image,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        splits={split: Split(*of_split) for split, *of_split in zip(SPLITS, columns, images, strict=True)},
        word_vectors=word_vectors(seed, word_noise)[0],
        notes=(
            "This is a demonstration: the images are rendered coloured shapes and the word vectors are made up.",
            "Its numbers say nothing about photos and stand beside no published ones.",
        ),
    )


def word_vectors(seed: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 [20, 50]: the labels' word vectors, and their unit-length compositions without noise."""
    rng = np.random.default_rng([seed, len(SPLITS)])
    parts = {word: rng.standard_normal(WORD_DIM) for word in (*COLOURS, *SHAPES)}
    parts = {word: v / np.linalg.norm(v) for word, v in parts.items()}
    clean = np.stack([sum(parts[word] for word in label.split()) for label in LABELS])
    clean /= np.linalg.norm(clean, axis=1, keepdims=True)
    noisy = clean + noise / math.sqrt(WORD_DIM) * rng.standard_normal(clean.shape)
    return noisy.astype(np.float32), clean.astype(np.float32)


def scene_labels(seed: int, split: int, index: int) -> np.ndarray:
    """int [1..3]: the distinct labels of one image. The first cycles through the split's labels, others are random."""
    rng = np.random.default_rng([seed, split, index, _STREAM_LABELS])
    columns = [LABELS.index(label) for label in LABELS_OF_SPLIT[SPLITS[split]]]
    first = columns.pop(index % len(columns))
    extra = rng.choice(len(LABELS_PER_IMAGE), p=LABELS_PER_IMAGE)
    return np.array([first, *rng.choice(columns, extra, replace=False)])


def layout(seed: int, split: int, index: int) -> list[Thing]:
    """The objects of one image from back to front; at least MIN_VISIBLE of each one's area is visible."""
    rng = np.random.default_rng([seed, split, index, _STREAM_LAYOUT])
    labelled = scene_labels(seed, split, index)
    wanted = [*labelled, *[-1] * rng.integers(0, MAX_OBJECTS - len(labelled) + 1)]
    ticks = (np.arange(_LAYOUT_GRID) + 0.5) / _LAYOUT_GRID
    things: list[Thing] = []
    areas: list[tuple[int, np.ndarray]] = []  # of the objects so far: whole area, mask of what is visible
    for label in rng.permutation(wanted):
        kind = _draw_kind(rng, int(label))
        radius = rng.uniform(0.15, 0.21) * _REACH.get(kind[1], 1.1)
        tilt = 0.5 if kind[1] in SHAPES else math.pi  # label shapes stand more or less upright
        while True:  # shrinks until it fits
            centre = tuple(rng.uniform(0.95 * radius, 1 - 0.95 * radius, 2).tolist())
            angle = rng.uniform(-tilt, tilt) - math.pi / 2
            thing = Thing(*kind, centre, radius, rng.uniform(0.85, 1.0), angle)
            mask = distance(thing, ticks, ticks[:, None]) < 0
            if all((visible & ~mask).sum() >= MIN_VISIBLE * whole for whole, visible in areas):
                break
            radius *= 0.98
        areas = [*((whole, visible & ~mask) for whole, visible in areas), (mask.sum(), mask)]
        things.append(thing)
    return things


def _draw_kind(rng: np.random.Generator, label: int) -> tuple[int, str, np.ndarray]:
    """Label, shape and colour of an object; a distractor (-1) has a shape or colour outside the vocabulary."""
    vivid = (rng.normal(0, 5) / 360, rng.uniform(0.72, 0.95), rng.uniform(0.7, 0.95))
    if label >= 0:
        colour, shape = LABELS[label].split()
        hue = COLOURS[colour] / 360
    else:
        hue = rng.choice(list(COLOURS.values())) / 360
        shape = str(rng.choice(_OTHER_SHAPES))
        if rng.random() < 0.6:
            shape = str(rng.choice((*SHAPES, *_OTHER_SHAPES)))
            neutral = np.array(_NEUTRALS[rng.integers(len(_NEUTRALS))]) + rng.normal(0, 0.02, 3)
            return label, shape, np.array(colorsys.hsv_to_rgb(*np.clip(neutral, 0, 1)))
    return label, shape, np.array(colorsys.hsv_to_rgb((hue + vivid[0]) % 1, *vivid[1:]))


def distance(thing: Thing, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float [H, W]: approximate distance of points x [W], y [H, 1] to the object's outline, negative inside."""
    x, y = x - thing.centre[0], y - thing.centre[1]
    c, s = math.cos(thing.angle), math.sin(thing.angle)
    x, y, r = c * x + s * y, (c * y - s * x) / thing.stretch, thing.radius
    if thing.shape == "circle":
        return np.hypot(x, y) - r
    if thing.shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72 * r) - 0.2 * r
    if thing.shape == "crescent":
        return np.maximum(np.hypot(x, y) - r, 0.85 * r - np.hypot(x - 0.6 * r, y))
    if thing.shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - r / math.sqrt(2)
    if thing.shape in ("bar", "cross"):
        x, y = np.abs(x), np.abs(y)
        bar = np.maximum(x - 0.95 * r, y - 0.27 * r)
        return bar if thing.shape == "bar" else np.minimum(bar, np.maximum(y - 0.95 * r, x - 0.27 * r))
    points, inner = (3, 0.5) if thing.shape == "triangle" else (5, 0.45)
    half = math.pi / points  # fold the plane to half a point: one edge, from the tip (r, 0) to the inner corner
    fold = np.abs((np.arctan2(y, x) + half) % (2 * half) - half)
    radius = np.hypot(x, y)
    edge = np.array([inner * math.cos(half) - 1, inner * math.sin(half)])
    edge /= np.linalg.norm(edge)
    return edge[1] * (radius * np.cos(fold) - r) - edge[0] * radius * np.sin(fold)


def render(things: list[Thing], rng: np.random.Generator, size: int) -> np.ndarray:
    """uint8 [S, S, 3]: the scene. Draws from ``rng`` depend neither on the objects nor, except for noise, on S."""
    ticks = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = ticks, ticks[:, None]
    image = _background(rng, x, y, size)
    grain = _noise(rng, 24, size)
    angle = rng.uniform(0, 2 * math.pi)
    light = (math.cos(angle), math.sin(angle))  # points to the light: shadows, shading and illumination agree
    strength = rng.uniform(0.15, 0.5)
    for thing in things:
        shadow = thing._replace(centre=(thing.centre[0] - 0.035 * light[0], thing.centre[1] - 0.035 * light[1]))
        dark = np.clip(0.5 - distance(shadow, x, y) / 0.05, 0, 1)
        image *= (1 - 0.5 * dark * dark)[..., None]
        d = distance(thing, x, y)
        alpha = np.clip(0.5 - d * size, 0, 1)
        across = ((x - thing.centre[0]) * light[0] + (y - thing.centre[1]) * light[1]) / thing.radius
        rim = np.clip(1 + d / (0.16 * thing.radius), 0, 1)  # 1 on the outline, 0 in the flat middle
        shade = 0.92 + (0.12 + 0.22 * rim) * across + 0.15 * (grain - 0.5)
        gloss = 0.35 * np.exp(-((across - 0.45) ** 2) * 30) * (1 - rim)
        surface = np.float32(thing.rgb) * shade[..., None] + gloss[..., None] * 0.4
        image += alpha[..., None] * (surface - image)
    lit = 1 + strength * 2 * ((x - 0.5) * light[0] + (y - 0.5) * light[1])
    vignette = 1 - rng.uniform(0, 0.5) * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    image *= (lit * vignette)[..., None] * np.float32(rng.uniform(0.94, 1.06, 3))
    image = 0.45 + rng.uniform(0.75, 1.1) * (image - 0.45) + rng.uniform(-0.06, 0.08)
    image += rng.uniform(0.01, 0.03) * rng.standard_normal((size, size, 3), np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _background(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """float32 [S, S, 3]: a pattern of two muted colours under patches of others."""
    hsv = np.stack([rng.random(4), rng.uniform(0.1, 0.5, 4), rng.uniform(0.25, 0.8, 4)], 1)
    hsv[1, 0] = (hsv[0, 0] + rng.normal(0, 0.06)) % 1
    tones = np.array([colorsys.hsv_to_rgb(*tone) for tone in hsv], np.float32)
    rough = 0.5 * _noise(rng, 5, size) + 0.3 * _noise(rng, 12, size) + 0.2 * _noise(rng, 32, size)
    angle, waves, pattern = rng.uniform(0, math.pi), rng.uniform(4, 11), rng.integers(4)
    points = rng.random((2, 24, 1, 1), np.float32)
    u = math.cos(angle) * x + math.sin(angle) * y + 0.12 * rough
    v = math.cos(angle) * y - math.sin(angle) * x + 0.12 * rough
    if pattern == 0:  # earth
        mix = rough
    elif pattern == 1:  # planks
        mix = 0.5 * rough + 0.25 + 0.25 * np.sin(2 * math.pi * waves * u)
    elif pattern == 2:  # checked cloth
        mix = 0.4 * rough + 0.15 * (np.sin(2 * math.pi * waves * u) > 0) + 0.15 * (np.sin(2 * math.pi * waves * v) > 0)
    else:  # cobbles
        near = np.partition((x - points[0]) ** 2 + (y - points[1]) ** 2, 1, axis=0)[:2]
        mix = 0.5 * rough + 0.5 * np.clip((np.sqrt(near[1]) - np.sqrt(near[0])) * 12, 0, 1)
    image = tones[0] + (tones[1] - tones[0]) * mix[..., None]
    for tone in tones[2:]:
        cells, softness = rng.integers(4, 15), rng.uniform(3, 12)
        patch = np.clip((_noise(rng, cells, size) - 0.7) * softness, 0, 1) * (0.5 + 0.5 * rough)
        image += patch[..., None] * (tone - image)
    return image.astype(np.float32)


def _noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """float32 [S, S]: smooth noise around 0.5, ``cells`` bumps wide."""
    grid = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def _integer(what: str, value: int, low: int, high: int) -> int:
    """The value as an int; raises ``ValueError`` unless it is one in low..high."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and low <= value <= high:
        return int(value)
    raise ValueError(f"{what} must be a whole number from {low} to {high}, not {value!r}")
