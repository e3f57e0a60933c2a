"""Sentence vectors of all-MiniLM-L6-v2 in JAX, without PyTorch.

A BERT (Devlin et al., NAACL 2019) of 6 layers, distilled as MiniLM (Wang et al., NeurIPS 2020) and tuned on pairs of
sentences (Reimers & Gurevych, EMNLP 2019): the mean of the last layer over a text's tokens, scaled to length 1.
"""

import functools
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import stamp
from mlfsic_jax.system.tokens import Tokenizer, read_tokenizer
from mlfsic_jax.system.untrusted import expand, read_json, reported, shown

FILES = ("model.safetensors", "tokenizer.json")  # those that are needed
_MAX_TOKENS = 256  # as published, with [CLS] and [SEP]
_MIN_PADDED = 16  # tokens: shorter texts share one compiled program
_MIN_ROWS = 8  # texts, likewise
_EPSILON = 1e-12  # of all layer norms
_PREFIXES = ("", "bert.", "0.auto_model.")  # of the keys, by the class that saved them
_WORDS, _POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
_EMBEDDINGS = {_WORDS: "VH", _POSITIONS: "PH", "embeddings.token_type_embeddings.weight": "2H"}
_LAYER = {  # weights by their axes, hidden and inner; each has a bias along the first
    **dict.fromkeys(("attention.self.query", "attention.self.key", "attention.self.value"), "HH"),
    **{"attention.output.dense": "HH", "attention.output.LayerNorm": "H"},
    **{"intermediate.dense": "IH", "output.dense": "HI", "output.LayerNorm": "H"},
}

Params = dict[str, np.ndarray]  # float32, under the published names without their prefix


def encode_texts(texts: Sequence[str], folder: str | os.PathLike[str], batch_size: int = 64) -> np.ndarray:
    """Encodes N texts as float32 [N, d] of length 1; d is 384 for the published model. Tokens beyond 256 are cut.

    Args:
      texts: N texts, in any case.
      folder: holds ``model.safetensors`` and ``tokenizer.json`` as published at
        huggingface.co/sentence-transformers/all-MiniLM-L6-v2. The tensors' shapes give the network's sizes;
        ``config.json``, if it is there, the number of attention heads, which are 32 wide otherwise.
      batch_size: texts per step.

    Raises:
      InputError: the folder or a file is missing or damaged, a tensor is missing or does not fit, or a text is empty.
    """
    if isinstance(texts, str):
        raise InputError(f"encode_texts takes a list of texts: give [{shown(texts)}]")
    params, n_layers, n_heads, tokenizer, limit = _opened(folder)
    tokens, vectors = tokenizer.encode(texts), np.empty((len(texts), params[_WORDS].shape[1]), np.float32)
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))  # similar lengths together: less padding
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, lengths = _pad([tokens[row] for row in rows], limit)
        vectors[rows] = np.asarray(_encode(params, ids, lengths, n_layers, n_heads))[: len(rows)]
    if not np.isfinite(vectors).all():
        file, why = expand(folder) / "model.safetensors", "is damaged (it gives NaN or infinity)"
        raise InputError(f"{file} {why}: delete it and {_get(file.parent)}")
    return vectors


def unread_texts(texts: Sequence[str], folder: str | os.PathLike[str]) -> list[bool]:
    """Whether a text has signs or words that the encoder does not know, such as most of those in other scripts."""
    *_, tokenizer, _ = _opened(folder)
    return [tokenizer.unknown in tokens for tokens in tokenizer.encode(texts)]


def _get(folder: pathlib.Path) -> str:
    to = f" --data_dir={folder.parent}" if folder.name == "minilm" and str(folder.parent) != "data" else ""
    return f"get it with python -m mlfsic_jax.fetch minilm{to}, or name another folder with all-MiniLM-L6-v2"


def _opened(folder: str | os.PathLike[str]) -> tuple[dict[str, jax.Array], int, int, Tokenizer, int]:
    """``_open`` of the folder as it is now; errors as of ``encode_texts``."""
    folder = expand(folder)
    for name in FILES:
        if not (folder / name).is_file():
            raise InputError(f"the folder {folder} of the text encoder has no {name}: {_get(folder)}")
    return _open(folder, *(stamp(folder / name) for name in (*FILES, "config.json")))


@functools.lru_cache(maxsize=1)  # labels are named one after the other
def _open(folder: pathlib.Path, *_) -> tuple[dict[str, jax.Array], int, int, Tokenizer, int]:
    """Tensors, numbers of layers and heads, tokenizer, and the most tokens of a text; read again once files change."""
    params, n_layers = _read_params(folder / "model.safetensors")
    (vocabulary, hidden), limit = params[_WORDS].shape, min(_MAX_TOKENS, len(params[_POSITIONS]))
    n_heads = _read_heads(folder / "config.json", n_layers, hidden)
    path, get = folder / "tokenizer.json", _get(folder)
    tokenizer = read_tokenizer(path, "[CLS]", "[SEP]", limit, get)
    if limit < 3 or tokenizer.largest >= vocabulary:
        raise InputError(f"{path} does not fit model.safetensors: {get}")
    return jax.device_put(params), n_layers, n_heads, tokenizer, limit


