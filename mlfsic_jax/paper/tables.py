"""The rows of the papers' tables: methods, changes of a config, and the published numbers beside them."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from mlfsic_jax.core.lcm import SCORE_SCALINGS
from mlfsic_jax.data.published import published_rows
from mlfsic_jax.methods import METHODS

N_SEEDS = 10  # section 5.4.3
N_SPLITS = 6
# Without skip, as its paper has it; its own training, since the standard layers start at random.
WGA = {"model.attention": "standard", "model.dynamic": False, "model.skip": False}
WGA_TRAINING = {"train.learning_rate": 1e-3, "train.epochs": 100, "train.warmup_epochs": 5, "train.validate_every": 5}
# Fields that only published rows of an unusual setting have.
_SETTING = ("split", "policy", "attention", "variant", "n_heads", "query_top")
_BOTH = {"Base": "base", "LCM": "lcm"}
# Methods of no paper; others that are evaluated by default follow by themselves.
_OURS = ("zero_shot", "prototypes_centered", "logistic", "ridge", "region_word_ridge")
_TITLES = {"zero_shot": "zero-shot", "prototypes_centered": "prototypes, centred", "logistic": "logistic regression"}
_EMBEDDINGS = {
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
_LOST = "Numbers of the paper's {} that its text does not repeat are not in published.json."


class Row(NamedTuple):
    """One method of a table."""

    name: str  # as the table shows it, once in a table
    method: str  # a name of METHODS, or "lcm@<theta>"; "" has no code to run
    # Fields of the config to change, {"model.dynamic": False}, for each run; several are shown by their mean and sd.
    runs: tuple[Mapping, ...] = ({},)
    published: Mapping | None = None  # of published_as
    against: str = ""  # name of the row that it is compared with, episode by episode
    lost: str = ""  # where a number was published that published.json lacks


# Controls, and the forms of LCM that show what its parts add.
_FORMS = (
    Row("Base, untrained", "base_untrained", against="Base"),
    Row("LCM, untuned", "lcm_untuned", against="Base"),
    Row("LCM with random scores", "lcm_random_scores", against="Base"),
    Row("LCM with permuted words", "lcm_permuted_words", against="Base"),
    Row("LCM with random words", "lcm_random_words", against="Base"),
    Row("Base, tuned", "base_tuned", against="Base"),
    Row("LCM, all tuned", "lcm_all_tuned", against="Base, tuned"),
)


class Table(NamedTuple):
    """A table."""

    title: str
    rows: tuple[Row, ...]
    note: str = ""  # below the table
    untrained: bool = False  # whether no row needs training by episodes
    over: str = "seeds"  # what a row's runs differ in, where it has several


def published_as(method: str, words: str = "GloVe", backbone: str = "ResNet-50", dataset: str = "coco", **setting):
    """The fields of ``published.json`` that tell a row, one for each shot count, from all others."""
    return {"dataset": dataset, "method": method, "backbone": backbone, "words": words, **setting}


def published(fields: Mapping | None, n_shot: int) -> dict | None:
    """The published row with these fields, and of the usual setting in all others."""
    if fields is None:
        return None
    wanted = dict.fromkeys(_SETTING) | dict(fields)
    rows = (row for row in published_rows() if row["n_shot"] in (0, n_shot))
    return next((row for row in rows if all(row.get(name) == value for name, value in wanted.items())), None)


def _main_table(config, *, dataset: str) -> Table:
    in_paper = dataset in _PHOTOS

    def of(*fields):
        return published_as(*fields, dataset=dataset) if in_paper else None

    rows = [
        Row("classifier", "classifier", published=of("ResNet-50 classifier", "")),
        Row("classifier, base labels first", "classifier_pretrained"),
    ]
    if in_paper:
        networks = {"resnet101": "ResNet-101", "vit_b_16": "ViT", "resnet50_vit_b_16": "ResNet-50 + ViT"}
        rows += [
            Row(f"classifier, {name}", "classifier", (_backbone(config, field),), of(f"{name} classifier", "", name))
            for field, name in networks.items()
        ]
    rows += [
        Row("PLA", "pla", published=of("PLA", "learned")),
        Row("PLA with word vectors", "pla_words", published=of("PLA")),
        Row("LaSO", "laso", published=of("LaSO", "")),
        Row("MAML", "maml", published=of("MAML", "")),
        Row("MAML, first-order", "maml_first_order"),
        Row("WGA", "base", (_wga_of(config),), of("WGA")),
        *_both(published=of),
        *_FORMS,
    ]
    if in_paper:
        rows += _both(", mirrorBERT", _words(config, "mirrorbert"), lambda name: of(name, "mirrorBERT"))
    shown = {*(row.method for row in rows), *_OURS}
    others = [name for name, method in METHODS.items() if not method.on_request and name not in shown]
    rows += [Row(_TITLES.get(name, name.replace("_", " ")), name) for name in (*_OURS, *others)]
    note = "The last rows, from zero-shot on, are not in the papers."
    if dataset == "coco":
        note += f" 1-shot numbers are those of WGA's paper. {_LOST.format('table 1')}"
    if dataset == "imaterialist":
        note += f" {_LOST.format('table 13')}"
    what = {"scenes": "generated scenes", "folder": "own photos"}.get(dataset, dataset)
    return Table(f"All methods, {what}", _against("Base", rows), note)


def _laso_protocol(config) -> Table:
    of = functools.partial(published_as, backbone="ResNet-101", policy="laso")
    conv4 = {"backbone": "conv4", "backbone_weights": "", "train_backbone": True, "data.image_size": 0}

    def conv4_of(method):  # one number, in section 2.4
        return published_as(method, backbone="Conv-4-64", policy="laso") if method == "LCM" else None

    rows = (
        Row("LaSO", "laso", lost="table 4"),
        Row("KGGR", "", published=of("KGGR")),
        Row("NLC", "", lost="table 4"),
        Row("BCR", "", lost="table 4"),
        Row("WGA, ResNet-101", "base", (_wga_of(config) | _backbone(config, "resnet101"),), of("WGA")),
        *(row._replace(lost="table 4") for row in (*_both(", Conv-4-64", conv4, conv4_of), *_both())),
        Row("ridge", "ridge"),
        Row("region word ridge", "region_word_ridge"),
    )
    note = f"KGGR, NLC and BCR have no public code; the papers quote their numbers. {_LOST.format('table 4')} "
    note += "The supports are LaSO's own." if config.data.episodes else "The supports are random, not LaSO's own."
    return Table("LaSO's protocol", _against("Base", rows), note)


def _components(_) -> Table:
    top = {"query_top": 12}
    rows = []
    for row in (
        Row("without CM loss", "base", ({"model.cm_loss": False},)),
        Row("without cross-attention", "base", ({"model.attention": "none"},)),
        Row("without dynamic convolution", "base", ({"model.dynamic": False},)),
        Row("local features of queries, top 12", "base", ({"model.query_top": 12},), published_as("Base", **top)),
    ):
        rows += [row, _untrained(row)]
    rows += [*_both(published=published_as), *_FORMS]
    return Table("Components (table 5, A.3.3)", _against("Base", rows), _LOST.format("table 5"))


def _attention(_) -> Table:
    titles = {"global": "global features", "low_rank": "low-rank bilinear pooling", "channelwise": "channel-wise"}
    rows = []
    for attention in ("simple", "standard", *titles):
        of = functools.partial(published_as, attention=attention)
        base, lcm = _both(f", {titles.get(attention, attention)}", {"model.attention": attention}, of)
        rows += [_untrained(base), base, lcm._replace(against=base.name)]
    return Table("Attention mechanisms (table 14)", _against("Base, channel-wise", rows))


def _selection(_) -> Table:
    titles = {
        "importance": "importance rho",
        "exact": "exact loss change (eq 8)",
        "taylor": "Taylor approximation (eq 10)",
        "low_importance": "low importance (ours)",
        "momentum": "momentum (eq 11, the paper's)",
    }
    rows = [Row("Base", "base", published=published_as("Base"))]
    for selection, title in titles.items():
        paper = published_as("LCM") if selection == "momentum" else None
        rows.append(Row(f"LCM, {title}", "lcm", ({"lcm.selection": selection},), paper))
    note = "The paper says that all its variants are better than Base, and its own the best."
    return Table("What LCM selects by (table 15)", _against("Base", rows), f"{note} {_LOST.format('table 15')}")


def _heads(config) -> Table:
    rows = []
    for n_heads in (1, 2, 4, 6, 8, 10, 12, 14, 16):
        width = {"model.n_heads": n_heads, "model.d_joint": config.model.d_joint // n_heads * n_heads}
        paper = published_as("WGA", n_heads=n_heads, paper="WGA, Yan et al. 2022")
        rows.append(Row(f"Base, {n_heads} heads", "base", (width,), against="Base, 8 heads"))
        rows.append(Row(f"WGA, {n_heads} heads", "base", (_wga_of(config) | width,), paper, "WGA, 8 heads"))
    note = "d_joint is rounded down to a multiple of the heads. "
    note += "Numbers of the paper's figure 3 are not in published.json."
    return Table("Attention heads (figure 3a; WGA's table 5)", _against("", rows), note)


def _theta(config) -> Table:
    rows = [Row("Base", "base", published=published_as("Base"))]
    for scaling in SCORE_SCALINGS:
        title, runs = {"minmax": "scaled", "none": "raw"}[scaling], ({"lcm.score_scaling": scaling},)
        paper = published_as("LCM") if scaling == config.lcm.score_scaling else None
        rows += [Row(f"LCM, {title} scores, {t:g}", f"lcm@{t:g}", runs) for t in config.lcm.thresholds]
        rows.append(Row(f"LCM, {title} scores, chosen on validation", "lcm", runs, paper))
    note = "The paper's best theta is 0.65 on its scale of scores, on which 0.5 is Base, as on ours."
    return Table("Thresholds of LCM (figure 3b)", _against("Base", rows), note)


def _backbones(config) -> Table:
    networks = {"resnet50": "ResNet-50", "clip_resnet50": "CLIP ResNet-50", "clip_vit_b_32": "CLIP ViT-B/32"}
    rows = [] if config.backbone in networks else _both(f", {config.backbone}")
    for field, title in networks.items():
        rows += _both(f", {title}", _backbone(config, field), functools.partial(published_as, backbone=title))
    reference = "ResNet-50" if config.backbone in networks else config.backbone
    return Table("Backbones (table 7)", _against(f"Base, {reference}", rows))


def _embeddings(config) -> Table:
    rows = []
    for field, title in _own_words(config, _EMBEDDINGS).items():
        rows += _both(f", {title}", _words(config, field), functools.partial(published_as, words=title))
    return Table("Word embeddings (table 8)", _against(rows[0].name, rows))


def _zero_shot(config) -> Table:
    rows = [
        Row(title, "zero_shot", (_words(config, field),), published_as("zero-shot", title))
        for field, title in _own_words(config, ("glove", "clip", "mirrorbert")).items()
    ]
    note = "Words alone, by the models that were trained with 1 and 5 shots; the paper does not say with how many."
    return Table("Zero-shot, by word embedding (table 9)", _against(rows[0].name, rows), note)


def _clip(config) -> Table:
    networks = _backbone(config, "clip_vit_b_32") | _words(config, "clip")
    rows = (*_both(", without CM loss", networks | {"model.cm_loss": False}), *_both(changes=networks))
    rows = [row._replace(lost="table 6") for row in rows]
    return Table("CLIP for photos and words (table 6)", _against("Base", rows), _LOST.format("table 6"))


def _fspml(_) -> Table:
    peers = {"classifier": ("ResNet-50 classifier", ""), "PLA": ("PLA", "learned"), "PLA with word vectors": ("PLA",)}
    peers |= {"LaSO": ("LaSO", ""), "MAML": ("MAML", ""), "WGA": ("WGA",)}
    models = {name: (name,) for name in _BOTH} | {f"{name}, mirrorBERT": (name, "mirrorBERT") for name in _BOTH}
    rows = [Row(name, "", published=published_as(*of, split="FsPML")) for name, of in (peers | models).items()]
    note = "FsPML's lists of labels are not at hand, so no row can be run. "
    return Table("COCO in FsPML's split (table 2)", _against("Base", rows), note + _LOST.format("table 3"))


def _seeds(config) -> Table:
    runs = tuple({"seed": config.seed + i} for i in range(N_SEEDS))
    base, lcm = (row._replace(runs=runs) for row in _both(published=published_as))
    rows = [_untrained(base), base, lcm, Row("LCM with random scores", "lcm_random_scores", runs)]
    note = "Another seed draws other parameters, other episodes to train on, and other episodes to test on."
    return Table(f"{N_SEEDS} seeds (section 5.4.3)", _against("Base", rows), note)


def _wga(config) -> Table:
    variants = {
        "without CM loss": {"model.cm_loss": False, "model.query_loss_on": "both"},
        "simple attention": {"model.attention": "simple"},
        "global features": {"model.attention": "global"},
        "simple attention with local features": {"model.attention": "simple_local"},
    }
    of, wga = functools.partial(published_as, "WGA", paper="WGA, Yan et al. 2022"), _wga_of(config)
    full = Row("WGA", "base", (wga,), of(variant="full"))
    rows = (
        *(Row(variant, "base", (wga | changes,), of(variant=variant)) for variant, changes in variants.items()),
        full,
        _untrained(full),
        Row("WGA, fine-tuned on the support", "base_tuned", (wga,), of(variant="fine-tuned")),
        # What stands between WGA and Base, one by one.
        Row("WGA, with skip connection", "base", (wga | {"model.skip": True},)),
        Row("WGA, identity at the start", "base", (wga | {"model.anchor": True, "model.skip": True},)),
        Row("WGA, trained as Base", "base", (WGA,)),
        Row("Base", "base"),
    )
    return Table("WGA and its variations (its tables 3 and 6)", _against("WGA", rows))


def _reading(_) -> Table:
    base, lcm = _both()
    rows = [base, lcm, _untrained(base)]
    rows.append(Row("LCM, raw scores", "lcm", ({"lcm.score_scaling": "none"},), against="LCM"))
    for title, changes in {
        ", without skip connection": {"model.skip": False, "model.anchor": False},
        ", anchored": {"model.anchor": True, "model.skip": True},
        ", p_att and p_dyn balanced": {"model.balance": 0.25},
        ", A_visual frozen": {"model.freeze_visual": True},
        ", LCM during training": {"lcm.during_training": True},
    }.items():
        base, lcm = _both(title, changes)
        rows += [_untrained(base), base, lcm._replace(against=base.name)]
    return Table("Our reading of what the paper leaves open", _against("Base", rows))


def _by_name(config) -> Table:
    rows = [
        Row("ridge", "ridge"),
        Row("names alone", "class_words"),
        Row("names and photos", "class_word_ridge"),
        Row("... without the classes that are kinds of a label", "class_word_ridge_no_kinds"),
        Row("... nor those with a label in their name", "class_word_ridge_no_names"),
        Row("... with the name of another label", "class_word_ridge_permuted"),
        Row("... with made-up words", "class_word_ridge_made_up"),
        Row("... with another's name, always used", "class_word_ridge_permuted", ({"class_words.gated": False},)),
    ]
    note = f"{config.backbone} was trained on classes of these names, such as breeds of dogs: they are not new to it."
    return Table("Labels by name, through the backbone's classifier", _against("ridge", rows), note, untrained=True)


def _splits(config) -> Table:
    table, runs = _by_name(config), tuple({"data.split": "auto", "data.seed": i} for i in range(N_SPLITS))
    rows = tuple(row._replace(runs=runs) for row in table.rows if row.runs == ({},))
    return table._replace(title=f"Labels by name in {N_SPLITS} random label splits", rows=rows, over="label splits")


def _wga_of(config) -> dict:
    """Changes to WGA; with a backbone that is trained, in the steps of the config."""
    return WGA if config.train_backbone else WGA | WGA_TRAINING


def _untrained(row: Row) -> Row:
    """The control of a Base."""
    return Row(f"{row.name}, untrained", "base_untrained", row.runs, against=row.name)


def _both(title: str = "", changes: Mapping = {}, published: Callable = lambda _: None) -> list[Row]:
    """Base and LCM with the same changes."""
    return [Row(f"{name}{title}", method, (changes,), published(name)) for name, method in _BOTH.items()]


def _against(reference: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows, compared with one of them where they name no other; none with itself."""
    rows = [row._replace(against=row.against or reference) for row in rows]
    return tuple(row._replace(against="") if row.against == row.name else row for row in rows)


