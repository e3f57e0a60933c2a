"""Published weights under the key names of their source: .safetensors, .npz and PyTorch's files in, .safetensors out.

One rule gives a parameter's key: its path in the Linen tree joined by dots, where "_" in a module's name becomes a dot
and "__" an underscore. The last name changes from kernel, scale or embedding to weight, from mean to running_mean, from
var to running_var. Thus ``layer1_0/conv2/kernel`` is ``layer1.0.conv2.weight`` and ``ln__1/scale`` is ``ln_1.weight``.
Convolution kernels go from PyTorch's [out, in, h, w] to [h, w, in, out], dense kernels from [out, in] to [in, out].

A backbone may have these attributes:
  key_prefix: the start of all its keys, such as "visual.".
  head_prefixes: starts of keys that it ignores. Any other unknown key is an error.
  former_names: part of a key in older files -> its present spelling.
  example: shape and dtype of what it takes, if that is no image.
"""

import functools
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax import traverse_util
from safetensors.numpy import load_file, save

from mlfsic_jax.backbones import BACKBONES, create_backbone, how_to_get
from mlfsic_jax.backbones._torch_file import read_pth
from mlfsic_jax.backbones.clip import ClipText
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import atomic, sha256
from mlfsic_jax.system.untrusted import expand, read_npz, reason, reported, shown

_LEAF_NAMES = {"mean": "running_mean", "var": "running_var"} | dict.fromkeys(("kernel", "scale", "embedding"), "weight")
# What DataParallel, torch.compile, Lightning and others put before all keys.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")
_MOST_LISTED = 8  # keys of one kind in an error message
_ANY = "e"  # a size that is not known before
# ``Spec.pooling`` -> what follows it in keys -> axes: e the space of images and texts, n channels, 1 + L positions.
_POOLINGS = {
    "visual.": {"proj": "ne"},
    "visual.attnpool.": {"positional_embedding": "Ln", "c_proj.weight": "en", "c_proj.bias": "e"}
    | {f"{name}_proj.{leaf}": axes for name in "qkv" for leaf, axes in {"weight": "nn", "bias": "n"}.items()},
}


def load_weights(
    path: str | os.PathLike[str], module_or_name: nn.Module | str, image_size: int = 224
) -> dict[str, Any]:
    """Reads a weights file and arranges it for a backbone module, or for one of ``BACKBONES`` by name.

    A backbone of several parts (``Joined``) takes one file each: "a.pth,b.pth". ``image_size`` is in pixels. Returns
    ``{"params": .., "batch_stats": ..}`` of float32 arrays for ``module.apply``.

    Raises:
      InputError: a file cannot be read or does not fit the backbone, or there are more or fewer files than parts.
    """
    module = create_backbone(module_or_name) if isinstance(module_or_name, str) else module_or_name
    variables: dict[str, Any] = {}
    for i, (file, part) in enumerate(_parts(path, module)):
        loaded = to_variables(read_state_dict(file), part, image_size, source=str(file))
        if part is module:
            return loaded
        for collection, arrays in loaded.items():
            variables.setdefault(collection, {})[f"parts_{i}"] = arrays
    return variables


def _parts(path: str | os.PathLike[str], module: nn.Module) -> list[tuple[Path, nn.Module]]:
    """The file of each part of a backbone, which most have one of."""
    parts, files = getattr(module, "parts", (module,)), weights_files(path)
    if len(files) != len(parts):
        names = f"{len(files)} weights file(s), but {' + '.join(type(part).__name__ for part in parts)}"
        raise InputError(f"{path} names {names} takes {len(parts)}: give one per part, separated by commas")
    return list(zip(files, parts, strict=True))


