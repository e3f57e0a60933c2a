"""A finished run as one page: python -m mlfsic_jax.report --workdir=RUN [--out=FILE] [--episodes=2] [--seed=0]."""

from collections.abc import Sequence

from mlfsic_jax.report.page import read_results, write_report
from mlfsic_jax.system.command import Parser, cli_errors, prepare_jax, run_main
from mlfsic_jax.system.untrusted import expand


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags in, a page out."""
    parser = Parser("mlfsic_jax.report", "Shows a finished run on one page.")
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--out", help="the page; default <workdir>/report.html")
    parser.add_argument("--episodes", type=int, default=2, help="how many test episodes to show; default 2")
    parser.add_argument("--seed", type=int, default=0, help="picks the episodes; default 0")
    flags = parser.parse_args(arguments)
    with cli_errors("no page was written"):
        prepare_jax(read_results(expand(flags.workdir))[0]["config"]["cache_dir"])
        path = write_report(flags.workdir, flags.out, episodes=flags.episodes, seed=flags.seed)
        print(f"report: {path}")


if __name__ == "__main__":
    run_main(main)
