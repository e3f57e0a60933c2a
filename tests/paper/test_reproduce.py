"""Tables of generated scenes, tiny: what is run, what is not run again, and what the files say."""

import csv
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import coco, demo, voc
from mlfsic_jax import multilabel_metrics
from mlfsic_jax.methods import METHODS, Method
from mlfsic_jax.paper import reproduce, runs
from mlfsic_jax.paper import tables as paper_tables
from mlfsic_jax.paper.tables import DEFAULT_CONFIGS, Row, Table
from mlfsic_jax.run import config as defaults
from mlfsic_jax.run import evaluate, experiment, inputs, sources
from mlfsic_jax.run.workdir import episodes_file
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import write_arrays
from tests.tiny import scenes

ROWS = (
    Row("classifier", "classifier", published=paper_tables.published_as("ResNet-50 classifier", "", dataset="voc")),
    Row("Base", "base", published=paper_tables.published_as("Base", dataset="voc")),
    Row("LCM", "lcm", published=paper_tables.published_as("LCM", dataset="voc"), against="Base"),
    Row("LCM, 0.6", "lcm@0.6", against="Base"),
    Row("LCM by rho", "lcm", ({"lcm.selection": "importance"},), against="LCM"),
    Row("fine-tuned", "base_tuned", against="Base"),
    Row("MobileNetV2", "base", (paper_tables._backbone(demo.get_config(), "mobilenet_v2"),), against="Base"),
    Row("KGGR", "", published=paper_tables.published_as("KGGR", backbone="ResNet-101", policy="laso")),
    Row("NLC", "", lost="table 4"),
)
GIVEN = ["--config=configs/demo.py:small", "--config.model.d_dynamic=4", "--config.lcm.selection=momentum"]


def tiny(folder):
    config = scenes(folder)
    config.data_dir = str(folder / "data")
    return config


LOAD, EVALUATE_ALONE = inputs.load, experiment.evaluate_alone


def test_methods_without_training_are_evaluated_together(tmp_path, monkeypatch):
    asked = []

    def evaluate_alone(config, run, n_shot, names, variables):
        asked.append((n_shot, names))
        return EVALUATE_ALONE(config, run, n_shot, names, variables)

    monkeypatch.setattr(experiment, "evaluate_alone", evaluate_alone)
    config, names = tiny(tmp_path), ("ridge", "prototypes", "classifier")
    found = {}
    for given in (names, ("ridge",), ("classifier",)):
        made = runs.Runs(config, tmp_path / "-".join(given), given)
        found |= {(given, name): made.values({}, name) for name in given}
    assert asked == [(k, given) for given in (names, ("ridge",), ("classifier",)) for k in config.shots]
    for name in ("ridge", "classifier"):
        jax.tree.map(np.testing.assert_array_equal, found[names, name], found[(name,), name])
    assert runs.Runs(config, tmp_path / "-".join(names), names).values({}, "prototypes").keys() == set(config.shots)
    assert len(asked) == 3 * len(config.shots)  # the last were read from files


class Stop(Exception):
    """Stands for a kill."""


