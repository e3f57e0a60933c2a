"""How the options of word_ridge and region_word_ridge were chosen: one at a time, on validation episodes.

python -m mlfsic_jax.ridge_sweep --config=configs/voc.py:cpu [--config.FIELD=VALUE ...] [--method=NAME ...]

Prints Ma-AP on validation labels for each shot count; needs a frozen backbone, and no trained model.
"""

from collections.abc import Iterator, Mapping

import jax
from absl import app, flags
from ml_collections import ConfigDict

from mlfsic_jax.methods import METHODS, trained_of
from mlfsic_jax.run import evaluate, experiment, inputs
from mlfsic_jax.run.config import validate
from mlfsic_jax.system.command import run_main
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.flags import parse, run_config

GRID = {
    "ridge.beta": (0, 0.25, 0.5, 1),
    "ridge.regulariser": (0.3, 1, 3),
    "ridge.region_regulariser": (0.1, 0.3, 1),
    "ridge.classifier_regulariser": (100, 300, 1000),
    "ridge.word_regulariser": (0.03, 0.1, 0.3),
    "ridge.n_components": (160, 320, 640),
}
_METHODS = flags.DEFINE_multi_enum("method", ["word_ridge", "region_word_ridge"], list(METHODS), "what to sweep")


def sweep(config: ConfigDict, names: tuple[str, ...], grid: Mapping[str, tuple] = GRID) -> None:
    """Prints one row per setting of methods: every field of the grid takes its values, the others stay.

    ``InputError`` for a mistake in config or data.
    """
    validate(config)
    if config.train_backbone:
        raise InputError("config.train_backbone = True: the sweep needs a frozen backbone")
    episodic = [name for name in names if "episodes" in METHODS[name].stores]
    if episodic:
        raise InputError(f"--method={episodic[0]} needs a model trained by episodes: sweep it with mlfsic_jax.main")
    rows = list(settings(config, grid))
    views = inputs.feature_views(inputs.load(config))
    columns = [f"{name}, {k}-shot" for name in names for k in config.shots]
    print(f"Ma-AP %, {config.eval.sweep_episodes} validation episodes, * marks the default")
    print(f"{'setting':<32}" + "".join(f"{c:>27}" for c in columns), flush=True)
    for label, changed in rows:
        by_shots = []
        for n_shot in config.shots:
            methods, stores = experiment.open_methods(changed, n_shot, views["base"], names=names)
            scores = evaluate.score_episodes(
                *(methods, {name: trained_of(method, stores) for name, method in methods.items()}, views["validation"]),
                key=jax.random.fold_in(jax.random.key(config.seed), n_shot),
                n_episodes=config.eval.sweep_episodes,
                n_shot=n_shot,
                n_query=config.eval.n_query,
            )
            by_shots.append({name: evaluate.macro_ap(values, scores.labels) for name, values in scores.methods.items()})
        cells = [found[name] for name in names for found in by_shots]
        print(f"{label:<32}" + "".join(f"{100 * cell:>27.2f}" for cell in cells), flush=True)


def settings(config: ConfigDict, grid: Mapping[str, tuple]) -> Iterator[tuple[str, ConfigDict]]:
    """(label, config) for every value of every field."""
    for field, value in ((field, value) for field, values in grid.items() for value in values):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({field: value})
        validate(changed)
        yield f"{field.rpartition('.')[2]} {value}{' *' if changed.to_dict() == config.to_dict() else ''}", changed


if __name__ == "__main__":
    run_main(
        lambda: app.run(
            lambda argv: run_config(lambda config: sweep(config, tuple(_METHODS.value))), flags_parser=parse
        )
    )