def _read_params(path: pathlib.Path) -> tuple[Params, int]:
    """The tensors of a BERT, without those of its pooling layer, and the number of its layers."""
    get = _get(path.parent)
    with (
        reported(f"{path} is cut short or damaged", f"delete it and {get}"),
        safe_open(path, framework="numpy") as file,
    ):
        tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, not a dict
        prefix = next((prefix for prefix in _PREFIXES if prefix + _WORDS in tensors), "")
        start = f"{prefix}encoder.layer."
        n_layers = len({key.removeprefix(start).split(".")[0] for key in tensors if key.startswith(start)})
        named = {f"encoder.layer.{i}.{name}": axes for i in range(max(1, n_layers)) for name, axes in _LAYER.items()}
        expected = _EMBEDDINGS.copy()
        for name, axes in ({"embeddings.LayerNorm": "H"} | named).items():
            expected |= {f"{name}.weight": axes, f"{name}.bias": axes[0]}
        sizes, params = {"2": 2}, {}
        for name, axes in expected.items():
            if prefix + name not in tensors:
                raise InputError(f"{path} is not of a BERT: it has no tensor {prefix}{name}: {get}")
            tensor = tensors[prefix + name]
            shape, dtype = tensor.get_shape(), tensor.get_dtype()
            pairs = zip(axes, shape, strict=False)
            fits = len(shape) == len(axes) and all(sizes.setdefault(axis, n) == n for axis, n in pairs)
            if not fits or dtype not in ("F32", "F16", "BF16"):
                raise InputError(f"{path} is not of a BERT: {prefix}{name} is {dtype} {shape}: {get}")
            params[name] = file.get_tensor(prefix + name).astype(np.float32, copy=False)
    return params, n_layers


def _read_heads(path: pathlib.Path, n_layers: int, hidden: int) -> int:
    """The number of attention heads, from ``config.json`` if there is one."""
    get = _get(path.parent)
    n_heads = None if hidden % 32 else hidden // 32
    if path.is_file():
        with reported(f"{path} is damaged", f"delete it, or {get}"):
            config = dict(read_json(path))
        n_heads = config.get("num_attention_heads")
        for key, value in {"model_type": "bert", "hidden_act": "gelu", "num_hidden_layers": n_layers}.items():
            if config.get(key) != value:
                raise InputError(f"{path}: {key} is {shown(config.get(key))}, but must be {value}: {get}")
    if type(n_heads) is not int or n_heads < 1 or hidden % n_heads:
        raise InputError(f"{path} must have num_attention_heads, a divisor of {hidden}, the width: {get}")
    return n_heads


def _pad(tokens: list[list[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [B, T], B and T powers of two so that few programs are compiled, and lengths int32 [B]."""
    n_rows, longest = (1 << (n - 1).bit_length() for n in (len(tokens), max(map(len, tokens))))
    ids = np.zeros((n_rows := max(n_rows, _MIN_ROWS), min(limit, max(longest, _MIN_PADDED))), np.int32)
    lengths = np.ones(n_rows, np.int32)  # further rows have one token: the mean over none is NaN
    for i, row in enumerate(tokens):
        ids[i, : len(row)], lengths[i] = row, len(row)
    return ids, lengths


@functools.partial(jax.jit, static_argnums=(3, 4))
def _encode(params: Params, ids: jax.Array, lengths: jax.Array, n_layers: int, n_heads: int) -> jax.Array:
    """Token ids int32 [B, T], of which the first ``lengths`` int32 [B] count -> float32 [B, d] of length 1."""
    with jax.default_matmul_precision("highest"):  # accelerators would round the factors
        words, positions, types = (params[name] for name in _EMBEDDINGS)
        x = _layer_norm(params, "embeddings.LayerNorm", words[ids] + positions[: ids.shape[1]] + types[0])
        real = jnp.arange(ids.shape[1]) < lengths[:, None]
        for i in range(n_layers):
            x = _layer(params, f"encoder.layer.{i}.", x, real, n_heads)
    total = jnp.sum(x * real[..., None], axis=1)
    return total / jnp.linalg.norm(total, axis=1, keepdims=True)


def _layer(params: Params, at: str, x: jax.Array, real: jax.Array, n_heads: int) -> jax.Array:
    """float32 [B, T, d], of which ``real`` bool [B, T] are seen -> float32 [B, T, d]."""
    b, t, d = x.shape
    split = (b, t, n_heads, d // n_heads)
    query, key, value = (_dense(params, f"{at}attention.self.{name}", x) for name in ("query", "key", "value"))
    mixed = jax.nn.dot_product_attention(*(y.reshape(split) for y in (query, key, value)), mask=real[:, None, None])
    mixed = _dense(params, f"{at}attention.output.dense", mixed.reshape(b, t, d))
    x = _layer_norm(params, f"{at}attention.output.LayerNorm", x + mixed)
    inner = jax.nn.gelu(_dense(params, f"{at}intermediate.dense", x), approximate=False)
    return _layer_norm(params, f"{at}output.LayerNorm", x + _dense(params, f"{at}output.dense", inner))


def _dense(params: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def _layer_norm(params: Params, name: str, x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _EPSILON)
    return x * params[f"{name}.weight"] + params[f"{name}.bias"]
