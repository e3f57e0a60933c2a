"""Train and evaluate.

python -m mlfsic_jax.main --config=configs/demo.py [--config.FIELD=VALUE ...] [--workdir=DIR]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from mlfsic_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, help_string="a file of configs/, see README")
_WORKDIR = flags.DEFINE_string("workdir", None, "where the run is kept; short for --config.workdir")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Parsed flags in, one call out."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: fields are set as --config.FIELD=VALUE")
    config = _CONFIG.value
    if _WORKDIR.value:
        config.workdir = _WORKDIR.value
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's chatter
    import jax

    from mlfsic_jax.train import train_and_evaluate

    jax.config.update("jax_compilation_cache_dir", str(Path(config.cache_dir).absolute() / "compiled"))
    try:
        train_and_evaluate(config, config.workdir)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
