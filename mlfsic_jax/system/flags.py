"""Flags of commands with a config: ``--config=FILE [--config.FIELD=VALUE ...] [--workdir=DIR]``."""

import collections
import operator
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from mlfsic_jax.system import parallel
from mlfsic_jax.system.command import cli_errors, expand_home, guard_streams, prepare_jax
from mlfsic_jax.system.untrusted import expand


class _ConfigFiles(config_flags.config_flags.ConfigFileFlagParser):
    """Reads a config file; ``configs/NAME.py`` may be one of this package's own, from any working folder."""

    def parse(self, path: str) -> ConfigDict:
        name, colon, variant = path.partition(":")
        file = expand(name)
        if not file.is_file():
            package = Path(__file__).parents[1]  # a wheel has the configs inside, a checkout beside it
            ours = next(filter(Path.is_dir, (package / "configs", package.parent / "configs")), package)
            if file.parent != Path("configs") or not (ours / file.name).is_file():
                known = ", ".join(sorted(f"configs/{config.name}" for config in ours.glob("*.py")))
                raise ValueError(f"{name}: no such config: give a file, or one of {known}")
            file = ours / file.name
        return super().parse(f"{file}{colon}{variant}")


_CONFIG = config_flags.DEFINE_config_file("config", help_string="a file in configs/, such as configs/demo.py")
flags.FLAGS["config"].parser = _ConfigFiles("config")
_WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder; short for --config.workdir")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags and reads the config; a mistake in either ends the program with one line."""
    guard_streams()
    try:
        with cli_errors("nothing was done"):
            rest = flags.FLAGS(argv)
        if _CONFIG.value is None:
            raise ValueError("--config is missing: give a file in configs/, e.g. --config=configs/demo.py")
        _CONFIG.value.lock()  # ml_collections reports an unreadable file only on access
        if rest[1:]:
            raise ValueError(f"unexpected argument {rest[1]!r}: fields are set as --config.FIELD=VALUE")
        fields = (argument.partition("=")[0] for argument in argv if argument.startswith("--config."))
        for flag, times in collections.Counter(fields).items():
            name = flag.removeprefix("--config.")
            if times > 1 and isinstance(operator.attrgetter(name)(_CONFIG.value), tuple):  # it would get longer
                raise ValueError(f"config.{name} is given twice: give it once, with all its values")
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
    with cli_errors("nothing was done", ()):
        _expand_paths(config)
        prepare_jax(config.cache_dir)
        parallel.start()
        signals = parallel.signals()
    go_on = f"the same command goes on from the last checkpoint in {config.workdir}"
    with cli_errors(go_on, signals), parallel.quiet_other_processes():
        command(config)


def _expand_paths(config: ConfigDict) -> None:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _expand_paths(value)
        else:
            config[name] = expand_home(value)
