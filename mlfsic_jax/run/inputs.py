"""From a config to what training and evaluation work on: photos or cached features, labels, words, a model."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mlfsic_jax import backbones, data
from mlfsic_jax.backbones import clip_text
from mlfsic_jax.backbones import weights as pretrained
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data import class_words, laso_episodes
from mlfsic_jax.data.assets import local_weights
from mlfsic_jax.data.features import Cache, View, open_or_build, usable_splits
from mlfsic_jax.data.minilm import encode_texts, unread_texts
from mlfsic_jax.data.prepared import digest
from mlfsic_jax.data.transforms import augment, normalise
from mlfsic_jax.data.words import default_path, how_to_get, load_word_vectors
from mlfsic_jax.run.config import create_model
from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import expand

_BATCH = 32  # photos on a GPU or TPU; the most on a core
_LAYER_BYTES = 8 * 2**20  # of a batch: with the inputs of its layer, about a core's share of the last cache
# In the data folder or an exported one: the folders of the sentence encoder and of CLIP's tokenizer, and in the latter
# the word vectors.
ENCODER, CLIP, WORDS = "minilm", "clip", "words.safetensors"


class Inputs(NamedTuple):
    """Everything a run works on."""

    model: BaseModel  # with its backbone where that is trained
    splits: dict[str, View]  # "train", "validation", "novel"
    base: View  # the images and labels that the closed-form model is fitted on
    pretrained: dict | None  # variables of a backbone that is trained, to start from; None: random
    identity: dict[str, str]  # what the results depend on besides the config: hashes of data, weights and word vectors


class PhotoBackbone(nn.Module):
    """A backbone that takes photos as they are stored: uint8 [B, H, W, 3] -> float32 [B, h, w, n].

    In training it may augment them (rng "augment").
    """

    network: nn.Module
    mean: tuple[float, float, float]  # of normalised photos, by channel
    std: tuple[float, float, float]  # likewise
    augment: bool = False  # in training
    dtype: str = "float32"  # what the network computes in; its parameters and batch statistics stay float32
    freeze_batch_norm: bool = False  # keep its batch statistics in training

    @nn.compact
    def __call__(self, photos, train: bool = False):
        photos = photos.astype(jnp.float32) / 255
        if train and self.augment:
            photos = augment(self.make_rng("augment"), photos)
        photos, train = normalise(photos, self.mean, self.std), train and not self.freeze_batch_norm
        if self.dtype == "float32" or self.is_initializing():
            return self.network(photos, train)
        cast = functools.partial(jax.tree.map, lambda x: x.astype(self.dtype))
        compute = nn.map_variables(lambda network, x: network(x, train), "params", trans_in_fn=cast)
        return compute(self.network, cast(photos)).astype(jnp.float32)


def load(config: ConfigDict) -> Inputs:
    """Loads data and words, prints the data card, and fills the cache.

    ``InputError`` when something is missing or does not fit; all missing files are named in one message.
    """
    dataset = load_dataset(config)
    words = dataset.word_vectors
    if config.labels.embedding != "dataset":
        words = load_word_vectors(vectors_path(config), dataset.label_names, dataset.display_names)
    elif words is None:
        raise InputError(f"dataset {dataset.name} brings no word vectors: set config.labels.embedding=glove")
    backbone, weights, weights_hash = load_backbone(config, parallel.EPISODE_AXES)
    if config.train_backbone:
        cache = photo_cache(config, dataset)
    else:
        cache = feature_cache(config, dataset, backbone, weights, weights_hash)

    encoder = text_encoder(config)

    def view(images: np.ndarray, labels: np.ndarray, support: np.ndarray | None = None) -> View:
        return View(
            inputs=lambda rows: cache.read(images[rows]),
            labels=dataset.labels[np.ix_(images, labels)],
            word_vectors=words[labels],
            label_names=tuple(dataset.label_names[c] for c in labels),
            support=support,
            head=functools.cache(lambda: classifier_head(config)),
            named_vectors=functools.cache(
                lambda source: class_mixtures(source, [[dataset.display_names[c]] for c in labels], encoder)
            ),
        )

    usable = usable_splits(dataset, cache)
    splits = {name: view(split.images, split.labels, split.support) for name, split in usable.items()}
    fit_on = [usable[name] for name in config.ridge.fit_on]
    base = view(*(np.concatenate(parts) for parts in ([s.images for s in fit_on], [s.labels for s in fit_on])))
    model = create_model(config, backbone if config.train_backbone else None)
    identity = {
        "dataset": dataset.fingerprint,
        "splits": digest([(name, s.labels.tolist(), s.images.tolist()) for name, s in sorted(dataset.splits.items())]),
        "weights": weights_hash,
        "word_vectors": digest([np.ascontiguousarray(words).tobytes()]),
    }
    return Inputs(model, splits, base, weights if config.train_backbone else None, identity)


def feature_views(run: Inputs, variables: dict | None = None) -> dict[str, View]:
    """The splits "train", "validation", "novel", and "base", with local features for inputs: float [B, h, w, n].

    ``variables`` are those of the trained model, whose backbone computes the features; a frozen one needs none.
    """
    views = run.splits | {"base": run.base}
    if run.model.backbone is None:
        return views
    own = parallel.replicate_here(backbone_variables(variables))

    def features(view: View, rows: np.ndarray) -> np.ndarray:
        return features_of(run.model.backbone, own, view.inputs(rows))

    return {name: view._replace(inputs=functools.partial(features, view)) for name, view in views.items()}


def backbone_variables(variables: dict) -> dict:
    """The part of a model's variables that is its backbone's."""
    return {name: tree["backbone"] for name, tree in variables.items() if "backbone" in tree}


@functools.partial(jax.jit, static_argnums=(0, 3))
def backbone_features(backbone: PhotoBackbone, variables, photos, dtype: str = "float32"):
    """Photos uint8 [B, H, W, 3] -> local features [B, h, w, n]."""
    return backbone.apply(variables, photos).astype(dtype)


def features_here(backbone: PhotoBackbone, variables, dtype: str, photos: np.ndarray) -> jax.Array:
    """``backbone_features`` of ``batch_size`` photos by ``parallel.devices_here``, where ``variables`` are."""
    return backbone_features(backbone, variables, parallel.shard_here(photos), dtype)


def features_of(backbone: PhotoBackbone, variables, photos: np.ndarray) -> np.ndarray:
    """``features_here`` of any number of photos, 1 at least."""
    batch = batch_size(backbone, photos.shape[1])

    def compute(some: list[np.ndarray]) -> np.ndarray:
        filled = np.stack(some + some[:1] * (batch - len(some)))
        return np.asarray(features_here(backbone, variables, "float32", filled))[: len(some)]

    return np.concatenate(list(parallel.prefetch_batches(compute, photos, batch)))


def batch_size(backbone: PhotoBackbone, size: int) -> int:
    """How many photos of ``size`` x ``size`` pixels go through a backbone together; the features do not depend on it.

    On a CPU, where each core has a batch of its own, so many that the outputs of the largest layer take
    ``_LAYER_BYTES``: what leaves the caches is two to three times as slow.
    """
    if jax.default_backend() != "cpu":
        return _BATCH * len(parallel.devices_here())
    return max(1, min(_BATCH, _LAYER_BYTES // shapes(backbone, size).layer_bytes))


class Shapes(NamedTuple):
    """What a backbone makes of a photo."""

    photo: jax.ShapeDtypeStruct  # uint8 [1, H, W, 3]
    features: jax.ShapeDtypeStruct  # [1, h, w, n]
    variables: dict[str, Any]  # of ShapeDtypeStructs
    layer_bytes: int  # of the largest output of a layer


@functools.cache
def shapes(backbone: PhotoBackbone, size: int) -> Shapes:
    """Traces a backbone for photos of ``size`` x ``size`` pixels, which takes half a second."""
    init = functools.partial(backbone.init_with_output, capture_intermediates=True)
    photo = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    features, variables = jax.eval_shape(init, jax.random.key(0), photo)
    layers = jax.tree.leaves(variables.pop("intermediates"))
    return Shapes(photo, features, variables, max(layer.size * layer.dtype.itemsize for layer in layers))


def feature_cache(
    config: ConfigDict, dataset: data.ImageDataset, backbone: PhotoBackbone, weights, weights_hash: str
) -> Cache:
    """The dataset's local features by a frozen backbone."""
    size, dtype = image_size(config), "float16"
    normalisation = {"mean": list(backbone.mean), "std": list(backbone.std)}
    made_from = {"backbone": config.backbone, "weights": weights_hash, "normalisation": normalisation}
    if backbone.dtype != "float32":
        made_from["computed_in"] = backbone.dtype
    return open_or_build(
        dataset,
        cache_dir=expand(config.cache_dir),
        image_size=size,
        row_shape=shapes(backbone, size).features.shape[1:],
        dtype=dtype,
        made_from=made_from,
        compute=functools.partial(features_here, backbone, parallel.replicate_here(weights), dtype),
        batch=batch_size(backbone, size),
    )


