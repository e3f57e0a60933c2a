"""How fast this machine does it: python -m mlfsic_jax.benchmark [--rows=lcm_select,evaluation] [--json] [--quick].

One table. Every row is timed beside a reference of its own, in turns and in the same process, so that a slow or a busy
machine slows both; the smallest of many times counts. Ratios are against that reference, "peak" is the share of the
fastest matrix product ("mm") or copy that the same process reached, memory is the process's highest so far, and
"PyTorch" is how many times longer plain batched PyTorch takes for the same, where both run on the same device. Data are
made up, in the sizes of the real ones. Every name in --rows is measured in a process of its own.
"""

from collections.abc import Sequence

from mlfsic_jax.bench.table import CASES, run
from mlfsic_jax.system.command import Parser, cli_errors, prepare_jax, run_main


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags in, a table out."""
    parser = Parser("mlfsic_jax.benchmark", __doc__)
    parser.add_argument("--rows", default=",".join(CASES), help=f"what to measure, of {', '.join(CASES)}; default all")
    parser.add_argument("--json", action="store_true", help="for machines: one JSON object")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds: to see that it works")
    parser.add_argument("--here", action="store_true", help="in this process, for a profiler")
    flags = parser.parse_args(arguments)
    prepare_jax()
    with cli_errors("nothing was printed"):
        run([name.strip() for name in flags.rows.split(",")], quick=flags.quick, here=flags.here, as_json=flags.json)


if __name__ == "__main__":
    run_main(main)
