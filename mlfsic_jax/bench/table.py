"""The table of all measurements, each in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlfsic_jax.bench import functions, programs
from mlfsic_jax.bench.measure import Case, Row, machine, measure, peaks
from mlfsic_jax.system.errors import InputError

_CASES = (
    *(functions.sample_episode, programs.features, programs.extraction),
    *(functions.lcm_select, functions.tuning, functions.prototypes, functions.convolutions),
    *(programs.training, programs.training_memory, programs.training_end_to_end),
    *(programs.evaluation, programs.refit, functions.scaling, functions.growth),
)
CASES: dict[str, Callable[[bool], Iterator[Case]]] = {case.__name__: case for case in _CASES}


def rows(name: str, quick: bool) -> list[Row]:
    """Measures the cases of one name in this process, each before the next one is made."""
    return [measure(case, quick) for case in CASES[name](quick)]


def measure_here(name: str, quick: bool) -> dict[str, Any]:
    """The rows of one name, and the machine's peaks: those last, since their arrays count as memory too."""
    measured = [row._asdict() for row in rows(name, quick)]
    return {"machine": machine(), "rows": measured, "peaks": peaks(quick)}


def measure_in_a_process(name: str, quick: bool) -> dict[str, Any]:
    """``measure_here`` in a process of its own; ``InputError`` when it failed."""
    command = [sys.executable, "-m", "mlfsic_jax.benchmark", f"--rows={name}", "--here", "--json"]
    env = dict(os.environ)
    if name == "scaling":  # more threads than cores, else devices that wait for each other can wait for ever
        flags = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        env |= {"XLA_FLAGS": flags.strip(), "NPROC": "32"}
    done = subprocess.run([*command, *(["--quick"] if quick else [])], env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{name} could not be measured, see above (exit status {done.returncode})")
    return json.loads(done.stdout)


def run(names: Sequence[str], *, quick: bool, here: bool, as_json: bool) -> None:
    """Measures some of ``CASES`` and prints the table, or one JSON object.

    ``quick`` sizes prove that it works and say nothing; ``here`` means in this process. ``InputError`` for an unknown
    name, and when a process failed.
    """
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise InputError(f"--rows: no rows {', '.join(unknown)}: choose among {', '.join(CASES)}")
    parts = []
    for name in names:
        if not here:
            print(f"measuring {name}", file=sys.stderr, flush=True)
        parts.append((measure_here if here else measure_in_a_process)(name, quick))
    # What else the machine did may have slowed the measurement of a peak: the best of all processes counts.
    best = {kind: max(part["peaks"][kind] for part in parts) for kind in ("mm", "copy")}
    measured = [Row(**row) for part in parts for row in part["rows"]]
    measured = [row._replace(peak=row.work / row.seconds / best[row.kind]) for row in measured]
    missed = [line for row in measured for line in row.missed()]
    of = parts[0]["machine"]
    if as_json:
        print(json.dumps({"machine": of, "peaks": best, "rows": [r._asdict() for r in measured], "missed": missed}))
        return
    print(f"{of}; peaks {best['mm'] / 1e9:.0f} GFLOP/s (mm), {best['copy'] / 1e9:.1f} GB/s (copy)")
    print(f"{'':<66}{'seconds':>9}{'ratio':>8}  {'to':<38}{'peak':>10}{'memory':>10}  PyTorch")
    print("\n".join([*map(_line, measured), *(["targets missed:", *missed] if missed else [])]))


def _line(row: Row) -> str:
    pytorch = ", ".join(f"{ratio:.1f}x ({name})" for name, ratio in row.pytorch.items())
    growth = "" if row.exponent is None else f"exponent {row.exponent:.2f}"
    return (
        f"{row.name:<66}{row.seconds:>9.2g}{row.ratio:>8.2f}  {row.reference:<38}"
        f"{100 * row.peak:>3.0f} % {row.kind:<4}{row.memory / 1e9:>7.2f} GB  {pytorch}{growth}"
    ).rstrip()