def photo_cache(config: ConfigDict, dataset: data.ImageDataset) -> Cache:
    """The dataset's photos, resized."""
    size = image_size(config)
    kind = {"row_shape": (size, size, 3), "dtype": "uint8", "made_from": {"backbone": "photos"}}
    return open_or_build(dataset, cache_dir=expand(config.cache_dir), image_size=size, **kind)


def image_size(config: ConfigDict) -> int:
    """Side of the square that photos are resized to, in pixels."""
    return config.data.image_size or backbones.BACKBONES[config.backbone].image_size


def compute_dtype(config: ConfigDict) -> str:
    """What the backbone computes in: bfloat16 on GPU and TPU unless the config says otherwise."""
    return config.compute_dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def weights_path(config: ConfigDict) -> str:
    """The backbone's weights file, several separated by commas, or "" for random weights."""
    if config.backbone_weights != "published":
        return config.backbone_weights
    files = backbones.published_files(config.backbone)
    return ",".join(map(str, local_weights(files, config.data_dir)))


def classifier_head(config: ConfigDict) -> tuple[np.ndarray, np.ndarray] | dict[str, np.ndarray]:
    """Weights [1000, n] and bias [1000] of the classifier in the backbone's weights file, float32; ``InputError``.

    Of CLIP's backbones the pooling, see ``weights.load_pooling``.
    """
    if backbones.BACKBONES[config.backbone].pooling:
        return pretrained.load_pooling(weights_path(config), config.backbone, image_size(config))
    return pretrained.load_head(weights_path(config), config.backbone, image_size(config))


