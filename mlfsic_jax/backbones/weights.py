"""Import of published weights by the key names of their source, from .safetensors, .npz or .pth files.

A key follows from the place of a parameter in the Linen tree by one rule: the path joined by dots, where "_" in a
module's name is a dot and "__" an underscore, and the parameter's own name as it is but for kernel -> weight,
scale -> weight, mean -> running_mean, var -> running_var. Thus ``layer1_0/conv2/kernel`` is ``layer1.0.conv2.weight``
and ``ln__1/scale`` is ``ln_1.weight``. Convolution kernels go from PyTorch's [out, in, h, w] to [h, w, in, out], those
of dense layers from [out, in] to [in, out]; other arrays stay as they are.

A backbone may have these class attributes, all optional:
  key_prefix: what all its keys start with, like "visual.".
  head_prefixes: beginnings of the keys in its files that it has no use for. Any other unknown key is an error.
  former_names: part of a key in older files -> what it is called now.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax import traverse_util

from mlfsic_jax.backbones import create
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import sha256
from mlfsic_jax.system.untrusted import check_expansion, read_npz, reason, shown

_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_WRAPPERS = ("state_dict", "model")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_CONVERT = (
    "convert it where PyTorch is installed: state = torch.load(path, weights_only=True), "
    'then safetensors.torch.save_file(state, "weights.safetensors")'
)
_LONGEST_KEY = 1000  # characters
_MOST_LISTED = 8  # keys of one kind in an error message


def load_weights(
    path: str | os.PathLike[str], module_or_name: nn.Module | str, image_size: int = 224
) -> dict[str, Any]:
    """Read weights from a file and arrange them for a backbone.

    Args:
      path: a ``.safetensors``, ``.npz`` or ``.pth``/``.pt`` file with the key names of the weights' source. A ``.pth``
        file, TorchScript archives included, is read without PyTorch and without running any code from it. For a
        backbone of several parts (``Pooled``), one file each: "a.pth,b.pth".
      module_or_name: a backbone module or its name in ``BACKBONES``.
      image_size: side in pixels of the images it will see.

    Returns:
      ``{"params": .., "batch_stats": ..}`` of float32 arrays, ready for ``module.apply``.

    Raises:
      InputError: the file cannot be read, its keys, shapes or values do not fit the backbone, or there are more or
        fewer files than parts.
    """
    module = create(module_or_name) if isinstance(module_or_name, str) else module_or_name
    parts, files = getattr(module, "parts", (module,)), weights_files(path)
    if len(files) != len(parts):
        names = " + ".join(type(part).__name__ for part in parts)
        raise InputError(
            f"{path} names {len(files)} weights file(s), but {names} takes {len(parts)}: "
            "give one for every part, separated by commas"
        )
    loaded = [
        to_variables(read_state_dict(file), part, image_size, source=str(file))
        for file, part in zip(files, parts, strict=True)
    ]
    if parts == (module,):
        return loaded[0]
    collections_there = sorted({name for variables in loaded for name in variables})
    return {
        name: {f"parts_{i}": variables[name] for i, variables in enumerate(loaded) if name in variables}
        for name in collections_there
    }


def weights_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The files that a config's ``backbone_weights`` names: several are separated by commas.

    Args:
      path: "a.pth" or "a.pth,b.pth". The name of an existing file may have a comma in it.

    Returns:
      At least one path, whether or not it exists.
    """
    if Path(path).is_file():
        return (Path(path),)
    return tuple(Path(name.strip()) for name in str(path).split(","))


