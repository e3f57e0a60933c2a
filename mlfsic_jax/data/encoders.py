"""Vectors of labels from text encoders: BERT, its fine-tuned relatives, and CLIP. All but ``minilm`` need ``[text]``.

Yan et al. 2025 (MMCI), section 5.1.3, only names the methods; the rest is from each method's own source. "Reading"
marks what the sources leave open.

``mirrorbert``: Liu et al., EMNLP 2021. The label alone; the last layer at [CLS], as in the model card and their code.
``bert_biencoder``: Gajbhiye et al., COLING 2022. ``LABEL means [MASK]``, without a full stop; the last layer
  of the concept encoder at [MASK], scaled to length 1, as in github.com/amitgajbhiye/biencoder_concept_property.
  Reading: BERT-base and the weights bb_gkb_cnet_plus_cnet_has_property.pt, the README's default.
``mirrorwic``: Liu et al., CoNLL 2021. A sentence with the label; the mean of the last four layers over the mention's
  word pieces, as in the evaluation scripts of github.com/cambridgeltl/MirrorWiC.
``bert_avg``: Li et al., IJCAI 2021. A sentence in which one [MASK] stands for the mention; the last layer there.
  Reading: masked, as Li et al. find better and WGA (Yan et al., AAAI 2022) does; BERT-base; no filtering of mentions.
``bert_concn``: Li et al., SIGIR 2023 (ConCN). As ``bert_avg``, with BERT first fine-tuned to bring masked mentions with
  the same ConceptNet property close. No weights are published: make them with run_finetune_with_ds.py of
  github.com/lina-luck/semantic_concept_embeddings. Reading: masked at the end too, as in their extract_mv_mask.py.
``clip``: Radford et al., ICML 2021. ``a photo of a LABEL``, MMCI's prompt; the projected text embedding, not scaled.
  Reading: ViT-B/32, which MMCI's table 6 combines with these word vectors.
``minilm``: all-MiniLM-L6-v2, not in MMCI. ``a photo of a LABEL``; the mean over tokens, scaled to length 1 (minilm.py).

Encoders in context average over sentences that mention the label; MMCI takes 500 of Wikipedia at random. A sentence
counts if it has the label as written, in any case, between word boundaries; plurals do not count, and the first of
several mentions is taken. A label with commas or slashes is a list of synonyms.
"""

import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlfsic_jax.data.text import text_lines
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.progress import track
from mlfsic_jax.system.untrusted import expand


class Encoder(NamedTuple):
    """How to take a label's vector from a text encoder."""

    model: str | None  # the published model on huggingface.co, if any; for minilm its folder
    dimension: int | None  # length of that model's vectors
    prompt: str | None  # the text, with {label} and {mask}; None for encoders in context
    at: str  # where to read the vector: "cls", "mask", "mention", "mean", or "projection" (CLIP)
    layers: int = 1  # number of last layers to average
    unit: bool = False  # whether to scale the vector to length 1
    prefix: str = ""  # start of the network's keys in the authors' checkpoints; "" if there are none
    weights: tuple[str, str] | None = None  # such a checkpoint, (repository, file) on huggingface.co
    licence: str = ""  # of the published model


_UNKNOWN = "MIT (code); no licence is stated for the model"
_GAJBHIYE = ("amitgajbhiye/biencoder_concept_property_pretrained_models", "bb_gkb_cnet_plus_cnet_has_property.pt")
ENCODERS = {
    "mirrorbert": Encoder("cambridgeltl/mirror-bert-base-uncased-word", 768, "{label}", "cls", licence=_UNKNOWN),
    "mirrorwic": Encoder(
        "cambridgeltl/mirrorwic-bert-base-uncased", 768, None, "mention", layers=4, licence="no licence is stated"
    ),
    "bert_biencoder": Encoder(
        "google-bert/bert-base-uncased", 768, "{label} means {mask}", "mask", unit=True, prefix="_concept_encoder.",
        weights=_GAJBHIYE, licence="Apache-2.0 (BERT); no licence is stated for the fine-tuned weights",
    ),
    "bert_avg": Encoder("google-bert/bert-base-uncased", 768, None, "mask", licence="Apache-2.0"),
    "bert_concn": Encoder(
        None, None, None, "mask", prefix="bert.bert.",
        licence="of the model that you fine-tune; BERT is under Apache-2.0",
    ),
    "minilm": Encoder("data/minilm", 384, "a photo of a {label}", "mean", unit=True, licence="Apache-2.0"),
    "clip": Encoder("openai/clip-vit-base-patch32", 512, "a photo of a {label}", "projection", licence=_UNKNOWN),
}  # fmt: skip


