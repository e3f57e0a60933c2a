"""Names of labels as a user types them, and as a cell of a table holds them."""

import json
import os
from collections.abc import Callable, Iterable, Sequence

from mlfsic_jax.data.tables import FLAGS
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import label_name

_SEPARATORS = set("|;#,")  # of labels in a cell


def parse_labels(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """Names and wordings of ``--labels``: "cat, dog = dog | puppy" -> ["cat", "dog"], {"dog": ["dog", "puppy"]}."""
    if os.path.splitext(text)[1] and os.path.isfile(text):
        raise InputError(f"--labels={text} is a file: write names with commas between them")
    names, wordings = [], {}
    for part in text.split(","):
        name, given, wording = (piece.strip() for piece in part.partition("="))
        if not name:
            raise InputError(f'--labels="{text}" has an empty name: write names with commas between them')
        if {"|", ";"}.intersection(name):
            raise InputError(f'--labels="{text}": is {name!r} several labels? write names with commas between them')
        name = label_name(name, "--labels")
        if name in names:
            raise InputError(f'--labels="{text}" has {name!r} twice: name it once')
        names.append(name)
        if given:
            wordings[name] = [piece.strip() for piece in wording.split("|")]
            if not all(wordings[name]):
                raise InputError(f"--labels: a wording of {name!r} is empty: write {name} = {name} | another wording")
    return names, wordings


def cell_writer(label_names: Iterable[str]) -> Callable[[Sequence[str]], str]:
    """How a cell of a table holds some of these labels, so that they are read back.

    As a|b or, where names could be taken for several or for flags, as a list in JSON.
    """
    in_lists = any(_SEPARATORS & set(name) or name[0] in "[{" or name.casefold() in FLAGS for name in label_names)
    return (lambda names: json.dumps(names, ensure_ascii=False) if names else "") if in_lists else "|".join
