"""The card of an exported model: what it was trained on, its scores and licences, for people."""

from collections.abc import Mapping
from typing import Any

from mlfsic_jax import __version__
from mlfsic_jax.backbones import BACKBONES
from mlfsic_jax.backbones.weights import weights_files
from mlfsic_jax.data.words import EMBEDDINGS
from mlfsic_jax.run import inputs


def model_card(manifest: Mapping[str, Any], config, image_size: int, n_words: int) -> str:
    """The model in plain words, as Markdown; the arguments as ``saved.Predictor`` has them."""
    spec, embedding = BACKBONES[config.backbone], EMBEDDINGS.get(config.labels.embedding)
    labels = manifest["labels"]
    lines = [
        f"# {config.data.name}, {config.backbone}: labels for photos from a few examples",
        "",
        "Give it 1 to 5 photos of each of your own labels, and it says which of the labels another photo has:",
        "",
        "    python -m mlfsic_jax.predict --workdir=THIS_FOLDER --support=support.csv --images=PHOTOS --out=labels.csv",
        "",
        f"Written by mlfsic_jax {__version__}.",
        "",
        "## What it was trained on",
        "",
        f"- Dataset {config.data.name}, {len(labels['train'])} labels: {', '.join(labels['train'])}.",
        f"- Chosen and calibrated on {len(labels['validation'])} others: {', '.join(labels['validation'])}.",
        f"- Backbone {config.backbone}, photos at {image_size} x {image_size}, "
        + ("trained with the model." if config.train_backbone else "frozen."),
    ]
    if config.data.name == "scenes":
        lines.append("- These are generated scenes with made-up word vectors, for a demonstration: it knows no photos.")
    lines += _scores(manifest)
    lines += ["", "## Words", ""]
    if n_words > sum(map(len, labels.values())):
        lines.append(f"{n_words} labels and words have vectors here ({config.labels.embedding}), which may make up the")
        lines.append("names of your labels.")
    else:
        lines.append(f"Only the dataset's labels have vectors here ({config.labels.embedding}).")
    lines.append("Labels of other words need --vectors=FILE, or --method=ridge or prototypes, which need no words.")
    lines += ["", "## Licences", ""]
    if config.train_backbone and not config.backbone_weights:
        lines.append("- Backbone: trained from random weights.")
    else:
        names = ", ".join(file.name for file in weights_files(inputs.weights_path(config)))
        lines.append(f"- Backbone: {names}, sha256 {manifest['identity']['weights']}. Published weights of this")
        lines.append(f"  architecture: {spec.pretrained or 'none'}.")
    lines.append(f"- Word vectors: {embedding.licence if embedding else 'of the dataset'}.")
    lines.append("- No photo is in this folder; the terms of the photos that it was trained on may still concern you.")
    return "\n".join(lines) + "\n"


def _scores(manifest: Mapping[str, Any]) -> list[str]:
    lines, labels = ["", "## Scores", ""], manifest["labels"]
    lines.append(f"On {len(labels['novel'])} labels that it was not trained on: {', '.join(labels['novel'])}. In %,")
    lines.append("mean ± 95 % interval over episodes; ECE is the calibration error; F1 at probability 0.5.")
    for entry in manifest["models"]:
        title = f"{entry['n_shot']}-shot, {entry['episodes']} episodes"
        lines += ["", f"| {title} | Ma-AP | Ma-F1 | ECE | Ma-AP on validation |", "|---|---|---|---|---|"]
        for name, scores in entry["methods"].items():
            cells = [f"{100 * scores[m]['mean']:.1f} ± {100 * scores[m]['ci95']:.1f}" for m in ("macro_ap", "macro_f1")]
            cells.append(f"{100 * entry['calibration_error'][name]:.1f}")
            cells.append(f"{100 * entry['validation_macro_ap'][name]:.1f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
