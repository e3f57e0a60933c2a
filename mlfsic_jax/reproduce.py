"""The papers' tables from our own runs: python -m mlfsic_jax.reproduce --table=NAME [--config=FILE] [--workdir=DIR].

Runs what is missing, or goes on where it was stopped, then writes NAME.md, NAME.csv and NAME.png to the workdir
(runs/reproduce/<config> by default): our mean and interval, the published number, the difference, the exact command.
Each run is kept in a folder of the workdir, which all tables of one config share. With --table=NAME and no --config the
table's own is taken; configs/voc.py:cpu does for most of them, and fields are set as --config.FIELD=VALUE. Tables:

  voc coco nus_wide imaterialist       all methods
  folder demo                          the same on own photos, on generated scenes
  laso_protocol                        the same under LaSO's protocol (table 4)
  components attention selection       ablations (tables 5, 14 and 15)
  heads theta backbones embeddings     (figure 3, tables 7 and 8)
  zero_shot clip seeds                 (tables 9 and 6, section 5.4.3)
  fspml                                published numbers on COCO in FsPML's split (table 2)
  wga                                  ablations of WGA, the predecessor (its tables 3 and 6)
  reading                              our reading of what the paper leaves open
  by_name splits                       the model out of the box, which is not in the papers, and its controls; the same
                                       in six random label splits: on configs/voc.py:lite0
"""

import re
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from mlfsic_jax.paper.reproduce import reproduce
from mlfsic_jax.paper.tables import DEFAULT_CONFIGS
from mlfsic_jax.system.command import run_main
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.flags import parse, run_config
from mlfsic_jax.system.untrusted import expand

_TABLE = flags.DEFINE_enum("table", None, list(DEFAULT_CONFIGS), "which table")


def command(config: ConfigDict) -> None:
    """Makes the table of the flags and prints it."""
    if _TABLE.value is None:
        raise InputError(f"--table is missing: give one of {', '.join(DEFAULT_CONFIGS)}")
    flag = flags.FLAGS["config"]
    overrides = config_flags.get_override_values(flag)
    fields = [f"--config.{field}={value}" for field, value in overrides.items() if field != "workdir"]
    name = re.sub(r"\W+", "_", re.sub(r"\.py(?=:|$)", "", Path(flag.config_filename).name)).strip("_")
    root = flags.FLAGS.workdir or overrides.get("workdir") or f"runs/reproduce/{name}"
    print(reproduce(_TABLE.value, config, expand(root), [f"--config={flag.config_filename}", *fields]))


def parse_flags(argv: list[str]) -> list[str]:
    """Flags in; without --config the table's own."""
    wanted = [flag.partition("=")[2] for flag in argv if re.match("--?table=", flag)]
    if not any(re.match("--?config(=|$)", flag) for flag in argv) and wanted and wanted[-1] in DEFAULT_CONFIGS:
        argv = [argv[0], f"--config={DEFAULT_CONFIGS[wanted[-1]]}", *argv[1:]]
    return parse(argv)


if __name__ == "__main__":
    run_main(lambda: app.run(lambda argv: run_config(command), flags_parser=parse_flags))
