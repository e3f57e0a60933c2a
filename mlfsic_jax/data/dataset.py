"""What every dataset is to the rest of the program: photos by index, a label matrix, three splits."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "validation", "novel")


class Split(NamedTuple):
    """One of the three splits, as positions in the dataset's label and image lists.

    Attributes:
      labels: int32 [C_split], columns of ``ImageDataset.labels``.
      images: int32 [I_split], rows of ``ImageDataset.labels``.
      support: bool [I_split] under LaSO's protocol, where support images are drawn among these and all others are
        queries; None where episodes draw both from all images.
    """

    labels: np.ndarray
    images: np.ndarray
    support: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """A multi-label image dataset with random access.

    Attributes:
      name: short name, e.g. ``"voc"``.
      label_names: C names as the dataset spells them (``"pottedplant"``).
      display_names: C names as people write them (``"potted plant"``), from which word vectors are looked up.
      image_names: I unique names; an image keeps its name whatever the order on disk.
      labels: bool [I, C].
      load_image: ``i -> uint8 [H, W, 3]`` RGB. Raises ``InputError`` naming the photo if it cannot be read.
      fingerprint: hex digest that changes when the photos or the labels change.
      splits: ``{"train": Split, "validation": Split, "novel": Split}``.
      word_vectors: float32 [C, d_w] where the dataset brings its own, else None.
      notes: lines that the data card prints below its tables.
      unreadable: image name -> why its photo cannot be read, as far as that is known before photos are loaded.
    """

    name: str
    label_names: tuple[str, ...]
    display_names: tuple[str, ...]
    image_names: tuple[str, ...]
    labels: np.ndarray
    load_image: Callable[[int], np.ndarray]
    fingerprint: str
    splits: Mapping[str, Split]
    word_vectors: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def split_labels(self, split: str) -> np.ndarray:
        """bool [I_split, C_split]: the label matrix of one split, the rows in the order of its images."""
        return self.labels[np.ix_(self.splits[split].images, self.splits[split].labels)]

    def only_used(self) -> ImageDataset:
        """The dataset without the images that are in no split; nothing is computed or stored for those."""
        used = np.unique(np.concatenate([split.images for split in self.splits.values()]))
        if len(used) == len(self.labels):
            return self
        splits = {
            name: split._replace(images=np.searchsorted(used, split.images).astype(np.int32))
            for name, split in self.splits.items()
        }
        return dataclasses.replace(
            self,
            image_names=tuple(self.image_names[i] for i in used),
            labels=self.labels[used],
            load_image=lambda i: self.load_image(int(used[i])),
            fingerprint=hashlib.sha256(self.fingerprint.encode() + used.astype("<i4").tobytes()).hexdigest(),
            splits=splits,
        )
