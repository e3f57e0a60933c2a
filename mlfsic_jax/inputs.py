"""From a config to what training and evaluation work on: photos or cached features, labels, words, a model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mlfsic_jax import backbones, data
from mlfsic_jax.backbones import pretrained
from mlfsic_jax.data import voc
from mlfsic_jax.data.transforms import augment, normalise
from mlfsic_jax.errors import InputError
from mlfsic_jax.evaluate import SplitView
from mlfsic_jax.feature_cache import open_or_build, usable_splits
from mlfsic_jax.label_embeddings import load_word_vectors
from mlfsic_jax.models import BaseModel


class Inputs(NamedTuple):
    """Everything a run works on.

    Attributes:
      model: the model, with its backbone where that is trained.
      splits: "train", "validation", "novel" -> ``SplitView``.
      base: the images and labels that the closed-form model is fitted on.
      pretrained: variables of the backbone to start from, where it is trained from published weights, else None.
      identity: what the results depend on besides the config: hashes of data, weights and word vectors.
    """

    model: BaseModel
    splits: dict[str, SplitView]
    base: SplitView
    pretrained: dict | None
    identity: dict[str, str]


class PhotoBackbone(nn.Module):
    """A backbone that takes photos as they are stored: uint8 [B, H, W, 3] -> float32 [B, h, w, n].

    In training it augments them (rng "augment").
    """

    network: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augment: bool = False

    @nn.compact
    def __call__(self, photos, train: bool = False):
        photos = photos.astype(jnp.float32) / 255
        if train and self.augment:
            photos = augment(self.make_rng("augment"), photos)
        return self.network(normalise(photos, self.mean, self.std), train)


def load(config: ml_collections.ConfigDict) -> Inputs:
    """Loads data and words, prints the data card, and fills the cache.

    Raises:
      InputError: something is missing or does not fit; all missing files are named in one message.
    """
    data_config = config.data.copy_and_resolve_references()
    data_config.prepared_dir = config.data.prepared_dir or str(Path(config.cache_dir) / "datasets")
    _report_missing(config, data_config.prepared_dir)
    dataset = data.load(data_config)
    print(data.data_card(dataset))

    if config.labels.embedding == "glove":
        words = load_word_vectors(config.labels.vectors, dataset.label_names, dataset.display_names)
    elif dataset.word_vectors is not None:
        words = dataset.word_vectors
    else:
        raise InputError(f"dataset {dataset.name} brings no word vectors: set config.labels.embedding=glove")

    spec, size = backbones.BACKBONES[config.backbone], config.data.image_size
    photo_backbone = PhotoBackbone(backbones.create(config.backbone), spec.mean, spec.std, config.augment)
    weights, weights_hash = None, "random"
    if config.backbone_weights:
        weights = pretrained.load_weights(config.backbone_weights, config.backbone, size)
        weights = {collection: {"network": tree} for collection, tree in weights.items()}
        weights_hash = pretrained.weights_hash(config.backbone_weights)

    where = {"cache_dir": config.cache_dir, "image_size": size}
    if config.train_backbone:
        made_from = {"backbone": "photos"}
        cache = open_or_build(dataset, **where, row_shape=(size, size, 3), dtype="uint8", made_from=made_from)
    else:
        forward = jax.jit(lambda photos: photo_backbone.apply(weights, photos))
        photo = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
        row_shape = jax.eval_shape(forward, photo).shape[1:]
        normalisation = {"mean": list(spec.mean), "std": list(spec.std)}
        made_from = {"backbone": config.backbone, "weights": weights_hash, "normalisation": normalisation}
        cache = open_or_build(
            dataset, **where, row_shape=row_shape, dtype="float16", made_from=made_from, compute=forward
        )

    def view(images: np.ndarray, labels: np.ndarray) -> SplitView:
        return SplitView(
            inputs=lambda rows: cache.values[images[rows]],
            labels=dataset.labels[np.ix_(images, labels)],
            word_vectors=words[labels],
            label_names=tuple(dataset.label_names[c] for c in labels),
        )

    usable = usable_splits(dataset, cache)
    splits = {name: view(split.images, split.labels) for name, split in usable.items()}
    fit_on = [usable[name] for name in config.ridge.fit_on]
    base = view(*(np.concatenate(parts) for parts in ([s.images for s in fit_on], [s.labels for s in fit_on])))
    model = BaseModel(**config.model, backbone=photo_backbone if config.train_backbone else None)
    identity = {
        "dataset": dataset.fingerprint,
        "weights": weights_hash,
        "word_vectors": hashlib.sha256(np.ascontiguousarray(words).tobytes()).hexdigest(),
    }
    return Inputs(model, splits, base, weights if config.train_backbone else None, identity)


def _report_missing(config: ml_collections.ConfigDict, prepared_dir: str) -> None:
    missing = []
    if config.labels.embedding == "glove" and not Path(config.labels.vectors).is_file():
        missing.append(
            f"config.labels.vectors = {config.labels.vectors!r}: no such file; unpack glove.6B.300d.txt from "
            "https://nlp.stanford.edu/data/glove.6B.zip"
        )
    if config.backbone_weights and not Path(config.backbone_weights).is_file():
        source = backbones.BACKBONES[config.backbone].pretrained
        missing.append(f"config.backbone_weights = {config.backbone_weights!r}: no such file; get it from {source}")
    if config.data.name == "voc" and not voc.is_available(config.data.source, prepared_dir):
        missing.append(
            f"config.data.source = {config.data.source!r}: no such folder; unpack the VOC2007 and VOC2012 archives of "
            "http://host.robots.ox.ac.uk/pascal/VOC/ there, so that it holds VOC2007/ and VOC2012/"
        )
    if missing:
        raise InputError("\n".join(missing))