def weights_hash(path: str | os.PathLike[str]) -> str:
    """sha256 of a weights file as hex, the part of a cache key that stands for it.

    Args:
      path: as for ``weights_files``; several files have the sha256 of their digests, in their order.

    Raises:
      InputError: a file cannot be read.
    """
    digests = []
    for file in weights_files(path):
        try:
            digests.append(sha256(file))
        except OSError as error:
            raise InputError(f"cannot read the weights file {file}: {error.strerror}") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def to_variables(
    state: Mapping[str, np.ndarray], module: nn.Module, image_size: int = 224, *, source: str = "the weights"
) -> dict[str, Any]:
    """Arrange arrays under PyTorch names as the variables of a backbone.

    Args:
      state: PyTorch key -> array, in PyTorch's layout. ``num_batches_tracked`` and what the backbone names as its head
        are ignored.
      module: the backbone.
      image_size: side in pixels of the images it will see.
      source: what error messages call the origin of the weights.

    Returns:
      ``{"params": .., "batch_stats": ..}`` of float32 arrays; without the latter where there is no batch norm.

    Raises:
      InputError: one message with the keys that are missing, unexpected, misshapen or hold unusable values.
    """
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    # Shapes only: compiling and running the initialiser of a ResNet takes a dozen seconds.
    expected = traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), image))
    prefix = getattr(module, "key_prefix", "")
    leaf_of_key = dict(sorted((prefix + _torch_key(leaf), leaf) for leaf in expected))
    state = _rename(_strip_prefix(state), getattr(module, "former_names", {}))

    head = tuple(getattr(module, "head_prefixes", ()))
    extra = [
        key
        for key in state
        if key not in leaf_of_key and not key.endswith("num_batches_tracked") and not key.startswith(head)
    ]
    missing = [key for key in leaf_of_key if key not in state]
    misshapen, unusable, variables = [], [], {}
    for key, leaf in leaf_of_key.items():
        if key not in state:
            continue
        array, axes = state[key], _linen_axes(leaf, expected[leaf].ndim)
        shape = tuple(expected[leaf].shape[axes.index(axis)] for axis in range(len(axes)))
        if array.shape != shape:
            misshapen.append(f"{key} is {list(array.shape)}, not {list(shape)}")
            continue
        if not jnp.issubdtype(array.dtype, jnp.floating):
            unusable.append(f"{key} is {array.dtype}, not floating point")
            continue
        with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes inf, which is reported below
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            unusable.append(f"{key} holds NaN or infinity")
        elif leaf[-1] == "var" and (array < 0).any():
            unusable.append(f"{key} holds a negative variance")
        variables[leaf] = jnp.asarray(array.transpose(axes))

    found = (("missing", missing), ("unexpected", extra), ("wrong shape", misshapen), ("unusable", unusable))
    problems = [f"{what}: {_listed(keys)}" for what, keys in found if keys]
    if problems:
        raise InputError(
            f"{source} does not fit the backbone {type(module).__name__}; {'; '.join(problems)}. "
            "Give intact weights of this architecture under its published key names."
        )
    return traverse_util.unflatten_dict(variables)


