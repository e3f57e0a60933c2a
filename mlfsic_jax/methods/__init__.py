"""The methods by name. To add one, write a subclass of ``Method`` in a file of its own and a line in ``METHODS``.

Its options become a section of the config; evaluation, own photos, report and tables pick it up by themselves.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlfsic_jax.methods.base import Method
from mlfsic_jax.methods.class_words import (
    ClassWordRidge,
    ClassWords,
    MadeUpNames,
    PermutedNames,
    WithoutKinds,
    WithoutNames,
)
from mlfsic_jax.methods.classifier import Classifier, ClassifierPretrained
from mlfsic_jax.methods.closed_form import Prototypes, Ridge
from mlfsic_jax.methods.episodic import Base, BaseUntrained, ZeroShot
from mlfsic_jax.methods.joined import LCMRegions, PrototypeRidge
from mlfsic_jax.methods.laso import LaSO
from mlfsic_jax.methods.lcm import (
    LCM,
    BaseTuned,
    LCMAllTuned,
    LCMPermutedWords,
    LCMRandomScores,
    LCMRandomWords,
    LCMUntuned,
)
from mlfsic_jax.methods.logistic import Logistic
from mlfsic_jax.methods.maml import MAML
from mlfsic_jax.methods.pla import PLA
from mlfsic_jax.methods.word_ridge import PermutedWords, RegionWordRidge, WordRidge

__all__ = ["METHODS", "Method", "create", "trained_of"]

METHODS: dict[str, Method] = {
    "zero_shot": ZeroShot(),
    "prototypes": Prototypes(),
    "prototypes_centered": Prototypes(centred=True),
    "ridge": Ridge(),
    "word_ridge": WordRidge(),
    "word_ridge_permuted_words": PermutedWords(),
    "region_word_ridge": RegionWordRidge(),
    "class_words": ClassWords(),
    "class_word_ridge": ClassWordRidge(),
    "class_word_ridge_no_kinds": WithoutKinds(),
    "class_word_ridge_no_names": WithoutNames(),
    "class_word_ridge_permuted": PermutedNames(),
    "class_word_ridge_made_up": MadeUpNames(),
    "base_untrained": BaseUntrained(),
    "base": Base(),
    "lcm_random_scores": LCMRandomScores(),
    "lcm_untuned": LCMUntuned(),
    "lcm": LCM(),
    "lcm_permuted_words": LCMPermutedWords(),
    "lcm_random_words": LCMRandomWords(),
    "base_tuned": BaseTuned(),
    "lcm_all_tuned": LCMAllTuned(),
    "region_word_ridge_lcm": LCMRegions(),
    "base_ridge": PrototypeRidge(select=False),
    "lcm_ridge": PrototypeRidge(),
    "classifier": Classifier(),
    "classifier_pretrained": ClassifierPretrained(),
    "logistic": Logistic(),
    "maml": MAML(),
    "maml_first_order": MAML(first_order=True),
    "laso": LaSO(),
    "pla": PLA(),
    "pla_words": PLA(words=True),
}


def create(name: str, **options: Any) -> Method:
    """A method by name; ``options`` replace its defaults.

    Raises:
      ValueError: no method has this name, or a value is not allowed (``core.options.OptionError``).
      TypeError: the method has no such option.
    """
    if name not in METHODS:
        raise ValueError(f"no method {name!r}: choose one of {', '.join(METHODS)}")
    return dataclasses.replace(METHODS[name], **options)


def trained_of(method: Method, stores: Mapping[str, Any], value: Any = None) -> dict[str, Any]:
    """Assembles the ``trained`` of a method from its stores: name -> the result of ``train``.

    ``value``, of the leaf ``tuned``, is a float or all candidates; ``ValueError`` where a tuned method has none.
    """
    if method.tuned and value is None:
        raise ValueError(f"{type(method).__name__} needs a value of {method.tuned}")
    trained = {name: leaf for store in method.stores for name, leaf in stores[store].items()}
    return trained | {method.tuned: np.float32(value)} if method.tuned else trained
