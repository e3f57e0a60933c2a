"""One test episode from within: what the evaluation computed on the way to its scores."""

import functools
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from mlfsic_jax.core.model import attention_values
from mlfsic_jax.data.features import View
from mlfsic_jax.methods import Method
from mlfsic_jax.methods.episodic import LCM, Episodic
from mlfsic_jax.run import evaluate
from mlfsic_jax.run.experiment import novel_key
from mlfsic_jax.run.saved import Trained, trained_of

_LABELS = 6  # of an episode that the page shows
_QUERIES = 24  # the picture at the top of the page is one of them


class Look(NamedTuple):
    """One test episode: S support images, Q of its queries, C labels, maps of h x w positions."""

    n_shot: int
    number: int  # of the episode, from 0
    grid: tuple[int, int]  # (h, w)
    support: np.ndarray  # int [S], rows of the novel split
    support_labels: np.ndarray  # bool [S, C]
    shown: np.ndarray  # int, the labels that the page shows
    query: np.ndarray  # int [Q], rows; the first ones have those labels
    query_labels: np.ndarray  # bool [Q, C]
    probabilities: dict[str, np.ndarray]  # method -> float [Q, C]; the method to explain comes first
    explanation: dict[str, np.ndarray] | None  # ``Method.explain`` of that method
    # "attention" float [S, C, h, w], ``core.model.attention_values``, unless no method attends; of LCM also its score
    # "lcm" float [S, h, w], which theta is compared with, and "keep" bool [S, h, w]
    maps: dict[str, np.ndarray]


def look_at(
    config: ml_collections.ConfigDict, view: View, trained: Trained, grid: tuple[int, int], number: int
) -> Look:
    """Repeats an episode of the evaluation on ``view``, the novel split as local features on the ``grid`` (h, w)."""
    episode_key, _ = jax.random.split(novel_key(config.seed, trained.n_shot))
    supports, queries = evaluate.draw(episode_key, view, number + 1, trained.n_shot, config.eval.n_query)
    support, query = supports[number], queries[number]
    shown = np.sort(np.random.default_rng(number).permutation(view.labels.shape[1])[:_LABELS])
    first = [query[view.labels[query, c].argmax()] for c in shown]
    query = np.array(list(dict.fromkeys([*first, *query]))[:_QUERIES])
    labels, words, n = view.labels[support], view.word_vectors, len(support)
    explained, mapped = _choose(trained)
    methods = {name: trained.methods[name] for name in (explained, mapped) if name}
    taught = {name: trained_of(trained, name) for name in methods}
    embedded = evaluate.embed(methods, taught, view, np.concatenate([support, query]))
    probabilities, explanations, maps = {}, {}, {}
    for name, method in methods.items():
        images = embedded[method.embed_key(taught[name])]
        s, q = ({key: x[part] for key, x in images.items()} for part in np.s_[:n, n:])
        s |= evaluate.embed_support(method, taught[name], s, np.arange(n), labels, words)
        found = _apply(method, taught[name], words, s, labels, q)
        scores, state, explanations[name], attention = jax.device_get(found)
        probabilities[name] = np.clip(evaluate.probabilities(scores, trained.calibration.get(name)), 0, 1)
        if name == mapped:
            lcm = {"lcm": s["lcm"], "keep": state["keep"]} if isinstance(method, LCM) else {}
            maps = {"attention": attention, **lcm}
    maps = {key: x.reshape(*x.shape[:-1], *grid) for key, x in maps.items()}
    episode = (support, labels, shown, query, view.labels[query])
    return Look(trained.n_shot, number, grid, *episode, probabilities, explanations[explained], maps)


def _choose(trained: Trained) -> tuple[str, str | None]:
    """The method to explain, the best on validation labels that can be; and one that attends, LCM if evaluated."""
    methods = {name: trained.methods[name] for name in trained.validation}
    explaining = [name for name, method in methods.items() if type(method).explain is not Method.explain]
    attending = [name for name, method in methods.items() if type(method).embed is Episodic.embed]
    explained = max(explaining or methods, key=trained.validation.get)
    return explained, max(attending, key=lambda name: isinstance(methods[name], LCM), default=None)


@functools.partial(jax.jit, static_argnums=0)
def _apply(method: Method, trained, words, support, labels, query):
    """(scores, state, explanation or None, ``attention_values`` or None)."""
    state = method.fit(trained, support, labels, words)
    attention = None
    if "joint" in support:
        joint_words = method.model.apply(trained["variables"], words, method="words")
        attention = attention_values(method.model, trained["variables"], support["joint"], joint_words)
    return method.score(trained, state, query), state, method.explain(trained, state, query), attention