def save_weights(path: str | os.PathLike[str], variables: Mapping[str, Any], module: nn.Module) -> None:
    """Write the variables of a backbone as a .safetensors file under its published key names.

    Args:
      path: the file, replaced as a whole.
      variables: ``{"params": .., "batch_stats": ..}`` as ``load_weights`` returns them.
      module: the backbone; not one that takes several files.
    """
    from safetensors.numpy import save_file

    prefix, state = getattr(module, "key_prefix", ""), {}
    for leaf, array in traverse_util.flatten_dict(variables).items():
        array = np.asarray(array)
        torch_axes = np.argsort(_linen_axes(leaf, array.ndim))
        state[prefix + _torch_key(leaf)] = np.ascontiguousarray(array.transpose(torch_axes))
    part = Path(path).with_suffix(".part")
    save_file(state, part)
    os.replace(part, path)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the arrays of a weights file under the names they have in it.

    Args:
      path: a ``.safetensors``, ``.npz`` or ``.pth``/``.pt`` file. In the latter, the weights may lie under
        ``state_dict`` or ``model``; other entries beside those are ignored.

    Returns:
      Key -> array, in the file's dtype; bfloat16 is ``ml_dtypes.bfloat16``.

    Raises:
      InputError: the file is absent, damaged, of another kind, or would have to run code to be read.
    """
    path = Path(path)
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz, ".pth": _read_pth, ".pt": _read_pth}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"cannot tell the kind of the weights file {path}: its name must end in {', '.join(readers)}")
    if not path.is_file():
        raise InputError(f"no weights file {path}: check the path")
    try:
        return reader(path)
    except InputError:
        raise
    except OSError as error:
        if error.strerror:
            raise InputError(f"cannot read the weights file {path}: {error.strerror}") from error
        raise _damaged(path, error) from error
    except Exception as error:  # each of the three parsers has its own dozen ways to fail on damaged bytes
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"the weights file {path} is truncated or damaged ({reason(error)}): download or export it again")


def _torch_key(leaf: tuple[str, ...]) -> str:
    """("params", "layer1_0", "conv2", "kernel") -> "layer1.0.conv2.weight"."""
    _, *modules, name = leaf
    modules = [re.sub("__?", lambda found: "." if found[0] == "_" else "_", module) for module in modules]
    return ".".join([*modules, _LEAF_NAMES.get(name, name)])


def _linen_axes(leaf: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """PyTorch's axes in Linen's order."""
    if leaf[-1] != "kernel":
        return tuple(range(ndim))
    return {2: (1, 0), 4: (2, 3, 1, 0)}[ndim]


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _MOST_LISTED} more" if len(keys) > _MOST_LISTED else ""
    listed = (key if len(key) < 150 and key.isprintable() else shown(key) for key in keys[:_MOST_LISTED])
    return ", ".join(listed) + more


def _rename(state: Mapping[str, np.ndarray], former_names: Mapping[str, str]) -> Mapping[str, np.ndarray]:
    for former, present in former_names.items():
        state = {key.replace(former, present): array for key, array in state.items()}
    return state


def _strip_prefix(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Drop the "module." that torch.nn.DataParallel puts before every key."""
    if state and all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): array for key, array in state.items()}
    return state


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # NumPy writes bfloat16, which it does not know, as two bytes of nothing in particular.
    return {key: a.view(ml_dtypes.bfloat16) if a.dtype == np.dtype("V2") else a for key, a in read_npz(path)}


