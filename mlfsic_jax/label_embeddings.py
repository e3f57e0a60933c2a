"""Makes word vectors of labels with a text encoder, one per label:

python -m mlfsic_jax.label_embeddings --encoder=mirrorbert --labels=voc --out=data/voc-mirrorbert.npz

``--labels`` is a benchmark, or a file with one line per label, ``name`` or ``name<TAB>display name``. Encoders in
context also need ``--sentences=FILE`` with lines ``label<TAB>sentence``. ``data/encoders.py`` describes the encoders.
The encoder's published model is downloaded from huggingface.co unless it is on this machine already;
``--model=FOLDER`` and ``--local_files_only`` download nothing. ``minilm`` needs no PyTorch; its model is in
``data/minilm`` (``python -m mlfsic_jax.fetch minilm``) or ``--model=FOLDER``.
"""

import argparse
import collections
import functools
import importlib
from collections.abc import Sequence

from mlfsic_jax.data.encoders import ENCODERS, encode_labels, read_sentences
from mlfsic_jax.data.splits import label_split
from mlfsic_jax.data.words import BENCHMARKS, phrase_spellings, write_vectors
from mlfsic_jax.system.command import Parser, cli_errors, run_main
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import expand, label_name, reported


def read_labels(labels: str) -> tuple[list[str], list[str]]:
    """The labels to encode, of a benchmark or a file: names as the dataset spells them, and as people write them.

    ``InputError`` when it is neither, or a file that is empty, not UTF-8, or repeats a label.
    """
    path = expand(labels)
    if labels in BENCHMARKS:
        names = [name for split in label_split(labels).values() for name in split]
        display_names = importlib.import_module(f"mlfsic_jax.data.{labels}").DISPLAY_NAMES
        return names, [display_names.get(name, name.replace("_", " ")) for name in names]
    if not path.is_file():
        raise InputError(f"--labels={labels} is neither a file nor one of {', '.join(BENCHMARKS)}")
    with reported(f"--labels={labels} cannot be read as UTF-8 text", "save it as such", (OSError, UnicodeDecodeError)):
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    pairs = [[part.strip() for part in line.partition("\t")[::2]] for line in lines]
    names = [label_name(name, f"--labels={labels}") for name, _ in pairs]
    twice = sorted(name for name, n in collections.Counter(names).items() if n > 1)
    if twice or not names:
        raise InputError(f"--labels={labels} " + (f"names {twice[0]!r} twice" if twice else "is empty"))
    return names, [display or name.replace("_", " ") for name, display in pairs]


def _parser() -> argparse.ArgumentParser:
    def whole(text: str, least: int = 0) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least}")
        return int(text)

    positive = functools.partial(whole, least=1)
    parser = Parser("mlfsic_jax.label_embeddings", __doc__)
    parser.add_argument("--encoder", required=True, choices=ENCODERS, metavar="ENCODER", help=", ".join(ENCODERS))
    parser.add_argument(
        "--labels", required=True, help="a benchmark such as voc, or a file: name or name<TAB>display name"
    )
    parser.add_argument("--out", required=True, help="the .npz file to write")
    parser.add_argument("--model", help="a model of huggingface.co, or a folder; default: the published one")
    parser.add_argument("--weights", help="a .pt file of the authors' code, for bert_biencoder and bert_concn")
    parser.add_argument("--sentences", help="a file: label<TAB>sentence; for mirrorwic, bert_avg and bert_concn")
    parser.add_argument("--max_sentences", type=positive, default=500, help="per label, drawn at random; default 500")
    parser.add_argument("--seed", type=whole, default=0, help="of the draw; default 0")
    parser.add_argument("--batch_size", type=positive, default=64, help="texts per step; default 64")
    parser.add_argument("--local_files_only", action="store_true", help="download nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: flags in, an ``.npz`` file out."""
    with cli_errors("nothing was written"):
        _encode_to_file(_parser().parse_args(arguments))


def _encode_to_file(flags: argparse.Namespace) -> None:
    spec = ENCODERS[flags.encoder]
    in_context = spec.prompt is None
    if not flags.out.endswith(".npz"):
        raise InputError(f"--out={flags.out} must end in .npz")
    if in_context != bool(flags.sentences):
        needs = "needs --sentences=FILE with lines label<TAB>sentence" if in_context else "takes no --sentences"
        raise InputError(f"encoder {flags.encoder} {needs}")
    if flags.weights and not spec.prefix:
        raise InputError(f"encoder {flags.encoder} takes no --weights: give the folder of a model as --model")
    names, displays = read_labels(flags.labels)
    taken = set(names)
    for name, display in zip(names, displays, strict=True):
        # load_word_vectors looks for the phrase before the name: that must not be another label's name.
        phrases = (spelling for entry in phrase_spellings(name, display) for spelling in (entry, entry.lower()))
        found = next(spelling for spelling in phrases if spelling in taken)
        if found != name:
            raise InputError(f"--labels={flags.labels}: {name!r} cannot be told from {found!r}, rename one of them")
    out = expand(flags.out)
    with reported(f"the folder of --out={flags.out} cannot be made", "give another", OSError):
        out.parent.mkdir(parents=True, exist_ok=True)
    draw = {"max_sentences": flags.max_sentences, "seed": flags.seed}
    mentions = read_sentences(flags.sentences, names, displays, **draw) if in_context else None
    options = {name: getattr(flags, name) for name in ("model", "weights", "batch_size", "local_files_only")}
    vectors = encode_labels(flags.encoder, displays, mentions=mentions, **options)
    write_vectors(out, names, vectors)
    print(f"wrote {out}: {len(names)} labels, {vectors.shape[1]} numbers each, {flags.encoder}")


if __name__ == "__main__":
    run_main(main)