class Mention(NamedTuple):
    """A text and the part of it that stands for a label: ``text[start:end]``."""

    text: str
    start: int
    end: int


def encode_labels(
    encoder: str,
    display_names: Sequence[str],
    *,
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    mentions: Sequence[Sequence[Mention]] | None = None,
    batch_size: int = 64,
    local_files_only: bool = False,
) -> np.ndarray:
    """Encodes C labels as float32 [C, d], on the GPU if PyTorch (for ``minilm``, JAX) sees one.

    Args:
      encoder: a name of ``ENCODERS``.
      display_names: C names as people write them, e.g. "dining table".
      model: a name on huggingface.co or a folder with model and tokeniser (``minilm``: a folder); default: the
        published model.
      weights: a ``.pt`` file of the authors' code that replaces the model's weights; default: the published one, if
        there is one and ``model`` is not given.
      mentions: per label, the sentences that mention it (``read_sentences``); only for encoders in context.
      batch_size: texts per step.
      local_files_only: download nothing.

    Raises:
      InputError: PyTorch or transformers is missing, the model or its weights cannot be loaded, or all mentions of a
        label lie beyond the longest text that the model reads.
    """
    spec = ENCODERS[encoder]
    if model is None and spec.model is None:
        tune = "fine-tune one with the authors' code (data/encoders.py says which) and give --model=NAME_OR_FOLDER and"
        weights_too = "unless that is a folder with the result, --weights=FILE.pt"
        raise InputError(f"encoder {encoder} has no published model: {tune}, {weights_too}")
    if spec.at == "mean":
        from mlfsic_jax.data.minilm import encode_texts  # imports tokenizers

        return encode_texts([spec.prompt.format(label=name) for name in display_names], model or spec.model, batch_size)
    tokenizer, network, source = _load(encoder, model, weights, local_files_only)
    if spec.prompt is not None:
        mentions = [[_prompted(spec.prompt, name, tokenizer.mask_token)] for name in display_names]
    elif spec.at == "mask":
        mentions = [[_masked(mention, tokenizer.mask_token) for mention in group] for group in mentions]
    labels = np.repeat(np.arange(len(display_names)), [len(group) for group in mentions])
    flat = [mention for group in mentions for mention in group]
    order = sorted(range(len(flat)), key=lambda i: len(flat[i].text))  # similar lengths together: less padding
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    sums, counts = None, np.zeros(len(display_names), np.int64)
    for rows in track(batches, total=len(batches), description=f"encoding with {encoder}", unit="batches"):
        vectors, found = _encode_batch(spec, tokenizer, network, [flat[i] for i in rows])
        sums = np.zeros((len(display_names), vectors.shape[1])) if sums is None else sums
        np.add.at(sums, labels[rows][found], vectors[found])
        np.add.at(counts, labels[rows][found], 1)
    if not counts.all():
        beyond = ", ".join(repr(name) for name, count in zip(display_names, counts, strict=True) if not count)
        raise InputError(f"{source} reads no sentence as far as the mention of {beyond}: give shorter sentences")
    if counts.sum() < len(flat):
        print(f"{len(flat) - counts.sum()} texts skipped: the label is beyond what {source} reads", file=sys.stderr)
    return (sums / counts[:, None]).astype(np.float32)


