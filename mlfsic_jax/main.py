"""Train and evaluate: python -m mlfsic_jax.main --config=FILE [--config.FIELD=VALUE ...] [--workdir=DIR]."""

from absl import app

from mlfsic_jax.system.command import run_main
from mlfsic_jax.system.flags import parse, run_config


def main(_: list[str]) -> None:
    """Trains and evaluates."""
    from mlfsic_jax.run.experiment import train_and_evaluate  # not at the top: a mistyped flag is told at once

    run_config(lambda config: train_and_evaluate(config, config.workdir))


if __name__ == "__main__":
    run_main(lambda: app.run(main, flags_parser=parse))