def _backbone(config, name: str) -> dict:
    """Changes to a frozen backbone with its published weights; none where the config has it, perhaps from elsewhere."""
    if config.backbone == name:
        return {}
    return {"backbone": name, "backbone_weights": "published", "train_backbone": False, "data.image_size": 0}


def _words(config, name: str) -> dict:
    """Changes to a word embedding in its usual place; none where the config has it, perhaps from elsewhere."""
    return {} if config.labels.embedding == name else {"labels.embedding": name, "labels.vectors": ""}


def _own_words(config, fields: Iterable[str]) -> dict[str, str]:
    """Titles of the config's word embedding, first, and of others."""
    return {field: _EMBEDDINGS.get(field, field) for field in (config.labels.embedding, *fields)}


_PHOTOS = ("voc", "coco", "nus_wide", "imaterialist")
_OTHERS = (
    *(_laso_protocol, _components, _attention, _selection, _heads, _theta),
    *(_backbones, _embeddings, _zero_shot, _clip, _fspml, _seeds, _wga, _reading, _by_name, _splits),
)
TABLES: dict[str, Callable[[ConfigDict], Table]] = {
    **{name: functools.partial(_main_table, dataset=name) for name in _PHOTOS},
    "demo": functools.partial(_main_table, dataset="scenes"),
    "folder": functools.partial(_main_table, dataset="folder"),
    **{table.__name__.removeprefix("_"): table for table in _OTHERS},
}
DEFAULT_CONFIGS = {
    **dict.fromkeys(TABLES, "configs/coco.py"),
    **{name: f"configs/{name}.py" for name in (*_PHOTOS, "demo", "folder")},
    "laso_protocol": "configs/coco.py:laso",
}