def _load(encoder: str, model: str | None, weights: Any, local_files_only: bool) -> tuple[Any, Any, str]:
    """The tokeniser, the network on its device, and the model's name."""
    spec = ENCODERS[encoder]
    try:
        import torch
        import transformers
    except ImportError as error:
        raise InputError(f'{error.name} is not installed: pip install "mlfsic_jax[text]"') from error
    transformers.logging.set_verbosity_error()  # it reports unneeded parts of a checkpoint; see missing below
    network_class = transformers.CLIPTextModelWithProjection if spec.at == "projection" else transformers.AutoModel
    source = model or spec.model
    in_folder = expand(source).is_dir()
    source = str(expand(source)) if in_folder else source
    # No code of a model's own, about which transformers would ask; pickles are read as bare tensors.
    options = {"local_files_only": local_files_only or in_folder, "trust_remote_code": False}
    hint = (
        "Give --model=NAME_OR_FOLDER with a model of huggingface.co or a folder that holds one (config, weights, "
        f"tokeniser); {encoder}'s is {spec.model}"
    )
    with _loading(f"the model {source} cannot be loaded", hint, local_files_only or in_folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        network, loaded = network_class.from_pretrained(source, output_loading_info=True, weights_only=True, **options)
    missing = [key for key in sorted(loaded["missing_keys"]) if "pooler" not in key]  # would stay random
    if missing:
        raise InputError(f"{encoder} cannot use {source}: it has no {missing[0]}, which {spec.model or 'BERT'} has")
    token = {"cls": "cls_token", "mask": "mask_token"}.get(spec.at, "pad_token")
    if not tokenizer.is_fast or getattr(tokenizer, token) is None:
        raise InputError(f"{encoder} cannot use {source}: its tokeniser has no {token}, or no offsets of tokens")
    if weights is None and model is None and spec.weights:
        from huggingface_hub import hf_hub_download

        repository, file = spec.weights
        failure = f"{file} cannot be downloaded from huggingface.co/{repository}"
        with _loading(failure, "Get it by hand and give --weights=FILE.pt", local_files_only):
            weights = hf_hub_download(repository, file, local_files_only=local_files_only)
    if weights is not None:
        _load_weights(network, expand(weights), spec.prefix)
    return tokenizer, network.eval().float().to("cuda" if torch.cuda.is_available() else "cpu"), source


def _encode_batch(spec: Encoder, tokenizer: Any, network: Any, mentions: list[Mention]) -> tuple[np.ndarray, ...]:
    """Vectors float64 [B, d] of texts, and bool [B]: whether the text was read as far as the mention."""
    import torch

    longest = min(tokenizer.model_max_length, network.config.max_position_embeddings)
    options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    batch = tokenizer([mention.text for mention in mentions], return_offsets_mapping=True, **options)
    offsets = batch.pop("offset_mapping").numpy()  # [B, T, 2], the characters of each token; (0, 0) for special tokens
    with torch.no_grad():
        outputs = network(**batch.to(network.device), output_hidden_states=spec.layers > 1)
    if spec.at == "projection":
        return outputs.text_embeds.double().cpu().numpy(), np.ones(len(mentions), bool)
    hidden = outputs.last_hidden_state
    if spec.layers > 1:
        hidden = torch.stack(outputs.hidden_states[-spec.layers :]).mean(0)
    start, end = np.array([(mention.start, mention.end) for mention in mentions]).T[..., None]  # each [B, 1]
    chosen = (offsets[..., 0] < end) & (offsets[..., 1] > start)  # [B, T]
    if spec.at == "cls":
        chosen[:] = np.arange(offsets.shape[1]) == 0
    found = chosen.any(axis=1)
    weights = chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 1)
    vectors = np.einsum("bt,btd->bd", weights, hidden.double().cpu().numpy())
    if spec.unit:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors, found


