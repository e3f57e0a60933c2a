"""Test episodes as the page shows them: support photos with maps, query photos with predictions and matches."""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from mlfsic_jax.core.model import attention_values
from mlfsic_jax.data.dataset import ImageDataset
from mlfsic_jax.data.features import View
from mlfsic_jax.methods import Method
from mlfsic_jax.methods.episodic import Episodic
from mlfsic_jax.methods.lcm import LCM
from mlfsic_jax.report import figures
from mlfsic_jax.run import evaluate, inputs, saved
from mlfsic_jax.run.experiment import novel_key
from mlfsic_jax.run.explain import THRESHOLD, strongest_matches
from mlfsic_jax.system.errors import DamagedCopy, InputError

_FIRST = 20  # episodes are picked among the first ones of the test: drawing one means drawing those before it
_LABELS = 6  # of an episode that the page shows
_QUERIES = 24  # the picture at the top of the page is one of them
_RENDERED_SIZE = 256  # pixels of generated scenes in the report; the model sees them smaller
_THUMBNAIL = 232  # pixels

Photos = Callable[[int], np.ndarray]  # row of the novel split -> uint8 [H, W, 3]


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


def show_episodes(workdir: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """What the template fills in for ``count`` test episodes, picked by ``seed``; shot counts take turns.

    ``InputError`` when the run is damaged, or its data are not those that it was trained with.
    """
    predictor = saved.load(workdir)
    config = ml_collections.ConfigDict(predictor.config)
    with contextlib.redirect_stdout(io.StringIO()):  # training has printed the data card
        run = inputs.load(config)
    if predictor.manifest["identity"] != run.identity:
        raise InputError(f"data or weights are not those that {workdir} was trained with: put them back, or retrain")
    novel = run.splits["novel"]
    dataset, photos = photo_loader(config, len(novel.labels))
    display = dict(zip(dataset.label_names, dataset.display_names, strict=True))
    names, photos = np.array([display[name] for name in novel.label_names]), functools.cache(photos)
    shown, picked = [], np.random.default_rng(seed).permutation(min(config.eval.episodes, _FIRST))
    for i in range(count):
        trained = predictor.trained[i % len(predictor.trained)]
        view = inputs.feature_views(run, trained.stores["episodes"]["variables"])["novel"]
        look = look_at(config, view, trained, predictor.grid, int(picked[i % len(picked)]))
        shown.append(_episode(look, names, photos))
    return shown


def photo_loader(config: ml_collections.ConfigDict, n_images: int) -> tuple[ImageDataset, Photos]:
    """The dataset, and the original photo of each of the run's ``n_images`` novel rows; scenes are rendered larger."""
    larger = config.copy_and_resolve_references().unlock()
    larger.data.image_size = max(_RENDERED_SIZE, inputs.image_size(config))
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = inputs.load_dataset(larger)
    images = dataset.splits["novel"].images
    if len(images) > n_images:  # the run left out photos that cannot be read
        every, images = images, []
        for i in every:
            try:
                dataset.load_image(int(i))
                images.append(i)
            except DamagedCopy:
                raise
            except InputError:
                continue  # the run left it out as well
    return dataset, lambda row: dataset.load_image(int(images[row]))


def _episode(look: Look, names: np.ndarray, photos: Photos) -> dict[str, Any]:
    queries = [_query(look, q, names, photos) for q in range(len(look.query))]
    return {
        "n_shot": look.n_shot,
        "number": look.number + 1,
        "explained": look.explanation and next(iter(look.probabilities)),
        "maps": look.maps.keys(),
        "supports": list(_supports(look, names, photos)),
        "queries": queries[: len(look.shown)],
        "best": max(queries, key=lambda query: query["quality"]),
    }


def _supports(look: Look, names: np.ndarray, photos: Photos) -> Iterator[dict[str, Any]]:
    """One support photo for each of the shown labels, two where there are several shots."""
    used: set[int] = set()
    for c in look.shown:
        have = np.flatnonzero(look.support_labels[:, c])
        for s in [s for s in have if s not in used][: min(look.n_shot, 2)] or have[:1]:
            used.add(s)
            small, labels = figures.shrink(photos(look.support[s]), _THUMBNAIL), names[look.support_labels[s]]
            card = {"label": names[c], "labels": labels}
            card["photo"] = figures.image(small, f"Support photo with {', '.join(labels)}")
            if "attention" in look.maps:
                values = look.maps["attention"][:, c]
                limits = values[have].min(), values[have].max()
                alt = f"Attention for {names[c]} over the same photo, brightest where it looks most"
                card["attention"] = figures.image(figures.attention_overlay(small, values[s], limits), alt)
            if "keep" in look.maps:
                importance, keep = look.maps["lcm"][s], look.maps["keep"][s]
                card["kept"] = round(100 * float(keep.mean()))
                alt = f"LCM's importance over the same photo; {card['kept']} % of the positions are kept, others grey"
                card["importance"] = figures.image(figures.importance_overlay(small, importance, keep), alt)
            yield card


def _query(look: Look, q: int, names: np.ndarray, photos: Photos) -> dict[str, Any]:
    """A query photo, what was predicted for it and why."""
    truth, probability = look.query_labels[q], next(iter(look.probabilities.values()))[q]
    matches, evidence = [], {}
    if look.explanation is not None:
        pairs, dual, prior = look.explanation["pairs"][q], look.explanation["dual"], look.explanation["prior"][q]
        matches = strongest_matches(pairs, dual, probability, names, look.grid[1], max_supports=figures.MAX_SUPPORTS)
        sums = dict(zip(names, zip(np.einsum("slm,sc->c", pairs, dual), prior, strict=True), strict=True))
        evidence = {match.label: sums[match.label] for match in matches}  # by regions, by words
    colours = figures.match_colours(matches)
    rows = [
        match._asdict() | {"colour": colours[match.label], "in": names[look.support_labels[match.support]]}
        for match in matches
    ]

    def draw(size: int, inches: float) -> dict[str, Any]:
        beside = sorted({match.support for match in matches})
        query, *supports = (figures.shrink(photos(row), size // 2) for row in (look.query[q], *look.support[beside]))
        local = [match._replace(support=beside.index(match.support)) for match in matches]
        ends = [f"a region joined to one of a photo of {', '.join(row['in'])} for {row['label']}" for row in rows]
        figure = figures.match_figure(query, supports, local, look.grid, inches)
        return figures.image(figures.rasterise(figure, size), "; ".join(["Query photo of the episode", *ends]))

    right, wrong = (probability > THRESHOLD) & truth, (probability > THRESHOLD) != truth
    return {
        "truth": names[truth],
        "draw": draw,
        "matches": rows,
        "evidence": evidence,
        "predictions": {
            name: [(names[c], float(p[q, c]), truth[c]) for c in np.argsort(-p[q], kind="stable")]
            for name, p in look.probabilities.items()
        },
        # for the picture at the top: right without a mistake, many labels, sure of them
        "quality": (int(right.sum()) - int(wrong.sum()), float(probability[right].sum())),
    }


def look_at(
    config: ml_collections.ConfigDict, view: View, trained: saved.Trained, grid: tuple[int, int], number: int
) -> Look:
    """Repeats an episode of the evaluation on ``view``, the novel split as local features on the ``grid`` (h, w)."""
    episode_key, _ = jax.random.split(novel_key(config.seed, trained.n_shot))
    supports, queries = evaluate.draw(episode_key, view, number + 1, trained.n_shot, config.eval.n_query)
    support, query = supports[number], queries[number]
    shown = np.sort(np.random.default_rng(number).permutation(view.labels.shape[1])[:_LABELS])
    first = [query[view.labels[query, c].argmax()] for c in shown]
    query = np.array(list(dict.fromkeys([*first, *query]))[:_QUERIES])
    labels, n = view.labels[support], len(support)
    explained, mapped = _choose(trained)
    methods = {name: trained.methods[name] for name in (explained, mapped) if name}
    taught = {name: saved.trained_of(trained, name) for name in methods}
    embedded = evaluate.embed(methods, taught, view, np.concatenate([support, query]))
    probabilities, explanations, maps = {}, {}, {}
    for name, method in methods.items():
        images = embedded[method.embed_key(taught[name])]
        s, q = ({key: x[part] for key, x in images.items()} for part in np.s_[:n, n:])
        found = _apply(method, taught[name], view.words(method.words_from), s, labels, q)
        scores, explanations[name], here = jax.device_get(found)
        probabilities[name] = np.clip(evaluate.probabilities(method, scores, trained.calibration.get(name)), 0, 1)
        if name == mapped:
            maps = here
    maps = {key: x.reshape(*x.shape[:-1], *grid) for key, x in maps.items()}
    episode = (support, labels, shown, query, view.labels[query])
    return Look(trained.n_shot, number, grid, *episode, probabilities, explanations[explained], maps)


def _choose(trained: saved.Trained) -> tuple[str, str | None]:
    """The method to explain, the best on validation labels that can be; and one that attends, LCM if evaluated."""
    methods = {name: trained.methods[name] for name in trained.validation}
    explaining = [name for name, m in methods.items() if m.adapts and type(m).explain is not Method.explain]
    attending = [name for name, method in methods.items() if isinstance(method, Episodic) and not method.on_request]
    explained = max(explaining or methods, key=trained.validation.get)

    def preferred(name):
        return name == "lcm", isinstance(methods[name], LCM)

    return explained, max(attending, key=preferred, default=None)


@functools.partial(jax.jit, static_argnums=0)
def _apply(method: Method, trained, words, support, labels, query):
    """(scores, explanation or None, the maps of ``Look``)."""
    support = {**support, **method.embed_support(trained, support, labels, words)}
    state, maps = method.fit(trained, support, labels, words), {}
    if isinstance(method, Episodic):
        joint_words = method.model.apply(trained["variables"], words, method="words")
        maps["attention"] = attention_values(method.model, trained["variables"], support["joint"], joint_words)
    if isinstance(method, LCM):
        maps |= {"lcm": support["lcm"], "keep": state["keep"]}
    return method.score(trained, state, query), method.explain(trained, state, query), maps
