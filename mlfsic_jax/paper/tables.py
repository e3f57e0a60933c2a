"""What stands in the papers' tables: rows as methods and changes of a config, and where each was published."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from mlfsic_jax.core.lcm import SCORE_SCALINGS

N_SEEDS = 10  # section 5.4.3
FINE_TUNED = "fine_tuned"  # the trained model after baselines.wga.fine_tune
# What tells published rows of one method apart; a row that lacks one of them is of the usual setting.
_SETTING = ("split", "policy", "attention", "variant", "n_heads", "query_top")


class Row(NamedTuple):
    """One method of a table.

    Attributes:
      name: as the table shows it, once in a table.
      method: of ``evaluate.METHODS``, "lcm@<theta>", of ``baselines.PEERS``, or "fine_tuned"; "" has no code to run.
      runs: fields of the config to change, {"model.dynamic": False}, one mapping for each run; of several runs the
        table shows the mean and the standard deviation.
      published: fields of its rows in ``published.json``.
      against: name of the row that it is compared with, episode by episode; "" for none.
      lost: where the number was published that ``published.json`` does not have.
    """

    name: str
    method: str
    runs: tuple[Mapping, ...] = ({},)
    published: Mapping | None = None
    against: str = ""
    lost: str = ""


class Table(NamedTuple):
    """What stands in a table.

    Attributes:
      title: what is compared.
      rows: in their order.
      note: a sentence below the table, or "".
    """

    title: str
    rows: tuple[Row, ...]
    note: str = ""


def tables(config: ConfigDict) -> dict[str, Callable[[], Table]]:
    """All tables by name, for a config."""
    return {
        **{name: functools.partial(_main_table, config, name) for name in ("voc", "coco", "nus_wide", "imaterialist")},
        "demo": functools.partial(_main_table, config, "scenes"),
        "laso_protocol": functools.partial(_laso_protocol, config),
        "components": _components,
        "attention": _attention,
        "selection": _selection,
        "heads": functools.partial(_heads, config),
        "theta": functools.partial(_theta, config),
        "backbones": functools.partial(_backbones, config),
        "embeddings": functools.partial(_embeddings, config),
        "zero_shot": functools.partial(_zero_shot, config),
        "seeds": functools.partial(_seeds, config),
        "wga": _wga,
        "reading": _reading,
    }


DEFAULT_CONFIGS = {
    "voc": "configs/voc.py",
    "coco": "configs/coco.py",
    "nus_wide": "configs/nus_wide.py",
    "imaterialist": "configs/imaterialist.py",
    "demo": "configs/demo.py",
    "laso_protocol": "configs/coco.py:laso",
    **dict.fromkeys(("components", "attention", "selection", "heads", "theta", "backbones"), "configs/coco.py"),
    **dict.fromkeys(("embeddings", "zero_shot", "seeds", "wga", "reading"), "configs/coco.py"),
}
WGA = {"model.attention": "standard", "model.dynamic": False}


def _published(method: str, words: str = "GloVe", backbone: str = "ResNet-50", dataset: str = "coco", **setting):
    return {"dataset": dataset, "method": method, "backbone": backbone, "words": words, **setting}


def _main_table(config, dataset) -> Table:
    of = functools.partial(_published, dataset=dataset) if dataset != "scenes" else lambda *_: None
    pairs = [("Base", "base"), ("LCM", "lcm")]
    networks = (
        ("ResNet-101", "resnet101", "ResNet-101"),
        ("ViT", "vit_b_16", "ViT"),
        ("ResNet-50 + ViT", "resnet50_vit_b_16", "ResNet-50 + ViT"),
    )
    rows = [
        Row("classifier", "classifier", published=of("ResNet-50 classifier", "")),
        *(
            Row(f"classifier, {name}", "classifier", (_backbone(config, field),), of(f"{name} classifier", "", network))
            for name, field, network in networks
            if dataset != "scenes"
        ),
        Row("PLA", "pla", published=of("PLA", "learned")),
        Row("PLA with word vectors", "pla_words", published=of("PLA")),
        Row("LaSO", "laso", published=of("LaSO", "")),
        Row("MAML", "maml", published=of("MAML", "")),
        Row("MAML, first-order", "maml_first_order"),
        Row("WGA", "base", (WGA,), of("WGA")),
        *(Row(name, method, published=of(name)) for name, method in pairs),
        *(
            Row(f"{name}, mirrorBERT", method, (_words(config, "mirrorbert"),), of(name, "mirrorBERT"))
            for name, method in pairs
            if dataset != "scenes"
        ),
        Row("zero-shot", "zero_shot"),
        Row("prototypes, centred", "prototypes_centered"),
        Row("logistic regression", "logistic"),
        Row("ridge", "ridge"),
        Row("region word ridge", "region_word_ridge"),
    ]
    note = "The last rows, from zero-shot on, are not in the papers."
    if dataset in ("coco", "imaterialist"):
        note += f" {_LOST.format('table 1' if dataset == 'coco' else 'table 13')}"
    title = "generated scenes" if dataset == "scenes" else dataset
    return Table(f"All methods, {title}", _against("Base", rows), note)


_LOST = "Numbers of the paper's {} that its text does not repeat are not in published.json."


def _laso_protocol(config) -> Table:
    policy = {"policy": "laso"}
    conv4 = {"backbone": "conv4", "backbone_weights": "", "train_backbone": True, "data.image_size": 0}
    resnet101 = _backbone(config, "resnet101")
    rows = (
        Row("LaSO", "laso", lost="table 4"),
        Row("KGGR", "", published=_published("KGGR", backbone="ResNet-101", **policy)),
        Row("NLC", "", lost="table 4"),
        Row("BCR", "", lost="table 4"),
        Row("WGA, ResNet-101", "base", (WGA | resnet101,), _published("WGA", backbone="ResNet-101", **policy)),
        Row("Base, Conv-4-64", "base", (conv4,), lost="table 4"),
        Row("LCM, Conv-4-64", "lcm", (conv4,), lost="table 4"),
        Row("Base", "base", lost="table 4"),
        Row("LCM", "lcm", lost="table 4"),
        Row("ridge", "ridge"),
        Row("region word ridge", "region_word_ridge"),
    )
    note = "KGGR, NLC and BCR have no public code; the papers quote their numbers. " + _LOST.format("table 4")
    return Table("LaSO's protocol", _against("Base", rows), note)


def _components() -> Table:
    rows = (
        Row("without CM loss", "base", ({"model.cm_loss": False},)),
        Row("without cross-attention", "base", ({"model.attention": "none"},)),
        Row("without dynamic convolution", "base", ({"model.dynamic": False},)),
        Row("local features of queries, top 12", "base", ({"model.query_top": 12},), _published("Base", query_top=12)),
        Row("Base", "base", published=_published("Base")),
        Row("Base, fine-tuned on the support", FINE_TUNED),
        Row("LCM", "lcm", published=_published("LCM")),
    )
    return Table("Components (table 5, A.3.3)", _against("Base", rows), _LOST.format("table 5"))


def _attention() -> Table:
    rows = [
        Row(
            f"{name}, {title}",
            method,
            ({"model.attention": attention},),
            _published(name, attention=attention),
            "Base, channel-wise" if attention == "channelwise" else f"{name}, channel-wise",
        )
        for attention, title in (
            ("simple", "simple"),
            ("standard", "standard"),
            ("global", "global features"),
            ("low_rank", "low-rank bilinear pooling"),
            ("channelwise", "channel-wise"),
        )
        for name, method in (("Base", "base"), ("LCM", "lcm"))
    ]
    return Table("Attention mechanisms (table 14)", tuple(rows))


def _selection() -> Table:
    scores = {
        "importance": "importance rho",
        "exact": "exact loss change (eq 8)",
        "taylor": "Taylor approximation (eq 10)",
        "low_importance": "low importance (ours)",
        "momentum": "momentum (eq 11, the paper's)",
    }
    rows = (
        Row("Base", "base", published=_published("Base")),
        *(
            Row(
                f"LCM, {title}",
                "lcm",
                ({"lcm.selection": selection},),
                _published("LCM") if selection == "momentum" else None,
            )
            for selection, title in scores.items()
        ),
    )
    note = "The paper says that all its variants are better than Base, and its own the best. " + _LOST.format(
        "table 15"
    )
    return Table("What LCM selects by (table 15)", _against("Base", rows), note)


def _heads(config) -> Table:
    rows = []
    for n_heads in (1, 2, 4, 6, 8, 10, 12, 14, 16):
        width = {"model.n_heads": n_heads, "model.d_joint": config.model.d_joint // n_heads * n_heads}
        published = _published("WGA", n_heads=n_heads, paper="WGA, Yan et al. 2022")
        rows.append(Row(f"Base, {n_heads} heads", "base", (width,), against="Base, 8 heads"))
        rows.append(Row(f"WGA, {n_heads} heads", "base", (WGA | width,), published, "WGA, 8 heads"))
    note = (
        "d_joint is rounded down to a multiple of the heads. Numbers of the paper's figure 3 are not in published.json."
    )
    return Table("Attention heads (figure 3a; WGA's table 5)", _but_itself(rows), note)


def _theta(config) -> Table:
    rows = [Row("Base", "base", published=_published("Base"))]
    for scaling in SCORE_SCALINGS:
        title, runs = {"minmax": "scaled", "none": "raw"}[scaling], ({"lcm.score_scaling": scaling},)
        paper = _published("LCM") if scaling == config.lcm.score_scaling else None
        rows += [Row(f"LCM, {title} scores, {t:g}", f"lcm@{t:g}", runs) for t in config.lcm.thresholds]
        rows.append(Row(f"LCM, {title} scores, chosen on validation", "lcm", runs, paper))
    note = "The paper's best theta is 0.65 on its scale of scores, on which 0.5 is Base, as on ours."
    return Table("Thresholds of LCM (figure 3b)", _against("Base", rows), note)


def _backbones(config) -> Table:
    networks = {"resnet50": "ResNet-50", "clip_resnet50": "CLIP ResNet-50", "clip_vit_b_32": "CLIP ViT-B/32"}
    rows = [
        Row(
            f"{name}, {title}", method, (_backbone(config, field),), _published(name, backbone=title), "Base, ResNet-50"
        )
        for field, title in networks.items()
        for name, method in (("Base", "base"), ("LCM", "lcm"))
    ]
    if config.backbone not in networks:
        own = [Row(f"{name}, {config.backbone}", method) for name, method in (("Base", "base"), ("LCM", "lcm"))]
        rows = [row._replace(against=own[0].name) for row in (*own, *rows)]
    return Table("Backbones (table 7)", _but_itself(rows))


_EMBEDDING_TITLES = {
    "fasttext": "FastText",
    "word2vec": "word2vec",
    "glove": "GloVe",
    "clip": "CLIP",
    "bert_avg": "BERT avg",
    "mirrorwic": "mirrorWiC",
    "bert_biencoder": "BERT biencoder",
    "bert_concn": "BERT concn",
    "mirrorbert": "mirrorBERT",
}


def _embeddings(config) -> Table:
    reference = _EMBEDDING_TITLES.get(config.labels.embedding, config.labels.embedding)
    rows = [
        Row(f"{name}, {title}", method, (_words(config, field),), _published(name, title), f"Base, {reference}")
        for field, title in ({config.labels.embedding: reference} | _EMBEDDING_TITLES).items()
        for name, method in (("Base", "base"), ("LCM", "lcm"))
    ]
    return Table("Word embeddings (table 8)", _but_itself(rows))


def _zero_shot(config) -> Table:
    reference = _EMBEDDING_TITLES.get(config.labels.embedding, config.labels.embedding)
    fields = {config.labels.embedding: reference} | {n: _EMBEDDING_TITLES[n] for n in ("glove", "clip", "mirrorbert")}
    rows = [
        Row(title, "zero_shot", (_words(config, field),), _published("zero-shot", title), reference)
        for field, title in fields.items()
    ]
    note = "Words alone, by the models that were trained with 1 and 5 shots; the paper does not say with how many."
    return Table("Zero-shot, by word embedding (table 9)", _but_itself(rows), note)


def _seeds(config) -> Table:
    runs = tuple({"seed": config.seed + i} for i in range(N_SEEDS))
    rows = [Row(name, method, runs, _published(name)) for name, method in (("Base", "base"), ("LCM", "lcm"))]
    note = "Another seed draws other parameters, other episodes to train on, and other episodes to test on."
    return Table(f"{N_SEEDS} seeds (section 5.4.3)", _against("Base", rows), note)


def _wga() -> Table:
    variants = {
        "without CM loss": {"model.cm_loss": False, "model.query_loss_on": "both"},
        "simple attention": {"model.attention": "simple"},
        "global features": {"model.attention": "global"},
        "simple attention with local features": {"model.attention": "simple_local"},
    }
    of = functools.partial(_published, "WGA", paper="WGA, Yan et al. 2022")
    rows = (
        *(Row(variant, "base", (WGA | changes,), of(variant=variant)) for variant, changes in variants.items()),
        Row("WGA", "base", (WGA,), of(variant="full")),
        Row("WGA, fine-tuned on the support", FINE_TUNED, (WGA,), of(variant="fine-tuned")),
    )
    return Table("WGA and its variations (its tables 3 and 6)", _against("WGA", rows))


def _reading() -> Table:
    during = {"lcm.during_training": True}
    rows = [
        Row("Base", "base"),
        Row("LCM", "lcm"),
        Row("LCM, raw scores", "lcm", ({"lcm.score_scaling": "none"},), against="LCM"),
        Row("Base, without skip connection", "base", ({"model.skip": False, "model.anchor": False},)),
        Row("LCM, without skip connection", "lcm", ({"model.skip": False, "model.anchor": False},), against="LCM"),
        Row("Base, anchored", "base", ({"model.anchor": True, "model.skip": True},)),
        Row("LCM, anchored", "lcm", ({"model.anchor": True, "model.skip": True},), against="LCM"),
        Row("Base, LCM during training", "base", (during,)),
        Row("LCM, LCM during training", "lcm", (during,), against="LCM"),
    ]
    return Table("Our reading of what the paper leaves open", _against("Base", rows))


def _against(reference: str, rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows, compared with one of them where they do not say otherwise."""
    return _but_itself([row._replace(against=row.against or reference) for row in rows])


