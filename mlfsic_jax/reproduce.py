"""The papers' tables from our own runs: python -m mlfsic_jax.reproduce --table=NAME [--config=FILE] [--workdir=DIR]."""

from absl import app

from mlfsic_jax.paper.reproduce import _parse, main

if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