def _read_pth(path: Path) -> dict[str, np.ndarray]:
    """torch.save's zip archive: ``<root>/data.pkl`` describes tensors, ``<root>/data/<n>`` holds their raw numbers.

    torch.jit.save's is the same with a program beside it, which is left alone.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            start = file.read(2)
        if start[:1] == b"\x80":
            return _read_legacy_pth(path)
        if start == b"PK":
            raise ValueError("its end is missing")
        raise InputError(f"{path} is not a file written by torch.save: {_CONVERT}")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        roots = [name.split("/")[0] for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise InputError(f"{path} is a zip file but was not written by torch.save: {_CONVERT}")
        if f"{roots[0]}/byteorder" in names and archive.read(f"{roots[0]}/byteorder") != b"little":
            raise InputError(f"{path} was written on a big-endian machine, which is not read here: {_CONVERT}")

        def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
            return np.frombuffer(archive.read(f"{roots[0]}/data/{key}"), dtype, count)

        check_expansion(archive, path)
        content = _StateReader(storage, path).read(io.BytesIO(archive.read(f"{roots[0]}/data.pkl")))
    return dict(_tensors(content, path))


def _read_legacy_pth(path: Path) -> dict[str, np.ndarray]:
    """PyTorch's format before 1.6, in which torchvision's older weights come: pickles, then the raw numbers."""
    storages: dict[str, np.ndarray] = {}
    size = path.stat().st_size

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if type(count) is not int or not 0 <= count * dtype.itemsize <= size:
            raise ValueError(f"a storage of {count!r} numbers")
        return np.empty(count, dtype)  # the numbers follow after the last pickle

    with open(path, "rb") as stream:
        magic, protocol, system, content, keys = (_StateReader(storage, path, storages).read(stream) for _ in range(5))
        if magic != _LEGACY_MAGIC or protocol != 1001:
            raise InputError(f"{path} is a pickle but was not written by torch.save: {_CONVERT}")
        if not system["little_endian"]:
            raise InputError(f"{path} was written on a big-endian machine, which is not read here: {_CONVERT}")
        for key in keys:
            count = int.from_bytes(stream.read(8), "little")
            if count != len(storages[key]) or stream.readinto(storages[key].view(np.uint8)) != storages[key].nbytes:
                raise ValueError(f"storage {key} is cut short")
    return dict(_tensors(content, path))


def _tensors(content: Any, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(content, _ScriptModule):
        content = content.state_dict()
    for _ in _WRAPPERS:
        inner = [content[key] for key in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)]
        content = inner[0] if inner else content
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not the state dict of a module: {_CONVERT}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            raise InputError(
                f"{path} is not a state dict: its entry {shown(key)} is a {type(value).__name__}. {_CONVERT}"
            )
        yield key, value


_STORAGE_DTYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_SCRIPT_VALUES = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")


class _ScriptModule:
    """What stands for every object of a TorchScript program: its attributes and no behaviour."""

    __slots__ = ("_attributes",)

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        """What the stream gives it."""
        if not isinstance(attributes, dict):
            raise ValueError("a module with a state of its own making")
        self._attributes = attributes

    def state_dict(self) -> dict[str, np.ndarray]:
        """The tensors of this module and of those in it, under dotted names; other attributes are left out."""
        tensors, seen, pending = {}, set(), [("", self)]
        while pending:
            prefix, module = pending.pop()
            if id(module) in seen:  # a file may claim that a module holds itself
                continue
            seen.add(id(module))
            if len(prefix) > _LONGEST_KEY:
                raise ValueError("modules within modules without end")
            for name, value in module._attributes.items():
                if isinstance(value, np.ndarray):
                    tensors[f"{prefix}{name}"] = value
                elif isinstance(value, _ScriptModule):
                    pending.append((f"{prefix}{name}.", value))
        return tensors


_MARK = object()
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENTS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
)


class _StateReader:
    """Reads state dicts from pickle streams, which are programs, without running them.

    Of the instructions, this knows those that put together numbers, texts, lists, tuples and dicts; of the names that
    a stream may call, those of ``_find``. Python's own unpickler, restricted to the same names, would still take
    gigabytes for an entry number, and crash when it hashes a deeply nested key. An object of a TorchScript program,
    whatever its class, becomes a ``_ScriptModule``; the typed lists and dicts of such programs become plain ones.
    """

    def __init__(
        self,
        storage: Callable[[str, np.dtype, int], np.ndarray],
        path: Path,
        storages: dict[str, np.ndarray] | None = None,
    ) -> None:
        self._storage, self._path = storage, path
        self._storages = {} if storages is None else storages

    def read(self, stream: BinaryIO) -> Any:
        """The object that the next pickle in the stream describes."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            start = len(stack) - 1 - next(i for i, item in enumerate(reversed(stack)) if item is _MARK)
            items = stack[start + 1 :]
            del stack[start:]
            return items

        for opcode, argument, _ in pickletools.genops(stream):
            match opcode.name:
                case name if name in _ARGUMENTS:
                    stack.append(argument)
                case name if name in _LITERALS:
                    stack.append(_LITERALS[name])
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    stack.append(_MARK)
                case "POP":
                    stack.pop()
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_TUPLE":
                    stack.append(())
                case "LIST":
                    stack.append(since_mark())
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    n = int(opcode.name[-1])
                    stack[-n:] = [tuple(stack[-n:])]
                case "DICT":
                    stack.append(_put({}, since_mark()))
                case "APPEND":
                    item = stack.pop()
                    _as(list, stack[-1]).append(item)
                case "APPENDS":
                    items = since_mark()
                    _as(list, stack[-1]).extend(items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _put(_as(dict, stack[-1]), [key, value])
                case "SETITEMS":
                    items = since_mark()
                    _put(_as(dict, stack[-1]), items)
                case "GLOBAL":
                    stack.append(self._find(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(self._find(_as(str, module), _as(str, name)))
                case "REDUCE":
                    arguments, function = stack.pop(), stack.pop()
                    if not isinstance(function, _Function):
                        raise ValueError("something is called that is no function")
                    stack.append(function.call(*_as(tuple, arguments)))
                case "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    if function is not _ScriptModule or arguments != ():
                        raise ValueError("an object of an unknown class")
                    stack.append(_ScriptModule())
                case "BUILD":
                    state = stack.pop()
                    if isinstance(stack[-1], _ScriptModule):
                        stack[-1].set_attributes(state)
                    elif not isinstance(stack[-1], dict):  # an OrderedDict's attributes: versions of its modules
                        raise ValueError("attributes of something that has none")
                case "BINPERSID":
                    stack.append(self._find_storage(stack.pop()))
                case "STOP":
                    (content,) = stack
                    return content
                case name:
                    raise ValueError(f"the instruction {name}, which no state dict needs")
        raise AssertionError("genops ends with STOP or an error")

    def _find(self, module: str, name: str) -> Any:
        """The allow-list; everything else is refused."""
        if (module, name) == ("collections", "OrderedDict"):
            return _Function(lambda pairs=(): _put({}, [part for key, value in pairs for part in (key, value)]))
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Function(self._rebuild_tensor)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Function(_as_it_is)
        if module == "torch.jit._pickle" and name in _SCRIPT_VALUES:
            return _Function(_as_it_is)
        if module.split(".")[0] == "__torch__":
            return _ScriptModule
        if module == "torch" and name in _STORAGE_DTYPES:
            return name
        wanted = " ".join(f"{module}.{name}".split())[:80]
        raise InputError(
            f"{self._path} refers to {wanted}; only plain tensors are read, and no code from a file is run. "
            f"Ask its author for a plain state dict, or {_CONVERT}"
        )

    def _find_storage(self, pid: Any) -> np.ndarray:
        """("storage", type, key, device, count) -> the numbers of one storage, 1-d."""
        kind, storage_type, key, _device, count, *_view = pid
        _as(str, storage_type), _as(str, key)
        if kind != "storage" or any(view is not None for view in _view):
            raise ValueError("a reference to something that is no storage")
        if key not in self._storages:
            self._storages[key] = self._storage(key, _STORAGE_DTYPES[storage_type], count)
        return self._storages[key]

    def _rebuild_tensor(
        self, storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> np.ndarray:
        """torch._utils._rebuild_tensor_v2 as a read-only view; gradients and hooks are dropped."""
        if not isinstance(storage, np.ndarray) or storage.ndim != 1:
            raise ValueError("a tensor without storage")
        if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
            raise ValueError(f"a tensor of impossible layout {shown((offset, size, stride))}")
        if math.prod(size) == 0:
            return np.zeros(size, storage.dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= storage.size:  # as_strided would read past the end
            raise ValueError(f"a tensor reaches element {last} of {storage.size}")
        steps = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


class _Function(NamedTuple):
    """What a stream may call; it gets hold of nothing whose behaviour it could alter."""

    call: Callable[..., Any]


def _as_it_is(value: Any, *_: Any) -> Any:
    return value


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} in the place of a {kind.__name__}")
    return value


def _put(found: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    """Adds key, value, key, value, .."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, int, float, bytes)):  # a nested tuple may be too deep to be hashed
            raise ValueError(f"a {type(key).__name__} as a key")
        found[key] = value
    return found
