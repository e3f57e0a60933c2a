"""Reads state dicts from PyTorch's files without PyTorch and without running any code from them."""

import dataclasses
import io
import math
import pickletools
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import check_expansion, shown

_DEEPEST = 4  # dicts within dicts in which state dicts are looked for
_USUAL = ("state_dict", "model_state_dict", "model", "net", "network")  # what training scripts call them
_AVERAGES = {"ema", "swa", "average", "averaged", "shadow"}  # words in the names of averages over training
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LONGEST_KEY = 1000  # characters
_MOST_LISTED = 8  # state dicts in a message
# Nearly all that is refused here is refused by weights_only=True as well.
_CONVERT = (
    "if you trust it, for this runs code in it, convert it where PyTorch is installed: "
    'x = torch.load(path, "cpu", weights_only=False); state = the dict of tensors in x, or x.state_dict() of a module; '
    'safetensors.torch.save_file({k: t.contiguous().clone() for k, t in state.items()}, "weights.safetensors")'
)
_BIG_ENDIAN = f"was written on a big-endian machine, which is not supported: {_CONVERT}"
_STORAGE_DTYPES = {
    f"{name}Storage": np.dtype(dtype)
    for name, dtype in {
        **{"Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16},
        **{"Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_},
        **{"ComplexFloat": np.complex64, "ComplexDouble": np.complex128},
        **{"QInt32": np.int32, "QInt8": np.int8, "QUInt8": np.uint8, "Untyped": np.uint8},
    }.items()
}
_SCRIPT_VALUES = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
_PARAMETERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Numbers that stand somewhere in the file."""

    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage, whose numbers are read when it is known to be wanted."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self, numbers: np.ndarray) -> np.ndarray:
        """The tensor as a read-only view of its storage's numbers."""
        if math.prod(self.size) == 0:
            return np.zeros(self.size, numbers.dtype)
        steps = [step * numbers.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.size, steps, writeable=False)


class _Ignored:
    """Stands for an object of any other class, which is not built, and for all that the file does with it."""


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """Reads the state dict in torch.save's zip archive, a TorchScript archive, or the format before PyTorch 1.6.

    It may lie in other dicts, beside things of any kind, which are passed over. Of several the one under a usual name,
    then the largest, is taken, an average over training (EMA) last; a line on standard error says which. In a zip
    archive, ``<root>/data.pkl`` describes the tensors and ``<root>/data/<n>`` holds their raw numbers.

    Raises ``InputError`` for a file of another kind or without tensors, errors of all kinds for damaged ones.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            start = file.read(2)
        if start[:1] == b"\x80":
            return _read_legacy(path)
        if start == b"PK":
            raise ValueError("its end is missing")
        raise InputError(f"{path} is not a file written by torch.save: get it again")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        roots = [name.split("/")[0] for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise InputError(f"{path} is a zip file but was not written by torch.save: get it again")
        if f"{roots[0]}/byteorder" in names and archive.read(f"{roots[0]}/byteorder") != b"little":
            raise InputError(f"{path} {_BIG_ENDIAN}")
        check_expansion(archive, path)
        pickle = _Unpickler()
        tensors = _state_dict(pickle.read(io.BytesIO(archive.read(f"{roots[0]}/data.pkl"))), pickle.ignored, path)
        numbers = {  # tensors may share them
            storage: np.frombuffer(archive.read(f"{roots[0]}/data/{storage.key}"), storage.dtype, storage.count)
            for storage in {tensor.storage for tensor in tensors.values()}
        }
    return {name: tensor.array(numbers[tensor.storage]) for name, tensor in tensors.items()}


def _read_legacy(path: Path) -> dict[str, np.ndarray]:
    """Reads the format before PyTorch 1.6, still used by torchvision's older weights: pickles, then raw numbers."""
    with open(path, "rb") as stream:
        pickles = [_Unpickler() for _ in range(5)]
        magic, protocol, system, content, keys = (pickle.read(stream) for pickle in pickles)
        if magic != _LEGACY_MAGIC or protocol != 1001:
            raise InputError(f"{path} is a pickle but was not written by torch.save: {_CONVERT}")
        if not system["little_endian"]:
            raise InputError(f"{path} {_BIG_ENDIAN}")
        tensors = _state_dict(content, pickles[3].ignored, path)
        wanted, size = {tensor.storage for tensor in tensors.values()}, path.stat().st_size
        numbers = {}
        for key in keys:
            storage, count = pickles[3].storages[key], int.from_bytes(stream.read(8), "little")
            n_bytes = count * storage.dtype.itemsize
            if count != storage.count or stream.tell() + n_bytes > size:
                raise ValueError(f"storage {key} is cut short")
            if storage in wanted:
                numbers[storage] = np.frombuffer(stream.read(n_bytes), storage.dtype)
            else:
                stream.seek(n_bytes, 1)
    return {name: tensor.array(numbers[tensor.storage]) for name, tensor in tensors.items()}


def _state_dict(content: Any, ignored: list[str], path: Path) -> dict[str, _Tensor]:
    """The state dict in what a file holds; ``ignored`` names what was not built."""
    if isinstance(content, _ScriptModule):
        content = content.state_dict()
    found = _state_dicts(content) if isinstance(content, dict) else {}
    if not found:
        if ignored:
            what = f"refers to {ignored[0]}; only plain tensors are read, and no code from a file is run"
            raise InputError(f"{path} {what}. Ask its author for a plain state dict, or, {_CONVERT}")
        if content == {}:
            return {}
        if not isinstance(content, dict):
            raise InputError(f"{path} holds a {type(content).__name__}, not the state dict of a module: {_CONVERT}")
        key, value = next(iter(content.items()))
        what = f"its entry {shown(key)} is a {type(value).__name__}"
        raise InputError(f"{path} is not a state dict: {what}. {_CONVERT}")

    def rank(place: str) -> tuple[bool, bool, int]:
        is_average = not _AVERAGES.isdisjoint(re.split("[^a-z]+", place.lower()))
        return is_average, place.rpartition(".")[2] not in _USUAL, -len(found[place])

    taken, *others = sorted(found, key=rank)
    if others:
        named, *rest = (shown(place) if place else "the outermost dict" for place in (taken, *others[:_MOST_LISTED]))
        print(f"{path}: weights are taken from {named}, not from {', '.join(rest)}", file=sys.stderr, flush=True)
    return found[taken]


def _state_dicts(content: dict[Any, Any]) -> dict[str, dict[str, _Tensor]]:
    """The dicts of weights in a dict by their place, such as "ema.module"; "" is the dict itself."""
    found, seen, level = {}, set(), [("", content)]
    for _ in range(_DEEPEST):
        inner = []
        for place, entries in level:
            if id(entries) in seen:  # a file may claim that a dict holds itself
                continue
            seen.add(id(entries))
            named = [(key, value) for key, value in entries.items() if isinstance(key, str)]
            found[place] = {key: value for key, value in named if isinstance(value, _Tensor)}
            dicts = [(key, value) for key, value in named if isinstance(value, dict) and "optim" not in key.lower()]
            inner += [(f"{place}.{key}".lstrip("."), value) for key, value in dicts]
        level = inner

    def has_weights(tensors: dict[str, _Tensor]) -> bool:
        return any(math.prod(t.size) > 1 and t.storage.dtype.kind in "fV" for t in tensors.values())

    weights = {place: tensors for place, tensors in found.items() if has_weights(tensors)}
    return weights or {place: tensors for place, tensors in found.items() if tensors and not place}


class _ScriptModule:
    """Stands for an object of a TorchScript program, whatever its class: attributes, no behaviour."""

    __slots__ = ("_attributes",)

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        if not isinstance(attributes, dict):
            raise ValueError("a module with a state of its own making")
        self._attributes = attributes

    def state_dict(self) -> dict[str, _Tensor]:
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
                if isinstance(value, _Tensor):
                    tensors[f"{prefix}{name}"] = value
                elif isinstance(value, _ScriptModule):
                    pending.append((f"{prefix}{name}.", value))
        return tensors


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}


class _Unpickler:
    """Interprets one pickle, which is a program, with the few instructions that files of weights need.

    They build numbers, texts, lists, tuples and dicts, and call the functions that ``_find`` allows; all else becomes
    ``_Ignored``. Python's own unpickler, restricted to the same functions, would still allocate gigabytes for a huge
    memo index and crash when it hashes a deeply nested key. TorchScript objects become ``_ScriptModule``; sets, typed
    lists and dicts become plain lists and dicts.

    Attributes:
      storages: by their keys, in the order of the pickle.
      ignored: names of what became ``_Ignored``.
    """

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}
        self.ignored: list[str] = []
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
                case "LIST" | "FROZENSET":
                    stack.append(self._since_mark())
                case "DICT":
                    stack.append(_put({}, self._since_mark()))
                case "APPEND" | "APPENDS" | "ADDITEMS":
                    items = [stack.pop()] if opcode.name == "APPEND" else self._since_mark()
                    if not isinstance(stack[-1], _Ignored):
                        _as(list, stack[-1]).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = [stack.pop(), stack.pop()][::-1] if opcode.name == "SETITEM" else self._since_mark()
                    if not isinstance(stack[-1], _Ignored):
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
            self._stack[-1].set_attributes({} if isinstance(state, _Ignored) else state)
        elif not isinstance(self._stack[-1], (dict, _Ignored)):  # an OrderedDict's are versions of its modules
            raise ValueError("attributes of something that has none")

    def _find_storage(self, kind: str, storage_type: Any, key: str, _device: Any = None, *sizes: Any) -> Any:
        if kind == "module" or isinstance(storage_type, _Ignored):  # a class, or numbers that NumPy does not know
            return storage_type
        count, *view = sizes
        _as(str, storage_type), _as(str, key)
        if kind != "storage" or any(part is not None for part in view) or type(count) is not int or count < 0:
            raise ValueError("a reference to something that is no storage")
        return self.storages.setdefault(key, _Storage(key, _STORAGE_DTYPES[storage_type], count))

    def _find(self, module: str, name: str) -> Any:
        """The allow-list; nothing else of the file's is found."""
        _as(str, module), _as(str, name)
        if (module, name) == ("collections", "OrderedDict"):
            return lambda pairs=(): _put({}, [part for key, value in pairs for part in (key, value)])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        is_script_value = module == "torch.jit._pickle" and name in _SCRIPT_VALUES
        if is_script_value or (module == "torch._utils" and name in _PARAMETERS):
            return lambda value, *_: value
        if module.split(".")[0] == "__torch__":
            return _ScriptModule
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return name
        self.ignored.append(" ".join(f"{module}.{name}".split())[:80])
        return _Ignored()


def _rebuild_tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> _Tensor | _Ignored:
    """torch._utils._rebuild_tensor_v2; gradients and hooks are dropped."""
    if isinstance(storage, _Ignored):
        return storage
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without storage")
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise ValueError(f"a tensor of impossible layout {shown((offset, size, stride))}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.count:  # as_strided would read past the end
        raise ValueError(f"a tensor reaches element {last} of {storage.count}")
    return _Tensor(storage, offset, size, stride)


def _call(function: Any, arguments: Any) -> Any:
    if isinstance(function, _Ignored):
        return function
    if not isinstance(function, types.FunctionType):
        raise ValueError("something is called that is no function")
    return function(*_as(tuple, arguments))


def _new_object(kind: Any, arguments: Any) -> _ScriptModule | _Ignored:
    if isinstance(kind, _Ignored):
        return kind
    if kind is not _ScriptModule or arguments != ():
        raise ValueError("an object of an unknown class")
    return _ScriptModule()


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} in the place of a {kind.__name__}")
    return value


def _put(found: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    """Adds key, value, key, value, .., without keys that weights have not."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, (str, int, float, bytes)):  # hashing a deeply nested tuple may overrun the C stack
            found[key] = value
    return found
