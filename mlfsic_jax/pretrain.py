"""Trains the backbone as a classifier of the train labels: python -m mlfsic_jax.pretrain --config=FILE."""

from absl import app

from mlfsic_jax.run.pretrain import main
from mlfsic_jax.system.flags import parse

if __name__ == "__main__":
    app.run(main, flags_parser=parse)
