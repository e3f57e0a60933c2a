"""Flags of commands with a config: ``--config=FILE [--config.FIELD=VALUE ...] [--workdir=DIR]``."""

import sys
from collections.abc import Callable

from absl import flags
from ml_collections import ConfigDict, config_flags

from mlfsic_jax.system import parallel
from mlfsic_jax.system.command import cli_errors, prepare_jax

_CONFIG = config_flags.DEFINE_config_file("config", help_string="a file in configs/, such as configs/demo.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder; short for --config.workdir")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags and reads the config; a mistake in either ends the program with one line."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None:
            raise ValueError("--config is missing: give a file in configs/, e.g. --config=configs/demo.py")
        _CONFIG.value.lock()  # ml_collections reports an unreadable file only on access
        if rest[1:]:
            raise ValueError(f"unexpected argument {rest[1]!r}: fields are set as --config.FIELD=VALUE")
    except (flags.Error, ValueError, OSError, KeyError, AttributeError, TypeError, SyntaxError) as error:
        # ml_collections quotes a traceback of its own; its last line is the reason.
        last = str(error).replace("\\n", "\n").replace("\\'", "'").strip('"\n ').splitlines()[-1].strip()
        unknown = isinstance(error, (KeyError, AttributeError))
        sys.exit("error: no such config field: " + last.strip("\"'") if unknown else f"error: {last}")
    return rest


def run_config(command: Callable[[ConfigDict], object]) -> None:
    """Calls ``command`` with the parsed config; a mistake or an interruption ends the program with one line."""
    config = _CONFIG.value
    config.workdir = _WORKDIR.value or config.workdir
    prepare_jax(config.cache_dir)
    parallel.start()
    go_on = f"the same command goes on from the last checkpoint in {config.workdir}"
    with cli_errors(go_on, parallel.signals()), parallel.quiet_other_processes():
        command(config)
