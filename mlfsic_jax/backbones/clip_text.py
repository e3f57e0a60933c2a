"""Vectors of texts in the space that CLIP's image and text encoders share."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mlfsic_jax.backbones.clip import ClipText
from mlfsic_jax.backbones.weights import load_text_encoder
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import stamp
from mlfsic_jax.system.tokens import Tokenizer, read_tokenizer

_START, _END = "<|startoftext|>", "<|endoftext|>"
_ROUND = 8  # texts and tokens are filled up to multiples, so that few programs are compiled
_BATCH = 64  # texts


class TextFiles(NamedTuple):
    """Where a text encoder is."""

    weights: Path  # OpenAI's file of both encoders, or one of the text encoder alone
    tokenizer: Path  # tokenizer.json as published at huggingface.co/openai/clip-vit-base-patch32


def encode_texts(texts: Sequence[str], files: TextFiles) -> np.ndarray:
    """Encodes N texts as float32 [N, e] of length 1. Of a long text the first tokens count, 77 as published.

    Raises:
      InputError: a file is missing or damaged, or they do not fit each other; or a text is empty.
    """
    module, variables, tokenizer = _open(files, *map(stamp, files))
    tokens = tokenizer.encode(texts)
    vectors = np.empty((len(tokens), module.dimension), np.float32)
    for start in range(0, len(tokens), _BATCH):
        rows = tokens[start : start + _BATCH]
        longest = min(_filled(max(map(len, rows))), module.context)
        ids = np.zeros((_filled(len(rows)), longest), np.int32)  # as after the end of OpenAI's texts
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        vectors[start : start + len(rows)] = _encode(module, variables, ids)[: len(rows)]
    return vectors


@functools.partial(jax.jit, static_argnums=0)
def _encode(module: ClipText, variables, ids):
    with jax.default_matmul_precision("highest"):  # accelerators would round the factors
        return module.apply(variables, ids)


def _filled(n: int) -> int:
    return -(-n // _ROUND) * _ROUND


@functools.lru_cache(maxsize=1)  # the labels of each split, and of each set of photos
def _open(files: TextFiles, *_) -> tuple[ClipText, dict[str, Any], Tokenizer]:
    """The encoder, its variables and the tokenizer; read again once the files change."""
    path, get = files.tokenizer, _get(files.tokenizer)
    if not path.is_file():
        raise InputError(f"no tokenizer {path} for CLIP's texts: {get}")
    module, variables = load_text_encoder(files.weights)
    tokenizer = read_tokenizer(path, _START, _END, module.context, get)
    # The encoder takes the highest token for the end.
    if tokenizer.largest != tokenizer.end or tokenizer.end >= module.vocabulary or module.context < 3:
        raise InputError(f"{path} does not fit {files.weights}: {get}")
    return module, jax.device_put(variables), tokenizer


def _get(tokenizer: Path) -> str:
    folder = os.path.dirname(tokenizer.parent) or "."
    to = "" if folder == "data" else f" --data_dir={folder}"
    return f"get it with python -m mlfsic_jax.fetch clip_tokenizer{to}"
