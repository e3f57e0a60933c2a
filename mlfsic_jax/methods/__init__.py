"""The peers that the paper compares with: one file each, one interface, on the same frozen local features.

Those without training (``closed_form``) are pure functions ``(support, labels, query) -> scores``: float [S, n],
bool [S, C], float [Q, n] -> float [Q, C], higher for likelier labels, with the decision threshold at 0.5. All others
are a ``Peer``, by name in ``PEERS``. Their settings are keyword arguments of their functions; what the papers leave
open was chosen on the validation labels of VOC 2007.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from mlfsic_jax.methods import classifier, laso, logistic, maml, pla


class Peer(NamedTuple):
    """A method that adapts to a support set, perhaps after training on base labels.

    Attributes:
      train: ``(key, base, *, n_shot, n_query) -> trained``, a pytree of arrays, from an ``View`` whose
        inputs are local features; reports its progress.
      score: ``(trained, key, support float32 [S, L, n], labels bool [S, C], query float32 [Q, L, n],
        word_vectors float32 [C, d_w]) -> probabilities float32 [Q, C]``, pure and traceable.
    """

    train: Callable
    score: Callable


PEERS = {
    "classifier": Peer(classifier.train, classifier.score),
    "logistic": Peer(logistic.train, logistic.score),
    "maml": Peer(maml.train, maml.score),
    "maml_first_order": Peer(functools.partial(maml.train, first_order=True), maml.score),
    "laso": Peer(laso.train, laso.score),
    "pla": Peer(pla.train, pla.score),
    "pla_words": Peer(functools.partial(pla.train, words=True), functools.partial(pla.score, words=True)),
}