def encoder_folder(config: ConfigDict) -> Path:
    """Where the sentence encoder is."""
    return Path(config.data_dir) / ENCODER


def text_encoder(config: ConfigDict, exported: Path | None = None) -> Path | clip_text.TextFiles:
    """What encodes names: with CLIP's backbones its own encoder, else MiniLM's folder or, in its absence, a GloVe file.

    ``exported`` is an exported folder, which holds it.
    """
    if backbones.BACKBONES[config.backbone].pooling:
        folder = (exported or Path(config.data_dir)) / CLIP
        weights = folder / "model.safetensors" if exported else expand(weights_path(config))
        return clip_text.TextFiles(weights, folder / "tokenizer.json")
    folder = exported / ENCODER if exported else encoder_folder(config)
    if config.labels.embedding.startswith("glove") and not folder.exists():
        words = exported / WORDS if exported else Path(vectors_path(config))
        return words if words.is_file() else folder
    return folder


def encoder_files(encoder: Path | clip_text.TextFiles) -> list[Path]:
    """The files of a ``text_encoder``."""
    if isinstance(encoder, clip_text.TextFiles):
        return list(encoder)
    return sorted(encoder.glob("*")) if encoder.is_dir() else [encoder]


def class_mixtures(
    source: str, wordings: Sequence[Sequence[str]], encoder: str | Path | clip_text.TextFiles
) -> np.ndarray:
    """Labels as mixtures of ImageNet's classes: float32 [C, s * K], see ``class_words.mixtures``.

    ``source`` is "classes", or "classes without kinds", "classes without names" (``class_words.left_out``), or "classes
    by made-up words", where every name is replaced by one; ``wordings`` has the names of each label, whose vectors are
    averaged; ``encoder`` is as of ``text_encoder``. CLIP's labels need no classes: they are the texts themselves,
    float32 [C, e] of length 1.
    """
    flat = [name for names in wordings for name in names]
    if source == "classes by made-up words":
        flat, source = list(map(class_words.made_up_word, flat)), "classes"
    by_clip = isinstance(encoder, clip_text.TextFiles)
    by_words = not by_clip and Path(encoder).is_file()
    if by_clip and source != "classes":
        raise InputError(f"CLIP needs no classes, so there are no {source}: evaluate class_word_ridge or class_words")
    if by_words:
        print(f"names reach classes through the word vectors {encoder}; fetch minilm for a better way")
        vectors = load_word_vectors(encoder, flat, flat)
    else:
        encode = clip_text.encode_texts if by_clip else encode_texts
        vectors = encode([class_words.PROMPT.format(name) for name in flat], encoder)
    each = np.split(vectors, np.cumsum([len(names) for names in wordings])[:-1])
    means = np.stack([part.mean(axis=0) for part in each])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    if by_clip:
        return means
    leave, classes = class_words.left_out(flat, source.removeprefix("classes").removeprefix(" without ")), None
    if by_words:
        classes, unknown = class_words.class_vectors_of_words(encoder)
        leave |= unknown
    return class_words.mixtures(means, leave, classes).reshape(len(wordings), -1)