def load_head(path: str | os.PathLike[str], name: str, image_size: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """Reads the ImageNet classifier from the published weights file of ``name``, one of ``BACKBONES``.

    Returns weight float32 [1000, n] and bias float32 [1000]: ``weight @ features + bias`` are the logits of ILSVRC's
    classes in their order, of a backbone of several parts the means of theirs. ``InputError`` for a backbone without
    such a classifier, and a file without it or damaged.
    """
    module, spec = create_backbone(name), BACKBONES[name]
    if spec.head is None:
        known = ", ".join(other for other, row in BACKBONES.items() if row.head or row.pooling)
        raise InputError(f"the weights of {name} hold no ImageNet classifier: choose one of {known}")
    axes = {f"{spec.head}.weight": "Kn", f"{spec.head}.bias": "K"}
    heads = (
        _beside_backbone(file, part, name, "ImageNet classifier", axes, image_size)
        for file, part in _parts(path, module)
    )
    weights, biases = zip(*heads, strict=True)
    return np.concatenate(weights, axis=1) / len(weights), np.mean(biases, axis=0)


def load_pooling(path: str | os.PathLike[str], name: str, image_size: int = 224) -> dict[str, np.ndarray]:
    """Reads what takes local features to the space of CLIP's texts from the published file of ``name``, a CLIP.

    Returns float32 arrays as ``core.clip.pool`` takes them. ``InputError`` for a file without them or damaged, and for
    photos of another size than those of attention pooling.
    """
    start = BACKBONES[name].pooling
    axes = {start + key: axes for key, axes in _POOLINGS[start].items()}
    arrays = _beside_backbone(path, create_backbone(name), name, "pooling", axes, image_size)
    return dict(zip(_POOLINGS[start], arrays, strict=True))


def _beside_backbone(
    path: str | os.PathLike[str], module: nn.Module, name: str, what: str, axes: Mapping[str, str], image_size: int
) -> list[np.ndarray]:
    """Arrays float32 that a published file holds beside its backbone, given as key -> axes."""
    state = _present_names(read_state_dict(path), getattr(module, "former_names", {}))
    _, h, w, n = _shapes(module, image_size)[0].shape
    sizes, arrays = {"K": 1000, "n": n, "L": 1 + h * w}, []
    for key, letters in axes.items():
        array = state.get(key)
        found = "missing" if array is None else f"{array.dtype} {list(array.shape)}"
        if array is not None and array.ndim == len(letters) and _ANY in letters:
            sizes.setdefault(_ANY, array.shape[letters.index(_ANY)])
        shape = tuple(sizes.get(letter, letter) for letter in letters)
        if array is not None and array.shape == shape and jnp.issubdtype(array.dtype, jnp.floating):
            with np.errstate(over="ignore"):  # as in ``to_variables``
                arrays.append(array.astype(np.float32))
            if np.isfinite(arrays[-1]).all():
                continue
            found = "NaN or infinity in places"
        listed = ", ".join(map(str, shape))
        usual = BACKBONES[name].image_size
        how = how_to_get(name) if image_size == usual else f"set config.data.image_size = {usual}"
        raise InputError(f"{path} holds no {what} of {name}: {key} is {found}, not float [{listed}]; {how}")
    return arrays


def load_text_encoder(path: str | os.PathLike[str]) -> tuple[ClipText, dict[str, Any]]:
    """Reads the text encoder from a published file of CLIP: the module, of the file's sizes, and its variables.

    Raises:
      InputError: the file cannot be read, or holds no such encoder or a damaged one.
    """
    state = _present_names(read_state_dict(path), {})
    keys = ("token_embedding.weight", "positional_embedding", "text_projection")
    shapes = [np.shape(state.get(key)) for key in keys]  # () where it is missing
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] % max(1, shapes[0][1] // 64):
        found = ", ".join(f"{key} is {list(shape) or 'missing'}" for key, shape in zip(keys, shapes, strict=True))
        raise InputError(f"{path} holds no text encoder of CLIP: {found}; give OpenAI's RN50.pt or ViT-B-32.pt")
    n_layers = len({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")})
    (vocabulary, width), (context, _), (_, dimension) = shapes
    module = ClipText(n_layers, vocabulary, context, width, dimension)
    return module, to_variables(state, module, source=str(path))


def weights_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Splits "a.pth,b.pth" at its commas, but not within the name of a file that exists; the others need not exist."""
    parts, files = str(path).split(","), []
    while parts:
        starts = [(n, expand(",".join(parts[:n]).strip())) for n in range(len(parts), 0, -1)]
        n, file = next((start for start in starts if os.path.isfile(start[1])), starts[-1])
        files.append(file)
        del parts[:n]
    return tuple(files)


def weights_hash(path: str | os.PathLike[str]) -> str:
    """sha256 of a weights file as hex, for cache keys; for several files, the sha256 of their digests in order."""
    with reported(f"cannot read the weights file {path}", "check the path", OSError):
        digests = [sha256(file) for file in weights_files(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def to_variables(
    state: Mapping[str, np.ndarray], module: nn.Module, image_size: int = 224, *, source: str = "the weights"
) -> dict[str, Any]:
    """Arranges arrays under PyTorch names, in PyTorch's layout, as the variables of a backbone (as ``load_weights``).

    ``num_batches_tracked`` and the backbone's head are ignored; ``source`` names the weights' origin in messages. An
    ``InputError`` lists all keys that are missing, unexpected, misshapen or hold unusable values.
    """
    expected = traverse_util.flatten_dict(_shapes(module, image_size)[1])
    prefix = getattr(module, "key_prefix", "")
    leaf_of_key = dict(sorted((prefix + _torch_key(leaf), leaf) for leaf in expected))
    state = _present_names(state, getattr(module, "former_names", {}))
    first = next(iter(leaf_of_key))
    starts = [key.removesuffix(first) for key in state if key.endswith(f".{first}")]
    starts = [start for start in starts if all(start + key in state for key in leaf_of_key)]
    if len(starts) == 1 and first not in state:  # the backbone is a part of a larger network
        state = {key.removeprefix(starts[0]): a for key, a in state.items() if key.startswith(starts[0])}
    head = tuple(getattr(module, "head_prefixes", ()))

    extra = [key for key in state if key not in leaf_of_key and not key.startswith(head)]
    problems: dict[str, list[str]] = {
        "missing": [key for key in leaf_of_key if key not in state],
        "unexpected": [key for key in extra if not key.endswith("num_batches_tracked")],
        **{"wrong shape": [], "unusable": []},
    }
    variables = {}
    for key in (key for key in leaf_of_key if key in state):
        leaf, array = leaf_of_key[key], state[key]
        axes = _linen_axes(leaf, expected[leaf].ndim)
        shape = tuple(expected[leaf].shape[axis] for axis in np.argsort(axes))
        if array.shape != shape:
            problems["wrong shape"].append(f"{key} is {list(array.shape)}, not {list(shape)}")
            continue
        if not jnp.issubdtype(array.dtype, jnp.floating):
            problems["unusable"].append(f"{key} is {array.dtype}, not floating point")
            continue
        with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes inf, reported below
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            problems["unusable"].append(f"{key} holds NaN or infinity")
        elif leaf[-1] == "var" and (array < 0).any():
            problems["unusable"].append(f"{key} holds a negative variance")
        variables[leaf] = array.transpose(axes)

    listed = "; ".join(f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys)
    if listed:
        give = "Give intact weights of this architecture under its published key names."
        raise InputError(f"{source} does not fit the backbone {type(module).__name__}; {listed}. {give}")
    return jax.device_put(traverse_util.unflatten_dict(variables))  # jnp.asarray compiles a program for each shape


@functools.cache
def _shapes(module: nn.Module, image_size: int) -> tuple[Any, dict[str, Any]]:
    """Shapes and dtypes of a module's output and variables.

    Compiling and running a ResNet's initialiser would take a dozen seconds, and tracing it takes half a second.
    """
    image = getattr(module, "example", jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32))
    return jax.eval_shape(module.init_with_output, jax.random.key(0), image)


def save_weights(path: str | os.PathLike[str], variables: Mapping[str, Any], module: nn.Module) -> None:
    """Writes the variables of a backbone (not a ``Joined`` one) as .safetensors under its published key names."""
    prefix, state = getattr(module, "key_prefix", ""), {}
    for leaf, array in traverse_util.flatten_dict(variables).items():
        array = np.asarray(array)
        torch_axes = np.argsort(_linen_axes(leaf, array.ndim))
        state[prefix + _torch_key(leaf)] = np.ascontiguousarray(array.transpose(torch_axes))
    with atomic(path) as part:
        part.write_bytes(save(state))  # save_file would make it readable by its owner only


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the arrays of a weights file under their names there, in the file's dtypes (bfloat16 of ``ml_dtypes``).

    It is a ``.safetensors`` or ``.npz`` file, or one of PyTorch's: ``.pth``, ``.pt``, ``.pth.tar``, ``.ckpt`` or
    ``.bin``. The latter are read without PyTorch and without running any code from them, TorchScript archives and
    training checkpoints included; which of several state dicts is taken, is told on standard error.

    Raises:
      InputError: the file is absent, damaged, of another kind, or holds no plain tensors.
    """
    path = expand(path)
    of_torch = dict.fromkeys((".pth", ".pt", ".pth.tar", ".ckpt", ".bin"), read_pth)
    readers = {".safetensors": load_file, ".npz": _read_npz, **of_torch}
    reader = next((reader for ending, reader in readers.items() if path.name.lower().endswith(ending)), None)
    if reader is None:
        raise InputError(f"cannot tell the kind of the weights file {path}: its name must end in {', '.join(readers)}")
    if not path.is_file():
        raise InputError(f"no weights file {path}: check the path")
    try:
        return reader(path)
    except InputError:
        raise
    except Exception as error:  # each of the three parsers has its own dozen ways to fail on damaged bytes
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"cannot read the weights file {path}: {error.strerror}") from error
        why = f"is truncated or damaged ({reason(error)})"
        raise InputError(f"the weights file {path} {why}: download or export it again") from error


def _torch_key(leaf: tuple[str, ...]) -> str:
    """("params", "layer1_0", "conv2", "kernel") -> "layer1.0.conv2.weight"."""
    _, *modules, name = leaf
    modules = [re.sub("__?", lambda found: "." if found[0] == "_" else "_", module) for module in modules]
    return ".".join([*modules, _LEAF_NAMES.get(name, name)])


def _linen_axes(leaf: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """PyTorch's axes in Linen's order, for ``transpose``."""
    return {2: (1, 0), 4: (2, 3, 1, 0)}[ndim] if leaf[-1] == "kernel" else tuple(range(ndim))


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _MOST_LISTED} more" if len(keys) > _MOST_LISTED else ""
    listed = (key if len(key) < 150 and key.isprintable() else shown(key) for key in keys[:_MOST_LISTED])
    return ", ".join(listed) + more


def _present_names(state: Mapping[str, np.ndarray], former_names: Mapping[str, str]) -> Mapping[str, np.ndarray]:
    """Without what wrappers put before every key, and with present spellings."""
    while common := [w for w in _WRAPPERS if state and all(key.startswith(w) for key in state)]:
        state = {key.removeprefix(common[0]): array for key, array in state.items()}
    for former, present in former_names.items():
        state = {key.replace(former, present): array for key, array in state.items()}
    return state


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # NumPy does not know bfloat16 and writes it as two bytes without a type.
    return {key: a.view(ml_dtypes.bfloat16) if a.dtype == np.dtype("V2") else a for key, a in read_npz(path)}
