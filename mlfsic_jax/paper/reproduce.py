"""Makes a table: runs what is missing, then writes its files."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from mlfsic_jax.paper.files import Line, Made, as_csv, entries, figure, markdown
from mlfsic_jax.paper.runs import Runs
from mlfsic_jax.paper.tables import TABLES
from mlfsic_jax.run.config import validate
from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.progress import track
from mlfsic_jax.system.untrusted import reported


def reproduce(name: str, config: ConfigDict, root: str | Path, given: Sequence[str] = ()) -> str:
    """Makes a table of ``TABLES``, running what is missing in folders of ``root``, and returns it as Markdown.

    Its rows change ``config``, which comes from the flags ``given``, for the commands in the table.
    ``<root>/<name>.md``, ``.csv`` and ``.png`` hold the table too. ``InputError`` for a mistake in the config, or when
    not one row could be run.
    """
    validate(config)
    root = Path(root)
    with reported(f"cannot write to the workdir {root}", "choose another with --workdir", OSError):
        root.mkdir(parents=True, exist_ok=True)
    table = TABLES[name](config)
    untrained = tuple(dict.fromkeys(row.method for row in table.rows)) if table.untrained else ()
    made, errors = Made(name, table, Runs(config, root, untrained), given, []), []
    for row in track(made.table.rows, total=len(made.table.rows), description=f"table {name}", unit="rows"):
        values, reason = {}, ""
        if row.method:
            try:
                of_runs = [made.runs.values(changes, row.method) for changes in row.runs]
                values = {k: [run[k] for run in of_runs] for k in config.shots}
            except InputError as error:
                errors.append(error)
                reason = textwrap.shorten(str(error).splitlines()[0], 240, placeholder=" ...")
                print(f"{row.name}: not run: {error}", flush=True)
        made.lines.append(Line(row, values, reason))
    if errors and not any(line.values for line in made.lines):
        raise errors[0]
    in_csv = list(entries(made))
    text = markdown(made, in_csv)
    if parallel.is_first():
        (root / f"{name}.md").write_text(text)
        (root / f"{name}.csv").write_text(as_csv(in_csv))
        figure(made.table.title, in_csv).savefig(root / f"{name}.png", dpi=200, facecolor="white")
    return text
