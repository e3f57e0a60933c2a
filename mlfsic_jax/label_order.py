"""Does the order in which people look at photos save decisions? A simulation of ``mlfsic_jax.app``.

python -m mlfsic_jax.label_order --config=configs/voc.py:lite0 [--config.FIELD=VALUE ...] [--trials=20]

Each trial draws labels and photos that have one of them. Somebody decides all labels of one photo after the other, and
the model out of the box is fitted after each. Prints Ma-AP on photos that nobody looks at, and how many labels of the
others would be wrong if all were taken as proposed, beside a random order in the same trials.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from mlfsic_jax.run import inputs, proposals, ready
from mlfsic_jax.run.classifier import embed_each, nearest_shots
from mlfsic_jax.run.config import validate
from mlfsic_jax.run.evaluate import macro_ap
from mlfsic_jax.run.explain import THRESHOLD
from mlfsic_jax.run.saved import Predictor
from mlfsic_jax.system.command import run_main
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.flags import parse, run_config
from mlfsic_jax.system.progress import track

_TRIALS = flags.DEFINE_integer("trials", 20, "draws of labels and photos", lower_bound=2)
_PHOTOS, _LABELS, _POOL, _HELD_OUT = 2000, 6, 250, 150
_DECIDED = (0, 5, 10, 20, 40)  # photos after which it is measured


def _entropy(p: np.ndarray, *_) -> np.ndarray:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return -(p * np.log(p) + (1 - p) * np.log1p(-p)).sum(axis=1)


def _fewest(p: np.ndarray, decided: np.ndarray, _) -> np.ndarray:
    return -np.abs(p[:, np.argmin(decided.sum(axis=0))] - THRESHOLD)


# name -> what is looked at first has the highest: probabilities [N, C], decided labels [S, C], random numbers -> [N]
ORDERS: Mapping[str, Callable[..., np.ndarray]] = {
    "random": lambda p, decided, rng: rng.random(len(p)),
    "suggested, nearest to its threshold": lambda p, *_: -np.abs(p - THRESHOLD).min(axis=1),
    "highest entropy of all labels": _entropy,
    "nearest for the label with fewest examples": _fewest,
    "most certain": lambda p, *_: p.max(axis=1),
}


class Trial(NamedTuple):
    """Photos and labels of one draw; the first ``_POOL`` photos are looked at, the others never."""

    features: Mapping[str, np.ndarray]  # [N, ...]
    labels: np.ndarray  # bool [N, C]
    names: tuple[str, ...]  # C names
    words: np.ndarray  # [C, m]


def compare(config: ConfigDict, n_trials: int) -> None:
    """Prints the table; ``InputError`` for a mistake in config or data."""
    validate(config)
    dataset, predictor = inputs.load_dataset(config), ready.load(data_dir=config.data_dir)
    rng = np.random.default_rng(config.seed)
    rows = rng.permutation(len(dataset.labels))[:_PHOTOS]
    features = _embed(predictor, (dataset.load_image(int(i)) for i in rows), len(rows))
    words = inputs.class_mixtures("classes", [[name] for name in dataset.display_names], predictor.encoder)
    found: dict[str, list] = {name: [] for name in ORDERS}
    drawn = _draw(features, dataset.labels[rows], dataset.label_names, words, config.seed, n_trials)
    for seed, trial in enumerate(track(drawn, total=n_trials, description="labelling", unit="trials")):
        for name, order in ORDERS.items():
            found[name].append(label(predictor, trial, order, np.random.default_rng(seed)))
    print(f"{n_trials} draws of {_LABELS} labels of {dataset.name}, {_POOL} photos to label and {_HELD_OUT} held out")
    measures = ("Ma-AP % of the photos held out", "wrong labels % of the others, if taken as proposed")
    for k, measure in enumerate(measures):
        print(f"\n{measure}, by photos decided" + "".join(f"{n:>16}" for n in _DECIDED))
        plain = np.array(found["random"])[..., k]
        for name in ORDERS:
            values = np.array(found[name])[..., k]
            print(f"{name:<{len(measure) + 19}}" + "".join(f"{mean:>16.1f}" for mean in values.mean(axis=0)))
            if name != "random":
                cells = map(_interval, (values - plain).T)
                print(f"{'  - random':<{len(measure) + 19}}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def label(predictor: Predictor, trial: Trial, order: Callable[..., np.ndarray], rng) -> list[tuple[float, float]]:
    """Labels photos of a trial in an order: for each of ``_DECIDED`` Ma-AP and the share of wrong labels, in %."""
    method, truth = next(iter(nearest_shots(predictor, 0).methods)), trial.labels
    decisions: dict[int, dict[str, int]] = {}
    measured = []
    while True:
        fitted = proposals.fit(predictor, method, trial.words, trial.names, trial.features, decisions)
        p, done = fitted.probabilities, list(decisions)
        if len(done) in _DECIDED:
            proposed = p[:_POOL] > THRESHOLD
            proposed[done] = truth[done]
            ap = macro_ap(p[None, _POOL:], truth[None, _POOL:])
            measured.append((100 * ap, 100 * float((proposed != truth[:_POOL]).mean())))
        if len(done) == _DECIDED[-1]:
            return measured
        value = order(p[:_POOL], truth[done].reshape(-1, len(trial.names)), rng)
        value[done] = -np.inf
        chosen = int(value.argmax())
        decisions[chosen] = dict(zip(trial.names, map(int, truth[chosen]), strict=True))


def _embed(predictor: Predictor, photos: Iterable[np.ndarray], n: int) -> dict[str, np.ndarray]:
    trained = nearest_shots(predictor, 0)
    method = next(iter(trained.methods))
    each = embed_each(predictor, proposals.plain(trained, method), method, photos)
    found = list(track(each, total=n, description="features", unit="photos"))
    return {name: np.stack([row[name] for row in found]).astype(np.float16) for name in found[0]}


def _draw(features, labels, names, words, seed: int, n: int) -> Iterator[Trial]:
    """Draws of labels, and of photos with one of them; every label has photos on both sides."""
    rng, n_photos = np.random.default_rng(seed), _POOL + _HELD_OUT
    for _ in range(100 * n):
        chosen = rng.choice(len(names), min(_LABELS, len(names)), replace=False)
        having = rng.permutation(np.flatnonzero(labels[:, chosen].any(axis=1)))[:n_photos]
        own = labels[np.ix_(having, chosen)]
        if len(having) == n_photos and own[:_POOL].any(axis=0).all() and own[_POOL:].any(axis=0).all():
            of_draw = {name: x[having] for name, x in features.items()}
            yield Trial(of_draw, own, tuple(names[c] for c in chosen), words[chosen])
            n -= 1
        if not n:
            return
    raise InputError(f"too few photos: {n_photos} have to have one of {_LABELS} labels, and each label some")


def _interval(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {1.96 * values.std(ddof=1) / len(values) ** 0.5:.1f}"


def main(_) -> None:
    """The command."""
    run_config(lambda config: compare(config, _TRIALS.value))


if __name__ == "__main__":
    run_main(lambda: app.run(main, flags_parser=parse))
