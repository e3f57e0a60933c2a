"""What a run reads, told apart without reading it: whether results that lie in files are of the inputs of today."""

import functools
import json
import os
from pathlib import Path

from ml_collections import ConfigDict

from mlfsic_jax.backbones import weights
from mlfsic_jax.data.prepared import digest
from mlfsic_jax.run import inputs
from mlfsic_jax.system.files import sha256, stamp
from mlfsic_jax.system.untrusted import expand

KEY = "sources"  # in the metadata of a file of results


def metadata(config: ConfigDict) -> dict[str, str]:
    """What a file of results says about how it was made."""
    return {"config": json.dumps(config.to_dict()), KEY: json.dumps(sources(config))}


def sources(config: ConfigDict) -> dict[str, str]:
    """Data, split, weights and word vectors of a run, as short texts; what is not there now is left out.

    Files of a folder of photos count by names, sizes and times, so that it may be moved. A copy of a published dataset
    is that dataset.
    """
    found, folder, split = {}, expand(config.data.source), expand(config.data.split)
    if config.data.name == "folder" and config.data.source and folder.is_dir():
        files = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
        found["data"] = digest(sorted((os.fsencode(path.relative_to(folder)), stamp(path)) for path in files))
    if split.is_file():
        found["split"] = sha256(split)
    path = inputs.weights_path(config)
    stamps = tuple(map(stamp, weights.weights_files(path))) if path else ()
    if stamps and None not in stamps:
        found["weights"] = _weights_hash(path, stamps)
    if config.labels.embedding != "dataset" and (written := stamp(inputs.vectors_path(config))):
        found["vectors"] = " ".join(map(str, written))
    return found


def agree(config: ConfigDict, stored: str | None) -> bool:
    """Whether a file with this metadata was made from the inputs of today, as far as these are there."""
    if stored is None:
        return False
    before, now = json.loads(stored), sources(config)
    return all(before[name] == now[name] for name in before.keys() & now.keys())


@functools.lru_cache(maxsize=64)
def _weights_hash(path: str, _) -> str:
    return weights.weights_hash(path)
