"""Names of labels as a user types them."""

from mlfsic_jax.system.errors import InputError


def parse_labels(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """Names and wordings of ``--labels``: "cat, dog = dog | puppy" -> ["cat", "dog"], {"dog": ["dog", "puppy"]}."""
    names, wordings = [], {}
    for part in text.split(","):
        name, given, wording = (piece.strip() for piece in part.partition("="))
        if not name:
            raise InputError(f'--labels="{text}" has an empty name: write names with commas between them')
        if name in names:
            raise InputError(f'--labels="{text}" has {name!r} twice: name it once')
        names.append(name)
        if given:
            wordings[name] = [piece.strip() for piece in wording.split("|")]
            if not all(wordings[name]):
                raise InputError(f"--labels: a wording of {name!r} is empty: write {name} = {name} | another wording")
    return names, wordings
