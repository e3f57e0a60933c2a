"""Texts as the tokens of a published tokenizer, for all text encoders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import reported, shown


class Tokenizer(NamedTuple):
    """What ``read_tokenizer`` finds."""

    tokenizer: Any  # tokenizers.Tokenizer
    end: int  # the token at the end of every text
    unknown: int | None  # the token of a word that it has no pieces of
    largest: int  # token

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, with those of start and end; ``InputError`` for a text without words."""
        tokens = []
        for text in texts:
            with reported(f"the text {shown(text)} cannot be encoded", "give another"):
                tokens.append(self.tokenizer.encode(text).ids)
            if len(tokens[-1]) <= 2:
                raise InputError(f"the text {shown(text)} has no words: give some")
        return tokens


def read_tokenizer(path: Path, start: str, end: str, limit: int, get: str) -> Tokenizer:
    """Reads a ``tokenizer.json``, to put ``start`` and ``end`` around a text and give at most ``limit`` tokens.

    ``InputError`` for a damaged file; ``get`` says how to get another.
    """
    from tokenizers import Tokenizer as Published
    from tokenizers import processors

    with reported(f"{path} is damaged", f"delete it and {get}"):
        tokenizer = Published.from_file(str(path))
        last, first = ((token, tokenizer.token_to_id(token)) for token in (end, start))
        tokenizer.post_processor = processors.BertProcessing(last, first)  # the library panics at a damaged one
        tokenizer.no_padding()
        tokenizer.enable_truncation(limit)
        return Tokenizer(tokenizer, last[1], tokenizer.token_to_id("[UNK]"), max(tokenizer.get_vocab().values()))
