"""Rules for options: a frozen dataclass checks its fields when it is made."""

from typing import Any


class OptionError(ValueError):
    """Options that cannot work.

    Attributes:
      mistakes: field -> the rule that its value breaks, e.g. ``{"steps": "must be at least 1"}``.
    """

    def __init__(self, options: Any, mistakes: dict[str, str]):
        self.mistakes = mistakes
        lines = (f"{field} = {getattr(options, field)!r}: {rule}" for field, rule in mistakes.items())
        super().__init__(f"{type(options).__name__}: {'; '.join(lines)}")


def require(options: Any, **rules: tuple[bool, str]) -> None:
    """Raises ``OptionError`` with all mistakes of a dataclass instance at once; called by its ``__post_init__``.

    A rule is ``field = (whether its value is allowed, the rule in words)``.
    """
    mistakes = {field: rule for field, (allowed, rule) in rules.items() if not allowed}
    if mistakes:
        raise OptionError(options, mistakes)


def positive(options: Any, *fields: str) -> dict[str, tuple[bool, str]]:
    """Rules for ``require``: these fields are above 0."""
    return {field: (getattr(options, field) > 0, "must be positive") for field in fields}


def one_of(value: Any, allowed: tuple) -> tuple[bool, str]:
    """A rule for ``require``: the value is one of some names."""
    return value in allowed, f"must be one of {', '.join(map(str, allowed))}"
