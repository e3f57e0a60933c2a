"""How the settings of word_ridge and region_word_ridge were chosen: one at a time, on validation episodes.

python -m mlfsic_jax.ridge_sweep --config=configs/voc.py:cpu [--config.FIELD=VALUE ...]

Prints Ma-AP on validation labels for each shot count. Needs a frozen backbone, and no trained model.
"""

from __future__ import annotations

import jax
import optax
from absl import app
from ml_collections import ConfigDict

from mlfsic_jax.run import evaluate, inputs
from mlfsic_jax.run.config import validate
from mlfsic_jax.run.train import create_train_state, ridge_options
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.flags import parse, run_config

GRID = {
    "beta": (0.0, 0.25, 0.5, 1.0),
    "regulariser": (0.3, 1.0, 3.0),
    "region_regulariser": (0.1, 0.3, 1.0),
    "classifier_regulariser": (100.0, 300.0, 1000.0),
    "word_regulariser": (0.03, 0.1, 0.3),
    "n_components": (160, 320, 640),
}
_METHODS = ("word_ridge", "region_word_ridge")


def sweep(config: ConfigDict) -> None:
    """Prints one row per setting.

    Raises:
      InputError: a mistake in config or data.
    """
    validate(config)
    if config.train_backbone:
        raise InputError("config.train_backbone = True: the sweep needs a frozen backbone")
    run = inputs.load(config)
    default = ridge_options(config)
    # The closed-form model looks at the backbone's features alone, so the model need not be trained.
    state = create_train_state(jax.random.key(0), run.model, run.splits["train"], optax.identity())
    columns = [f"{name}, {k}-shot" for name in _METHODS for k in config.shots]
    print(f"Ma-AP %, {config.eval.sweep_episodes} validation episodes, * marks the default")
    print(f"{'setting':<32}" + "".join(f"{c:>27}" for c in columns), flush=True)
    for field, values in GRID.items():
        for value in values:
            options = default._replace(**{field: value})
            fitted = evaluate.fit_ridge(run.model, state.variables(), run.base, options)
            scores = {
                k: evaluate.score_episodes(
                    run.model,
                    state.variables(),
                    run.splits["validation"],
                    key=jax.random.fold_in(jax.random.key(config.seed), k),
                    n_episodes=config.eval.sweep_episodes,
                    n_shot=k,
                    n_query=config.eval.n_query,
                    fitted=fitted,
                    ridge=options,
                )
                for k in config.shots
            }
            cells = [evaluate.macro_ap(scores[k].methods[name], scores[k].labels) for name in _METHODS for k in scores]
            label = f"{field} {value:g}{' *' if options == default else ''}"
            print(f"{label:<32}" + "".join(f"{100 * cell:>27.2f}" for cell in cells), flush=True)


if __name__ == "__main__":
    app.run(lambda argv: run_config(sweep), flags_parser=parse)