def _but_itself(rows: Sequence[Row]) -> tuple[Row, ...]:
    return tuple(row._replace(against="") if row.against == row.name else row for row in rows)


def _backbone(config, name: str) -> dict:
    """Changes to a frozen backbone with its published weights; none where the config has it, perhaps from elsewhere."""
    if config.backbone == name:
        return {}
    return {"backbone": name, "backbone_weights": "published", "train_backbone": False, "data.image_size": 0}


def _words(config, name: str) -> dict:
    """Changes to a word embedding in its usual place; none where the config has it, perhaps from elsewhere."""
    return {} if config.labels.embedding == name else {"labels.embedding": name, "labels.vectors": ""}


@functools.cache
def _published_rows() -> list[dict]:
    found = json.loads(importlib.resources.files("mlfsic_jax.paper").joinpath("published.json").read_text())
    return [{"paper": found["paper"], **row} for row in (*found["rows"], *found["other_rows"])]


def published(fields: Mapping | None, n_shot: int) -> dict | None:
    """The row of ``published.json`` with these fields, of the usual setting in all that they do not name."""
    if fields is None:
        return None
    wanted = dict.fromkeys(_SETTING) | dict(fields)
    for row in _published_rows():
        if row["n_shot"] in (0, n_shot) and all(row.get(name) == value for name, value in wanted.items()):
            return row
    return None
