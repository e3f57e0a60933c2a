"""``ImageDataset``: photos by index, a label matrix, three splits."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import numpy as np

SPLITS = ("train", "validation", "novel")


class Split(NamedTuple):
    """One of the three splits, as positions in the dataset's label and image lists."""

    labels: np.ndarray  # int32 [C_split], columns of ``ImageDataset.labels``
    images: np.ndarray  # int32 [I_split], rows of ``ImageDataset.labels``
    # bool [I_split] under LaSO's protocol: support images are drawn from these, queries from the others; with published
    # supports a structured array, see ``laso_episodes``.
    support: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """A multi-label image dataset with random access."""

    name: str  # e.g. "voc"
    label_names: tuple[str, ...]  # C names as the dataset spells them ("pottedplant")
    display_names: tuple[str, ...]  # C names as people write them ("potted plant"), for looking up word vectors
    image_names: tuple[str, ...]  # I unique names, independent of the order on disk
    labels: np.ndarray  # bool [I, C]
    load_image: Callable[[int], np.ndarray]  # i -> uint8 [H, W, 3] RGB; ``InputError`` naming an unreadable photo
    fingerprint: str  # hex digest that changes with the photos or the labels
    splits: Mapping[str, Split]  # of "train", "validation" and "novel"
    word_vectors: np.ndarray | None = None  # float32 [C, d_w] of a generated dataset, else None
    notes: tuple[str, ...] = ()  # lines for the data card
    # image name -> why its photo cannot be read, if known before loading
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def split_labels(self, split: str) -> np.ndarray:
        """bool [I_split, C_split]: the label matrix of one split, the rows in the order of its images."""
        return self.labels[np.ix_(self.splits[split].images, self.splits[split].labels)]

    def only_used(self) -> Self:
        """The dataset without the images that are in no split."""
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
