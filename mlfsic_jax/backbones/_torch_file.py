"""Reads state dicts from PyTorch's .pth and .pt files without PyTorch and without running any code from them."""

import io
import math
import pickletools
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import check_expansion, shown

_WRAPPERS = ("state_dict", "model")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LONGEST_KEY = 1000  # characters
_CONVERT = (
    "convert it where PyTorch is installed: state = torch.load(path, weights_only=True), "
    'then safetensors.torch.save_file(state, "weights.safetensors")'
)
_BIG_ENDIAN = f"was written on a big-endian machine, which is not supported: {_CONVERT}"
_STORAGE_DTYPES = {
    f"{name}Storage": np.dtype(dtype)
    for name, dtype in {
        **{"Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16},
        **{"Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_},
    }.items()
}
_SCRIPT_VALUES = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of torch.save's zip archive, of a TorchScript archive, or of the format before PyTorch 1.6.

    In a zip archive, ``<root>/data.pkl`` describes the tensors and ``<root>/data/<n>`` holds their raw numbers.
    Raises ``InputError`` for a file of another kind or one that refers to code, errors of all kinds for damaged ones.
    """
    storages: dict[str, np.ndarray] = {}  # tensors may share one
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            start = file.read(2)
        if start[:1] == b"\x80":
            return _read_legacy(path)
        if start == b"PK":
            raise ValueError("its end is missing")
        raise InputError(f"{path} is not a file written by torch.save: {_CONVERT}")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        roots = [name.split("/")[0] for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise InputError(f"{path} is a zip file but was not written by torch.save: {_CONVERT}")
        if f"{roots[0]}/byteorder" in names and archive.read(f"{roots[0]}/byteorder") != b"little":
            raise InputError(f"{path} {_BIG_ENDIAN}")

        def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
            if key not in storages:
                storages[key] = np.frombuffer(archive.read(f"{roots[0]}/data/{key}"), dtype, count)
            return storages[key]

        check_expansion(archive, path)
        content = _Unpickler(storage, path).read(io.BytesIO(archive.read(f"{roots[0]}/data.pkl")))
    return dict(_tensors(content, path))


def _read_legacy(path: Path) -> dict[str, np.ndarray]:
    """Reads the format before PyTorch 1.6, still used by torchvision's older weights: pickles, then raw numbers."""
    storages: dict[str, np.ndarray] = {}
    size = path.stat().st_size

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if type(count) is not int or not 0 <= count * dtype.itemsize <= size:
            raise ValueError(f"a storage of {count!r} numbers")
        if key not in storages:
            storages[key] = np.empty(count, dtype)  # filled below: the numbers follow the last pickle
        return storages[key]

    with open(path, "rb") as stream:
        magic, protocol, system, content, keys = (_Unpickler(storage, path).read(stream) for _ in range(5))
        if magic != _LEGACY_MAGIC or protocol != 1001:
            raise InputError(f"{path} is a pickle but was not written by torch.save: {_CONVERT}")
        if not system["little_endian"]:
            raise InputError(f"{path} {_BIG_ENDIAN}")
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
            found = f"its entry {shown(key)} is a {type(value).__name__}"
            raise InputError(f"{path} is not a state dict: {found}. {_CONVERT}")
        yield key, value


class _ScriptModule:
    """Stands for an object of a TorchScript program, whatever its class: attributes, no behaviour."""

    __slots__ = ("_attributes",)

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        if not isinstance(attributes, dict):
            raise ValueError("a module with a state of its own making")
        self._attributes = attributes

    def state_dict(self) -> dict[str, np.ndarray]:
        """The tensors of this module and of its submodules under dotted names; other attributes are dropped."""
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
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}


class _Unpickler:
    """Interprets one pickle, which is a program, with the few instructions that a state dict needs.

    They build numbers, texts, lists, tuples and dicts, and call the functions that ``_find`` allows. Python's own
    unpickler, restricted to the same functions, would still allocate gigabytes for a huge memo index and crash when it
    hashes a deeply nested key. TorchScript objects become ``_ScriptModule``; typed lists and dicts become plain ones.
    """

    def __init__(self, storage: Callable[[str, np.dtype, int], np.ndarray], path: Path) -> None:
        self._storage, self._path = storage, path
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def read(self, stream: BinaryIO) -> Any:
        """The object that the pickle at the stream's position describes."""
        stack, memo = self._stack, self._memo
        for opcode, argument, _ in pickletools.genops(stream):
            match opcode.name:
                case "STOP":
                    (content,) = stack
                    return content
                case "PROTO" | "FRAME":
                    pass
                case name if name in _LITERALS:
                    stack.append(argument)
                case name if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                case name if name in _EMPTY:
                    stack.append(_EMPTY[name]())
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "POP":
                    stack.pop()
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    n = int(opcode.name[-1])
                    stack[-n:] = [tuple(stack[-n:])]
                case "TUPLE":
                    stack.append(tuple(self._since_mark()))
                case "LIST":
                    stack.append(self._since_mark())
                case "DICT":
                    stack.append(_put({}, self._since_mark()))
                case "APPEND" | "APPENDS":
                    items = [stack.pop()] if opcode.name == "APPEND" else self._since_mark()
                    _as(list, stack[-1]).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = [stack.pop(), stack.pop()][::-1] if opcode.name == "SETITEM" else self._since_mark()
                    _put(_as(dict, stack[-1]), items)
                case "GLOBAL":
                    stack.append(self._find(*argument.split(" ", 1)))
                case "STACK_GLOBAL" | "REDUCE" | "NEWOBJ":
                    last, first = stack.pop(), stack.pop()
                    make = {"STACK_GLOBAL": self._find, "REDUCE": _call, "NEWOBJ": _new_object}[opcode.name]
                    stack.append(make(first, last))
                case "BUILD":
                    self._build(stack.pop())
                case "BINPERSID":
                    stack.append(self._find_storage(*stack.pop()))
                case name:
                    raise ValueError(f"the instruction {name}, which no state dict needs")
        raise AssertionError("genops ends with STOP or an error")

    def _since_mark(self) -> list[Any]:
        start = len(self._stack) - 1 - next(i for i, item in enumerate(reversed(self._stack)) if item is _MARK)
        items = self._stack[start + 1 :]
        del self._stack[start:]
        return items

    def _build(self, state: Any) -> None:
        if isinstance(self._stack[-1], _ScriptModule):
            self._stack[-1].set_attributes(state)
        elif not isinstance(self._stack[-1], dict):  # an OrderedDict's attributes are versions of its modules
            raise ValueError("attributes of something that has none")

    def _find_storage(self, kind: str, storage_type: str, key: str, _device: str, count: int, *view: Any) -> np.ndarray:
        """The numbers of one storage, 1-d."""
        _as(str, storage_type), _as(str, key)
        if kind != "storage" or any(part is not None for part in view):
            raise ValueError("a reference to something that is no storage")
        return self._storage(key, _STORAGE_DTYPES[storage_type], count)

    def _find(self, module: str, name: str) -> Any:
        """The allow-list; everything else is refused."""
        _as(str, module), _as(str, name)
        if (module, name) == ("collections", "OrderedDict"):
            return lambda pairs=(): _put({}, [part for key, value in pairs for part in (key, value)])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        is_script_value = module == "torch.jit._pickle" and name in _SCRIPT_VALUES
        if is_script_value or (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda value, *_: value
        if module.split(".")[0] == "__torch__":
            return _ScriptModule
        if module == "torch" and name in _STORAGE_DTYPES:
            return name
        wanted = " ".join(f"{module}.{name}".split())[:80]
        raise InputError(
            f"{self._path} refers to {wanted}; only plain tensors are read, and no code from a file is run. "
            f"Ask its author for a plain state dict, or {_CONVERT}"
        )


def _rebuild_tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
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


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, types.FunctionType):
        raise ValueError("something is called that is no function")
    return function(*_as(tuple, arguments))


def _new_object(kind: Any, arguments: Any) -> _ScriptModule:
    if kind is not _ScriptModule or arguments != ():
        raise ValueError("an object of an unknown class")
    return _ScriptModule()


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} in the place of a {kind.__name__}")
    return value


def _put(found: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    """Adds key, value, key, value, .."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, int, float, bytes)):  # hashing a deeply nested tuple may overrun the C stack
            raise ValueError(f"a {type(key).__name__} as a key")
        found[key] = value
    return found