def _prompted(prompt: str, label: str, mask: str | None) -> Mention:
    start = len(prompt.partition("{mask}")[0].format(label=label))
    return Mention(prompt.format(label=label, mask=mask), start, start + len(mask or ""))


def _masked(mention: Mention, mask: str) -> Mention:
    text = mention.text[: mention.start] + mask + mention.text[mention.end :]
    return Mention(text, mention.start, mention.start + len(mask))


@contextlib.contextmanager
def _loading(failure: str, hint: str, offline: bool) -> Iterator[None]:
    """Reports any error by its first line: hub, transformers, tokenizers, safetensors and torch raise their own.

    ``offline`` keeps the hub's client off the network, which it would ask even when the files are local.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{failure}: {lines[0].rstrip('.:')[:200]}. {hint}") from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _load_weights(network: Any, path: pathlib.Path, prefix: str) -> None:
    import torch

    hint = "Give a .pt file of the authors' code, and with --model the model that it was trained from"
    with _loading(f"weights {path} cannot be loaded into the model", hint, offline=True):
        state = torch.load(path, map_location="cpu", weights_only=True)
        keys = {key: key.removeprefix("module.") for key in state}
        own = {name.removeprefix(prefix): state[key] for key, name in keys.items() if name.startswith(prefix)}
        missing = [key for key in network.load_state_dict(own, strict=False).missing_keys if "pooler" not in key]
    if missing:
        raise InputError(f"weights {path} have no {prefix}{missing[0]}: they are not of this encoder, or of this model")


def read_sentences(
    path: str | os.PathLike[str],
    label_names: Sequence[str],
    display_names: Sequence[str],
    *,
    max_sentences: int = 500,
    seed: int = 0,
) -> list[list[Mention]]:
    """Reads sentences that mention labels, draws ``max_sentences`` per label, and prints how many to standard error.

    The file is UTF-8 text with lines ``label<TAB>sentence``, the label one of C ``label_names`` (the dataset's
    spelling) or ``display_names`` (as people write them, and as the sentence must have them). Lines of other labels are
    skipped, so that one file serves several datasets. Each label's draw is independent, its mentions keep their order.

    Raises:
      InputError: the file is missing or malformed (naming the line), or some labels have no sentence (naming all).
    """
    path = expand(path)
    column = {key: i for names in (display_names, label_names) for i, key in enumerate(names)}
    patterns = [_mention_pattern(display) for display in display_names]
    mentions: list[list[Mention]] = [[] for _ in label_names]
    n_skipped = 0
    for number, line in text_lines(path):
        label, tab, sentence = line.partition("\t")
        if not tab:
            raise InputError(f"{path}, line {number}: expected label<TAB>sentence, got {line[:40]!r}")
        if label not in column:
            continue
        if match := patterns[column[label]].search(sentence):
            mentions[column[label]].append(Mention(sentence, *match.span()))
        else:
            n_skipped += 1
    without = [display for display, group in zip(display_names, mentions, strict=True) if not group]
    if without:
        add = "add lines label<TAB>sentence with the label as written here (plurals do not count)"
        raise InputError(f"{path} has no sentence that mentions {', '.join(map(repr, without))}: {add}")
    drawn = []
    for group in mentions:
        rows = np.random.default_rng(seed).choice(len(group), min(max_sentences, len(group)), replace=False)
        drawn.append([group[row] for row in sorted(rows)])
    print(
        f"{path}: {sum(map(len, drawn))} of {sum(map(len, mentions))} sentences for {len(drawn)} labels, "
        f"{min(map(len, drawn))} to {max(map(len, drawn))} each; {n_skipped} skipped as the label is not in them",
        file=sys.stderr,
    )
    return drawn


def _mention_pattern(display: str) -> re.Pattern[str]:
    synonyms = [part.split() for part in re.split(r"[,/]", display) if part.strip()]
    phrases = [r"[\s_-]+".join(map(re.escape, words)) for words in synonyms]
    longest_first = sorted(phrases, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", re.IGNORECASE)
