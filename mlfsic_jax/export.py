"""Write a trained model as one folder: python -m mlfsic_jax.export --workdir=RUN --out=FOLDER.

The folder holds all that ``mlfsic_jax.predict`` needs on another machine:

- ``model.json``: config, scores, the card, and a sha256 of every .safetensors file, so that damage is noticed;
- ``model_<K>shot.safetensors`` for each shot count, ``backbone.safetensors`` unless the backbone was trained with it;
- ``words.safetensors``: word vectors of the dataset's labels, and of the most frequent other words;
- ``minilm/`` or ``clip/``: the encoder of names, where a method uses one;
- ``card.md``: what it was trained on, its scores and licences, for people, who may edit it.
"""

from collections.abc import Sequence

from mlfsic_jax.run.export import N_WORDS, export
from mlfsic_jax.run.ready import QUALITIES
from mlfsic_jax.run.saved import CARD
from mlfsic_jax.system.command import Parser, cli_errors, run_main
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import expand


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags in, a folder out."""
    parser = Parser("mlfsic_jax.export", "Writes a trained model as a folder that works on another machine.")
    parser.add_argument("--workdir", help="of a training run; default: the model out of the box")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--words", type=int, default=N_WORDS, help=f"word vectors to carry; default {N_WORDS}")
    parser.add_argument("--quality", choices=QUALITIES, default="standard", help="of the model out of the box")
    parser.add_argument("--data_dir", default="data", help="where the files of that are; default data")
    flags = parser.parse_args(arguments)
    with cli_errors("nothing was written"):
        if flags.words < 0:
            raise InputError(f"--words={flags.words} must be 0 or more")
        export(flags.workdir, flags.out, flags.words, quality=flags.quality, data_dir=flags.data_dir)
        size = sum(path.stat().st_size for path in expand(flags.out).rglob("*") if path.is_file())
        print(f"wrote {flags.out}: {size / 1e6:.1f} MB; {CARD} says what it is")


if __name__ == "__main__":
    run_main(main)
