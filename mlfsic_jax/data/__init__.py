"""Image datasets: one ``load`` for all of them, and what each of them is made of."""

from __future__ import annotations

from typing import Any

from mlfsic_jax.data.card import data_card
from mlfsic_jax.data.dataset import ImageDataset, Split
from mlfsic_jax.errors import InputError

__all__ = ["ImageDataset", "Split", "data_card", "load"]

_FIELDS = {
    "scenes": ("image_size", "images_per_split", "seed"),
    "voc": ("source", "prepared_dir", "policy"),
}


def load(config: Any) -> ImageDataset:
    """Loads the dataset that ``config.name`` names.

    Args:
      config: the data section of a config. ``"voc"`` reads its fields source, prepared_dir and policy; ``"scenes"``
        reads image_size, images_per_split and seed.

    Returns:
      The dataset.

    Raises:
      InputError: unknown name, missing field, or input that the dataset cannot use.
    """
    name = config.name
    if name not in _FIELDS:
        raise InputError(f"dataset {name!r} is unknown: use one of {', '.join(sorted(_FIELDS))}")
    missing = [field for field in _FIELDS[name] if not hasattr(config, field)]
    if missing:
        raise InputError(f"dataset {name!r} needs the config field {', '.join(missing)}")
    arguments = {field: getattr(config, field) for field in _FIELDS[name]}
    if name == "voc":
        from mlfsic_jax.data import voc

        return voc.load(**arguments)
    from mlfsic_jax.data import scenes

    return scenes.load(**arguments)