def unread(wordings: Sequence[Sequence[str]], encoder: str | Path | clip_text.TextFiles) -> list[bool]:
    """Whether MiniLM can read no wording of a label whole; other encoders read all, or refuse."""
    if isinstance(encoder, clip_text.TextFiles) or Path(encoder).is_file():
        return [False] * len(wordings)
    return [all(unread_texts(texts, encoder)) for texts in wordings]


def vectors_path(config: ConfigDict) -> str:
    """The file of word vectors."""
    path = config.labels.vectors or default_path(config.labels.embedding, config.data.name, config.data_dir)
    return str(expand(path))


def load_dataset(config: ConfigDict) -> data.ImageDataset:
    """Loads the dataset, prints its card, and leaves out the images that are in no split; errors as of ``load``."""
    data_config = config.data.copy_and_resolve_references().unlock()
    data_config.prepared_dir = config.data.prepared_dir or str(Path(config.cache_dir) / "datasets")
    data_config.image_size = image_size(config)
    _report_missing(config, data_config)
    dataset = data.load(data_config)
    if config.data.episodes:
        dataset = laso_episodes.with_published_supports(dataset, config.data.episodes, config.data.source)
    print(data.data_card(dataset))
    return dataset.only_used()


def load_backbone(config: ConfigDict, axis_name=None) -> tuple[PhotoBackbone, dict | None, str]:
    """The backbone that takes photos, its variables (None: random) and a hash of their file.

    In training batch norm averages over the mapped axes ``axis_name``, one or several.
    """
    spec = backbones.BACKBONES[config.backbone]
    network, dtype = backbones.create_backbone(config.backbone, axis_name), compute_dtype(config)
    options = config.augment, dtype, config.freeze_batch_norm
    photo_backbone = PhotoBackbone(network, spec.mean, spec.std, *options)
    path = weights_path(config)
    if not path:
        return photo_backbone, None, "random"
    weights = pretrained.load_weights(path, config.backbone, image_size(config))
    weights = {collection: {"network": tree} for collection, tree in weights.items()}
    return photo_backbone, weights, pretrained.weights_hash(path)


def _report_missing(config: ConfigDict, data_config: ConfigDict) -> None:
    missing = []
    if config.labels.embedding != "dataset" and not Path(vectors_path(config)).is_file():
        how = how_to_get(config.labels.embedding, config.data.name, config.data_dir)
        missing.append(f"config.labels.vectors = {vectors_path(config)!r}: no such file; {how}")
    for path in pretrained.weights_files(weights_path(config)) if weights_path(config) else ():
        if not path.is_file():
            how = backbones.how_to_get(config.backbone, config.data_dir)
            missing.append(f"config.backbone_weights = '{path}': no such file; {how}")
    if not data.is_available(data_config):
        layout = data.layout(config.data.name)
        missing.append(f"config.data.source = {config.data.source!r}: no such folder; {layout}")
    if missing:
        raise InputError("\n".join(missing))