def make(folder, patch):
    patch.setitem(reproduce.TABLES, "demo", lambda config: Table("Tiny scenes", ROWS, "A note."))
    return reproduce.reproduce("demo", tiny(folder), folder / "runs", GIVEN)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A table that was stopped at its last row that can be run, and made again."""
    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:

        def stops(config, run, n_shot, names, variables):
            if names == ("base_tuned",):
                raise Stop
            return EVALUATE_ALONE(config, run, n_shot, names, variables)

        patch.setattr(experiment, "evaluate_alone", stops)
        with pytest.raises(Stop):
            make(folder, patch)
    assert not (folder / "runs" / "demo.md").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "train_steps", lambda *args, **options: pytest.fail("trained again"))
        patch.setattr(experiment, "evaluate_run", lambda *args, **options: pytest.fail("evaluated again"))
        return folder, tiny(folder), make(folder, patch)


def entries(folder):
    with open(folder / "runs" / "demo.csv", newline="") as file:
        return {(row["row"], row["metric"]): row for row in csv.DictReader(file)}


def test_numbers_are_those_of_the_runs(made):
    folder, _, text = made
    found = entries(folder)
    (base,) = json.loads((folder / "runs" / "base" / "results.json").read_text())
    (by_rho,) = json.loads((folder / "runs" / "lcm.selection=importance" / "results.json").read_text())
    assert by_rho["config"]["lcm"]["selection"] == "importance"
    for name, entry, method in (("Base", base, "base"), ("LCM", base, "lcm"), ("LCM by rho", by_rho, "lcm")):
        for metric in ("macro_ap", "micro_ap", "macro_f1", "micro_f1"):
            expected = [100 * entry["methods"][method][metric][key] for key in ("mean", "ci95")]
            got = [float(found[name, metric][key]) for key in ("ours", "interval")]
            np.testing.assert_allclose(got, expected, atol=2e-4)  # 4 digits, and float32 in the episodes' files
        mean, half = (100 * entry["methods"][method]["macro_ap"][key] for key in ("mean", "ci95"))
        assert f"| {mean:.1f} ± {half:.1f}" in next(line for line in text.splitlines() if line.startswith(f"| {name} "))
    sweep = {point["theta"]: point["novel_macro_ap"] for point in base["theta"]["sweep"]}
    np.testing.assert_allclose(float(found["LCM, 0.6", "macro_ap"]["ours"]), 100 * sweep[0.6], atol=2e-4)
    paired = base["paired"]["lcm-base"]["macro_ap"]["mean"]
    np.testing.assert_allclose(float(found["LCM", "macro_ap"]["paired"]), 100 * paired, atol=2e-4)
    assert text == (folder / "runs" / "demo.md").read_text()
    assert (folder / "runs" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_settings_of_the_evaluation_share_one_training(made):
    folder, *_ = made
    (trained,) = folder.glob("runs/*/checkpoints_1shot")
    assert trained.parent.name == "base"


def written(folder):
    found = [*folder.glob("runs/*/*.safetensors"), *folder.glob("runs/*/*.json")]
    return {path: path.stat().st_mtime_ns for path in found}


def no_load(config):
    assert config.backbone == "mobilenet_v2", "loaded again"  # but a row that failed is tried again
    return LOAD(config)


def test_a_finished_table_computes_nothing(made, monkeypatch):
    folder, _, text = made
    monkeypatch.setattr(inputs, "load", no_load)
    before = written(folder)
    assert make(folder, monkeypatch) == text
    assert written(folder) == before and len(before) > 6


def test_other_settings_other_inputs_and_damaged_files_are_not_taken(made, tmp_path, monkeypatch):
    folder, config, *_ = made
    path = episodes_file(folder / "runs" / "base", 1)
    assert runs.read_values(path, config)["base.macro_ap"].shape == (config.eval.episodes,)
    moved = config.copy_and_resolve_references()
    moved.cache_dir, moved.workdir = "elsewhere", "too"
    assert runs.read_values(path, moved) is not None
    moved.eval.n_query = 3
    assert runs.read_values(path, moved) is None
    (tmp_path / "cut").write_bytes(path.read_bytes()[:100])
    assert runs.read_values(tmp_path / "cut", config) is None
    assert runs.read_values(tmp_path / "none", config) is None


def test_what_cannot_be_run_says_why(made):
    _, _, text = made
    (mobilenet, kggr, nlc) = (
        [cell.strip() for cell in line.split("|")][2:4]
        for name in ("MobileNetV2", "KGGR", "NLC")
        for line in text.splitlines()
        if line.startswith(f"| {name} ")
    )
    assert mobilenet == ["not run", ""] and "- not run: MobileNetV2: config.backbone_weights = " in text
    assert kggr == ["published, not rerun", "52.3"]
    assert nlc == ["published in table 4, not rerun", ""]


def test_commands_and_sources(made):
    folder, _, text = made
    command = (
        "python -m mlfsic_jax.main --config=configs/demo.py:small --config.model.d_dynamic=4 "
        f"--config.lcm.selection=importance '--workdir={folder}/runs/lcm.selection=importance'"
    ).replace("'", "")
    assert command in text.replace("'", "")  # a field is given once: the row's
    assert "--config.lcm.selection=momentum" in text
    assert f"python -m mlfsic_jax.reproduce --table=demo {' '.join(GIVEN)} --workdir={folder}/runs" in text
    assert "Yan et al. 2025, table 11" in text and "WGA, Yan et al. 2022, text" in text and "A note." in text
    # Published numbers of photos stand beside those of scenes, but are not subtracted.
    (line,) = (line for line in text.splitlines() if line.startswith("| Base "))
    assert [cell.strip() for cell in line.split("|")][3:5] == ["56.6", ""]


def test_peers_are_scored_on_the_test_episodes(made):
    folder, config, _ = made
    run = inputs.load(config)
    variables = experiment.restore_best(config, run, 1, folder / "runs" / "base")
    views = inputs.feature_views(run, variables)
    novel, e = views["novel"], 3
    episode_key, _ = jax.random.split(experiment.novel_key(config.seed, 1))
    supports, queries = evaluate.draw(episode_key, novel, config.eval.episodes, 1, config.eval.n_query)
    s, q = supports[e], queries[e]
    local = novel.inputs(np.arange(len(novel.labels))).astype(np.float32)
    local = local.reshape(len(local), -1, local.shape[-1])
    for name, method in defaults.create_methods(config, 1, ("classifier", "base_tuned")).items():
        trained = method.train(jax.random.key(0), views["base"]) if name == "classifier" else {"variables": variables}

        @jax.jit
        def score(support, query, method=method, trained=trained):
            images = method.embed(trained, support)
            images |= method.embed_support(trained, images, novel.labels[s], novel.word_vectors)
            state = method.fit(trained, images, novel.labels[s], novel.word_vectors)
            return method.score(trained, state, method.embed(trained, query))

        saved = load_file(folder / "runs" / "base" / f"peer_{name}_1shot.safetensors")
        expected = multilabel_metrics(score(local[s], local[q]), novel.labels[q])
        assert saved[f"{name}.macro_ap"].shape == (config.eval.episodes,)
        # float32 under another jit: of 12 queries two may change places
        np.testing.assert_allclose(saved[f"{name}.macro_ap"][e], expected["macro_ap"], atol=0.02)


@pytest.mark.parametrize("policy", ["", "leakfree", "exclusive"])
def test_the_usual_policy_may_be_named_or_not(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "Runs", MadeUp)
    config = voc.get_config().copy_and_resolve_references()
    config.data.policy = policy
    row = Row("Base", "base", published=paper_tables.published_as("Base", dataset="voc"))
    monkeypatch.setitem(reproduce.TABLES, "voc", lambda config: Table("One row", (row,)))
    text = reproduce.reproduce("voc", config, tmp_path)
    (line,) = (line for line in text.splitlines() if line.startswith("| Base "))
    assert (line.split("|")[4].strip() != "") == (policy != "exclusive")
    path = tmp_path / "episodes.safetensors"
    usual = config.copy_and_resolve_references()
    usual.data.policy = "leakfree"
    write_arrays(path, {"a": np.zeros(2)}, sources.metadata(config))
    assert (runs.read_values(path, usual) is None) == (policy == "exclusive")


@dataclasses.dataclass(frozen=True)
class Toy(Method):
    """Scores nothing."""


@pytest.mark.parametrize("name", ["voc", "demo"])
def test_a_new_method_gets_a_row(name, monkeypatch):
    before = {row.name for row in paper_tables.TABLES[name](demo.get_config()).rows}
    monkeypatch.setitem(METHODS, "my_toy", Toy())
    after = {row.name: row.method for row in paper_tables.TABLES[name](demo.get_config()).rows}
    assert after.keys() - before == {"my toy"} and after["my toy"] == "my_toy"


def test_a_method_that_the_config_leaves_out_is_told(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    config.eval.methods = ("base", "maml")
    found = {f"{name}.{m}": np.ones(4, np.float32) for name in config.eval.methods for m in runs.METRICS}
    monkeypatch.setattr(runs.Runs, "_run", lambda self, changes: {1: found})
    some = runs.Runs(config, tmp_path)
    assert set(some.values({}, "maml")) == {1}  # asked for, so not evaluated alone
    with pytest.raises(InputError, match="leaves out ridge"):
        some.values({}, "ridge")


def test_without_one_row_that_can_be_run_the_reason_is_told(tmp_path):
    config = demo.get_config("small")
    config.labels.embedding, config.labels.vectors = "glove", str(tmp_path / "none.txt")
    with pytest.raises(InputError, match=r"none\.txt'?: no such file"):
        reproduce.reproduce("selection", config, tmp_path / "runs")


class MadeUp(runs.Runs):
    """Runs that took no time: the farther from the base run, the better."""

    def values(self, changes, method):
        changes = self.changes(changes)
        seed = changes.get("seed", changes.get("data.seed", 0))
        noise = np.random.default_rng(seed).normal(0.0, 0.05, 200) + 0.01 * seed  # shared by the methods of a run
        own = np.random.default_rng(len(method)).normal(0.0, 0.01, 200)
        level = 0.4 + 0.02 * len(changes) + {"lcm": 0.02, "base": 0.0}.get(method, 0.001) + noise + own
        values = dict.fromkeys(runs.METRICS, level.astype(np.float32))
        return {k: values for k in self.config.shots}


@pytest.mark.parametrize("name", DEFAULT_CONFIGS)
@pytest.mark.parametrize("get_config", [voc.get_config, coco.get_config, demo.get_config])
def test_every_table_can_be_made_from_every_config(name, get_config):
    config = get_config()
    table = paper_tables.TABLES[name](config)
    names = [row.name for row in table.rows]
    assert len(set(names)) == len(names)
    made = runs.Runs(config, Path("runs"))
    known = {*METHODS, *(f"lcm@{t:g}" for t in config.lcm.thresholds)}
    folders = set()
    for row in table.rows:
        assert row.method in known or (not row.method and (row.published or row.lost)), row
        assert not row.against or row.against in names, row
        if get_config == coco.get_config and name not in ("coco", "imaterialist"):  # tables 1 and 13 are not there
            assert row.published is None or paper_tables.published(row.published, 1), row
        folders |= {(made.folder(changes), *map(tuple, made.changes(changes).items())) for changes in row.runs}
        for changes in row.runs:
            if (name, config.data.name) == ("splits", "scenes"):
                with pytest.raises(InputError, match="generated data have their own split"):
                    defaults.validate(made.changed(changes))
            else:
                defaults.validate(made.changed(changes))
    assert len({folder for folder, *_ in folders}) == len(folders)  # other settings, another folder


def test_default_configs_are_there():
    assert set(paper_tables.TABLES) == set(DEFAULT_CONFIGS)
    assert all(Path(path.partition(":")[0]).is_file() for path in DEFAULT_CONFIGS.values())


@pytest.mark.parametrize(
    ("fields", "n_shot", "expected", "where"),
    [
        (paper_tables.published_as("Base"), 1, 47.02, 7),
        (paper_tables.published_as("LCM"), 5, 52.79, 7),
        (paper_tables.published_as("LCM", dataset="voc"), 5, 65.41, 11),
        (paper_tables.published_as("LCM", attention="low_rank"), 5, 42.71, 14),
        (paper_tables.published_as("Base", "BERT concn"), 1, 49.29, 8),
        (paper_tables.published_as("zero-shot", "mirrorBERT"), 5, 23.65, 9),
        (paper_tables.published_as("Base", query_top=12), 5, 49.11, "A.3.3"),
        (paper_tables.published_as("MAML", "", split="FsPML"), 1, 42.03, 2),
        (paper_tables.published_as("WGA", n_heads=14), 1, 40.18, 5),
        (paper_tables.published_as("WGA", variant="fine-tuned"), 1, 45.27, 6),
    ],
)
def test_published_numbers(fields, n_shot, expected, where):
    row = paper_tables.published(fields, n_shot)
    assert (row["macro_ap"], row["table"]) == (expected, where)


def test_a_number_that_was_not_published_is_not_made_up():
    assert paper_tables.published(paper_tables.published_as("WGA"), 5) is None  # on COCO: table 1
    assert paper_tables.published(paper_tables.published_as("WGA", n_heads=14), 5) is None
    assert paper_tables.published(None, 1) is None


def test_differences_are_paired_and_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "Runs", MadeUp)
    config = voc.get_config()
    text = reproduce.reproduce("voc", config, tmp_path)
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    results = {row[1]: row[2:-1] for row in rows if len(row) == 9}  # method and three cells for each shot count
    paired = {row[1]: row[2:-1] for row in rows if len(row) == 8}
    run = MadeUp(config, tmp_path)
    base, lcm = (run.values({}, method)[5]["macro_ap"].astype(float) for method in ("base", "lcm"))
    assert results["LCM"][3:] == [
        f"{100 * lcm.mean():.1f} ± {196 * lcm.std(ddof=1) / np.sqrt(200):.1f}",
        "65.4",
        f"{100 * lcm.mean() - 65.41:+.1f}",
    ]
    # Noise that both share is not in the difference, so two points are told apart, which single intervals hide.
    reference, _, _, cell, published = paired["LCM"]
    assert reference == "Base" and published == "+3.9" and cell.endswith(" *")
    mean, low, high = map(float, re.findall(r"[+-][\d.]+", cell))
    half = 196 * (lcm - base).std(ddof=1) / np.sqrt(200)
    np.testing.assert_allclose([mean, high - mean, mean - low], [100 * (lcm - base).mean(), half, half], atol=0.11)
    assert not paired["ridge"][2].endswith("*")  # a tenth of a point


def test_of_several_seeds_the_spread_over_seeds_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "Runs", MadeUp)
    config = coco.get_config()
    text = reproduce.reproduce("seeds", config, tmp_path, ["--config=configs/coco.py"])
    run = MadeUp(config, tmp_path)
    means = [100 * run.values({"seed": seed}, "base")[1]["macro_ap"].astype(float).mean() for seed in range(10)]
    (line,) = (line for line in text.splitlines() if line.startswith("| Base "))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2] == f"{np.mean(means):.1f} ± {np.std(means, ddof=1):.1f}"
    assert cells[3:5] == ["47.0 ± 0.03", f"{np.mean(means) - 47.02:+.1f}"]
    assert "standard deviation over seeds" in text and text.count("--config.seed=9") == 4


def test_of_several_label_splits_the_spread_over_splits_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "Runs", MadeUp)
    config = voc.get_config("lite0")
    text = reproduce.reproduce("splits", config, tmp_path, ["--config=configs/voc.py:lite0"])
    run, splits = MadeUp(config, tmp_path), [{"data.split": "auto", "data.seed": i} for i in range(6)]
    means = [100 * run.values(split, "ridge")[1]["macro_ap"].astype(float).mean() for split in splits]
    line = next(line for line in text.splitlines() if line.startswith("| ridge "))
    assert line.split("|")[2].strip() == f"{np.mean(means):.1f} ± {np.std(means, ddof=1):.1f}"
    assert "standard deviation over label splits" in text and "bootstrap intervals over label splits" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--table=voc", "--config.data.source=/nowhere"], "config.data.source = '/nowhere'"),
        (["--config=configs/demo.py"], "--table is missing"),
        (["--table=tables"], "tables"),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_line(arguments, complaint, tmp_path):
    command = [sys.executable, "-m", "mlfsic_jax.reproduce", *arguments, f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert complaint in done.stderr[done.stderr.index("error: ") :]


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("all_tables")


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULT_CONFIGS)
def test_a_table_of_scenes(shared_runs, monkeypatch, name):
    """All tables, about an hour: those rows run whose backbones and words are there."""
    monkeypatch.setattr(paper_tables, "N_SEEDS", 2)
    config = tiny(shared_runs)
    text = reproduce.reproduce(name, config, shared_runs / "runs")
    with open(shared_runs / "runs" / f"{name}.csv", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["metric"] == "macro_ap"]
    assert all((row["ours"] != "") != ("no such file" in row["reason"]) for row in found if row["command"])
    ours = [float(row["ours"]) for row in found if row["ours"]]
    assert ours and all(0 < value <= 100 for value in ours)
    assert all(row["row"] in text for row in found)
