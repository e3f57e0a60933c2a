"""Train the backbone as a classifier of the train labels: python -m mlfsic_jax.pretrain --config=FILE.

It writes ``<workdir>/pretrain/backbone.safetensors``, from which training by episodes goes on:

python -m mlfsic_jax.main --config=FILE --config.backbone_weights=<workdir>/pretrain/backbone.safetensors
"""

from absl import app

from mlfsic_jax.system.command import run_main
from mlfsic_jax.system.flags import parse, run_config


def main(_: list[str]) -> None:
    """Trains the classifier."""
    from mlfsic_jax.run.pretrain import pretrain  # not at the top: a mistyped flag is told at once

    run_config(lambda config: pretrain(config, config.workdir))


if __name__ == "__main__":
    run_main(lambda: app.run(main, flags_parser=parse))
