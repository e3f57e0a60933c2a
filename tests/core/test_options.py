"""Options say what is wrong with them, all at once."""

import dataclasses

import pytest

from mlfsic_jax.core.options import OptionError, one_of, positive, require


@dataclasses.dataclass(frozen=True)
class Oven:
    heat: float = 200.0
    minutes: int = 30
    mode: str = "fan"

    def __post_init__(self):
        require(self, **positive(self, "heat", "minutes"), mode=one_of(self.mode, ("fan", "grill")))


def test_allowed_options_pass():
    assert dataclasses.replace(Oven(), heat=0.1, mode="grill").heat == 0.1


def test_all_mistakes_are_named_at_once_with_their_rules():
    with pytest.raises(OptionError) as caught:
        Oven(heat=-1.0, minutes=0, mode="steam")
    assert isinstance(caught.value, ValueError)
    rules = {"heat": "must be positive", "minutes": "must be positive", "mode": "must be one of fan, grill"}
    assert caught.value.mistakes == rules
    expected = "Oven: heat = -1.0: must be positive; minutes = 0: must be positive; mode = 'steam': must be one of fan"
    assert str(caught.value) == f"{expected}, grill"


def test_a_number_that_is_not_finite_is_not_positive():
    with pytest.raises(OptionError, match="heat = nan: must be positive"):
        Oven(heat=float("nan"))


def test_other_fields_are_not_blamed():
    with pytest.raises(OptionError) as caught:
        Oven(minutes=-5)
    assert set(caught.value.mistakes) == {"minutes"}
