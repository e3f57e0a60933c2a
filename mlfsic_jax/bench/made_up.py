"""Data, variables and steps to time, made up in the sizes of the real ones."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict
from PIL import Image

from mlfsic_jax import backbones
from mlfsic_jax.core.episodes import sample_episodes
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data.dataset import ImageDataset
from mlfsic_jax.data.features import View
from mlfsic_jax.data.transforms import decode_photo
from mlfsic_jax.methods import METHODS
from mlfsic_jax.run.inputs import PhotoBackbone
from mlfsic_jax.run.saved import Predictor, Trained
from mlfsic_jax.run.step import Objective, create_optimizer, create_train_state, read_batch, train_steps
from mlfsic_jax.system import parallel

COCO = (26690, 52, 40000)  # images, labels and positives of its train split
SMALL = {"d_joint": 8, "n_heads": 2, "d_dynamic": 4, "n_dynamic": 4}  # the model with --quick
WORD_WIDTH = 300


def label_matrix(n_images: int, n_labels: int, n_positives: int) -> np.ndarray:
    """Bool [I, C]: a few frequent labels and many rare ones, as in COCO."""
    rng, share = np.random.default_rng(0), np.geomspace(1, 200, n_labels)
    counts = np.maximum(n_positives * share / share.sum(), 14).astype(int)
    labels = np.zeros((n_images, n_labels), bool)
    for c, count in enumerate(np.minimum(counts, n_images)):
        labels[rng.choice(n_images, count, replace=False), c] = True
    return labels


def one_label_each(n_images: int, n_labels: int) -> np.ndarray:
    """Bool [I, C]: one label an image, in turns."""
    return np.arange(n_images)[:, None] % n_labels == np.arange(n_labels)


def lcm_case(n_images: int, side: int, width: int, n_labels: int, d: int):
    """Local features as after a ReLU [S, h, w, width], labels [S, C], words [C, d], a projection [width, d]."""
    rng = np.random.default_rng(0)
    features = np.maximum(rng.standard_normal((n_images, side, side, width), np.float32), 0)
    labels = rng.random((n_images, n_labels)) < 0.1
    words, projection = (rng.standard_normal((k, d), np.float32) for k in (n_labels, width))
    return tuple(map(jnp.asarray, (features, labels, words, projection)))


def growth_case(n_images: int, n_labels: int, n_positions: int, n: int):
    """Support features [S, L, 1, n], labels, word vectors and the pooled features of 64 queries."""
    rng = np.random.default_rng(0)
    support = np.maximum(rng.standard_normal((n_images, n_positions, 1, n), np.float32), 0)
    words, queries = (rng.standard_normal((k, w), np.float32) for k, w in ((n_labels, WORD_WIDTH), (64, n)))
    return tuple(map(jnp.asarray, (support, one_label_each(n_images, n_labels), words, queries[:, None, None])))


@jax.jit
def projected(features, projection):
    """[S, h, w, n], [n, d] -> [S, h, w, d]."""
    return jnp.matmul(features, projection, precision="highest")


def prototype_work(n_labels: int, n_regions: int, d: int, d_dynamic: int) -> float:
    """Operations of a prototype's matrix products: attention there and back, similarity to the words, generators."""
    return 2.0 * n_labels * d * (3 * n_regions + 2 * d * d_dynamic)


def photo_backbone(name: str, axis_name=None) -> PhotoBackbone:
    """A backbone for photos as they are stored, without augmentation."""
    spec = backbones.BACKBONES[name]
    return PhotoBackbone(backbones.create_backbone(name, axis_name), spec.mean, spec.std)


def backbone_variables(name: str, size: int):
    """Random variables of ``photo_backbone`` for photos of ``size`` x ``size`` pixels, on this process's devices."""
    return parallel.replicate_here(random_variables(photo_backbone(name), np.zeros((1, size, size, 3), np.uint8)))


def jpegs(folder: Path, n: int) -> list[Path]:
    """Photos of the size that VOC's have: 500 x 375 pixels and 70 kB."""
    rng, paths = np.random.default_rng(0), [folder / f"{i}.jpg" for i in range(n)]
    for path in paths:
        blurred = Image.fromarray(rng.integers(0, 255, (19, 25, 3), np.uint8)).resize((500, 375))
        grainy = np.asarray(blurred) + rng.normal(0, 6, (375, 500, 1))
        Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def dataset(photos: Sequence[Path]) -> ImageDataset:
    """A dataset of photo files, of one label and no split."""
    names, labels = tuple(path.name for path in photos), np.ones((len(photos), 1), bool)
    return ImageDataset("made_up", ("a",), ("a",), names, labels, lambda i: decode_photo(photos[i], names[i]), "", {})


def class_word_model(n: int, n_classes: int) -> Predictor:
    """A model out of the box without its network: for images that are embedded, of n channels."""
    rng, name = np.random.default_rng(1), "class_word_ridge"
    leaves = {"weight": (n_classes, n), "bias": (n_classes,), "mean": (n,), "mean_logits": (n_classes,)}
    classes = {key: jnp.asarray(rng.normal(size=shape), jnp.float32) for key, shape in leaves.items()}
    trained = Trained(1, {name: METHODS[name]}, {"classes": classes}, {}, {name: (14.0, -2.6)}, {})
    return Predictor(Path(), {}, FrozenConfigDict(), None, None, 0, (1, 1), (trained,), (), Path())


def random_variables(module, *arguments):
    """Variables of fan-in scale; compiling the module's own initialisers takes longer than all else."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim < 2:
            return jnp.full(leaf.shape, float(path[-1].key in ("scale", "var")))
        scale = np.float32(math.prod(leaf.shape[:-1]) ** -0.5)
        return jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(module.init, jax.random.key(0), *arguments))


def view(inputs: Callable[[np.ndarray], np.ndarray], labels: np.ndarray) -> View:
    """A split with random words."""
    words = np.random.default_rng(1).standard_normal((labels.shape[1], WORD_WIDTH), np.float32)
    return View(inputs, labels, words, tuple(map(str, range(labels.shape[1]))))


def training_step(model: BaseModel, split: View):
    """(a function that trains on the next episode, first parameters without the backbone's, an episode's ``Batch``).

    Episodes of 1 shot and 4 queries a label are drawn beforehand, as training draws an epoch's at once.
    """
    objective = Objective(model, create_optimizer(1e-4, 1, 1000, "cosine")[0])
    state = create_train_state(jax.random.key(1), model, split, objective.optimizer)
    key, state = parallel.replicate((jax.random.key(0), state))
    params = {name: jax.device_get(tree) for name, tree in state.params.items() if name != "backbone"}
    drawn = sample_episodes(jax.random.key(2), split.labels, n_episodes=16, n_shot=1, n_query=4)
    episodes = itertools.cycle(zip(*map(np.asarray, drawn), strict=True))
    shared = jax.device_count() == 1  # one episode a step

    def step():
        nonlocal state
        batch = read_batch(split, *(rows[None, None] for rows in next(episodes)))
        state, losses = train_steps(state, key, batch, split.word_vectors, objective, shared=shared)
        return losses

    return step, params, read_batch(split, *next(episodes))
