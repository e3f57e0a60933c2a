"""The model out of the box, with a small network and a small encoder in place of the published ones."""

import csv
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.special import expit

import mlfsic_jax as mf
from mlfsic_jax import export as export_command
from mlfsic_jax import predict
from mlfsic_jax.backbones import weights
from mlfsic_jax.core.episodes import Episode
from mlfsic_jax.data import class_words
from mlfsic_jax.data.folder import read_csv
from mlfsic_jax.methods import METHODS
from mlfsic_jax.run import classifier, inputs, ready
from mlfsic_jax.system.errors import InputError
from tests import ready_model

LABELS = ("cat", "dog", "hot dog")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    ready_model.write_files(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        patches = rng.integers(0, 255, (2, 3, 3), np.uint8)
        Image.fromarray(patches).resize((44, 40)).save(tmp_path / f"{i}.png")
    return sorted(tmp_path.glob("*.png"))


@pytest.fixture
def data_dir(files, monkeypatch):
    ready_model.stand_in(monkeypatch, files)
    return files


def local_features(folder, photos):
    """float16 local features of the photos, as evaluation has them."""
    model = ready.load(data_dir=folder)
    pixels = np.stack([np.asarray(Image.open(p).resize((32, 32), Image.Resampling.BILINEAR)) for p in photos])
    return np.asarray(inputs.backbone_features(model.backbone, model.backbone_variables, pixels), np.float16)


@pytest.fixture
def features(data_dir, photos):
    return local_features(data_dir, photos)


def test_names_alone_are_the_prior(data_dir, photos, features):
    model = mf.load(data_dir=data_dir)
    few = mf.fit(model, [], [], label_names=LABELS)
    assert few.trained.n_shot == 0 and "names alone" in few.note
    mixtures = inputs.class_mixtures("classes", [[name] for name in LABELS], data_dir / "minilm")
    w, b = weights.load_head(data_dir / "lite.safetensors", "efficientnet_lite0")
    mean, mean_logits = class_words.backbone_means("", 0)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    local = features.reshape(8, -1, 32).astype(np.float64)
    x, z = unit(local.mean(axis=1) - mean), unit((local @ w.T + b).max(axis=1) - mean_logits)
    a = mixtures.reshape(3, 2, 1000)
    h = a @ unit(w - w.mean(axis=0))
    length = np.linalg.norm(h, axis=2, keepdims=True)
    d, a = (h / length).sum(axis=1), (a / length).sum(axis=1)
    p = (x @ d.T + 1.25 * z @ a.T) / np.linalg.norm(d, axis=1)
    slope, intercept = few.trained.calibration["class_word_ridge"]
    expected = expit(slope * (p - p.mean(axis=1, keepdims=True)) + intercept)
    found = few.predict(photos)
    np.testing.assert_allclose(found.probabilities, expected, atol=2e-3)  # features rounded to float16 after XLA
    assert found.label_names == LABELS and np.ptp(expected, axis=0).max() > 0.1


def test_photos_are_scored_as_in_an_evaluation(data_dir, photos, features):
    model = mf.load(data_dir=data_dir)
    given = [["cat"], ["dog"], ["hot dog", "dog"], []]
    few = mf.fit(model, photos[:4], given, label_names=LABELS)
    assert few.trained.n_shot == 1 and "names and photos" in few.note
    matrix = np.array([[name in names for name in LABELS] for names in given] + [[False] * 3] * 4)
    method, trained = METHODS["class_word_ridge"], few.trained.stores["classes"]
    words = inputs.class_mixtures("classes", [[name] for name in LABELS], data_dir / "minilm")
    episode = Episode(np.arange(4), np.arange(4, 8))
    scores, _ = mf.evaluate(method, trained, features, matrix, words, episode)
    slope, intercept = few.trained.calibration["class_word_ridge"]
    found = few.predict(photos[4:]).probabilities
    np.testing.assert_allclose(found, expit(slope * scores[0] + intercept), atol=2e-3)
    assert np.ptp(found, axis=0).max() > 0.1


def test_a_fit_compiles_once_while_photos_are_read(data_dir, photos, caplog):
    model = mf.load(data_dir=data_dir)
    jax.config.update("jax_log_compiles", True)  # in every thread
    try:
        mf.fit(model, photos[:7], list("abcdefg"))
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [text.split()[4] for text in caplog.messages if text.startswith("Finished XLA compilation of jit(")]
    assert compiled == ["jit(_fit)"]  # ahead, and not once more for the arrays that came


def test_reasons_add_up_and_name_classes(data_dir, photos):
    few = mf.fit(mf.load(data_dir=data_dir), photos[:3], ["cat", "dog", "hot dog"])
    reasons = few.reasons(photos[5])
    assert {reason.label for reason in reasons} == {"cat", "dog", "hot dog"}
    assert [r.probability for r in reasons] == sorted((r.probability for r in reasons), reverse=True)
    raw = {r.label: r.words + r.photos for r in reasons}
    # Scores differ from these by the mean left-out score alone, the same for all photos.
    other = {r.label: r.words + r.photos for r in few.reasons(photos[6])}
    slope, _ = few.trained.calibration["class_word_ridge"]
    logits = np.log(few.predict(photos[5:7]).probabilities.astype(float)) - np.log1p(
        -few.predict(photos[5:7]).probabilities
    )
    for c, name in enumerate(few.label_names):
        np.testing.assert_allclose((logits[0, c] - logits[1, c]) / slope, raw[name] - other[name], atol=1e-3)
    names = class_words.class_names()
    assert all(len(r.classes) == 5 and r.classes[0][0] in names for r in reasons)
    assert few.predictor.grid == (2, 2) and all(set(r.region) <= {0, 1} for r in reasons)
    assert all(match.label in LABELS for match in few.explain(photos[5]))


def test_several_wordings_are_averaged(data_dir, photos):
    model = mf.load(data_dir=data_dir)
    plain, same, both = (
        mf.fit(model, [], [], label_names=("cat", "pet"), wordings=wordings).predict(photos).probabilities
        for wordings in ({"pet": ("dog",)}, {"pet": ("dog", "dog")}, {"pet": ("dog", "hot dog")})
    )
    np.testing.assert_allclose(plain, same, atol=1e-5)
    assert np.abs(plain - both).max() > 1e-3
    one = mf.fit(model, [], [], label_names=("cat", "pet"), wordings={"pet": "dog"})  # not its letters
    np.testing.assert_allclose(one.predict(photos).probabilities, plain, atol=1e-5)
    with pytest.raises(InputError, match="wordings has 'Pet', which is not among the labels cat, pet"):
        mf.fit(model, [], [], label_names=("cat", "pet"), wordings={"Pet": "dog"})


def test_a_name_that_the_encoder_cannot_read_needs_photos(data_dir, photos):
    model = mf.load(data_dir=data_dir)
    with pytest.raises(InputError, match="the text encoder cannot read the label '猫': give it photos, or an English"):
        mf.fit(model, [], [], label_names=("猫", "dog"))
    assert mf.fit(model, [], [], label_names=("猫", "dog"), wordings={"猫": "cat"}).label_names == ("猫", "dog")
    assert "cannot read 猫: English wordings would help" in mf.fit(model, photos[:2], ["猫", "dog"]).note


@pytest.mark.parametrize(
    ("photos_given", "labels", "options", "message"),
    [
        (1, [None], {}, r"None is neither a label nor a list of labels: give \[\] for none"),
        (1, [float("nan")], {}, "nan is neither a label"),
        (1, ["cat"], {"wordings": {"cat": []}}, "wordings has none for 'cat'"),
        (1, ["cat"], {"wordings": ["cat"]}, "wordings must be a dict from labels to wordings"),
    ],
)
def test_odd_arguments_are_told(data_dir, photos, photos_given, labels, options, message):
    with pytest.raises(InputError, match=message):
        mf.fit(mf.load(data_dir=data_dir), photos[:photos_given], labels, **options)


def test_a_column_of_paths_is_many_photos(data_dir, photos):
    few = mf.fit(mf.load(data_dir=data_dir), [], [], label_names=("cat", "dog"))
    assert few.predict(np.array(photos[:3], object)).probabilities.shape == (3, 2)
    with pytest.raises(InputError, match="number 1 is NoneType"):
        few.predict(None)


def test_support_photos_are_several_of_any_kind_of_iterable(data_dir, photos):
    model = mf.load(data_dir=data_dir)
    assert mf.fit(model, iter(photos[:2]), iter(["cat", "dog"])).label_names == ("cat", "dog")
    with pytest.raises(InputError, match=r"fit takes several photos: give \[photo\]"):
        mf.fit(model, "1.jpg", ["cat"])


def test_names_are_spelled_one_way(data_dir, photos):
    few = mf.fit(mf.load(data_dir=data_dir), photos[:3], ["cafe\u0301", " caf\u00e9", "cat"])
    assert few.label_names == ("caf\u00e9", "cat")
    assert mf.fit(few.predictor, [], [], label_names="cat").label_names == ("cat",)


def test_it_is_evaluated_on_episodes_of_ones_own(data_dir, features):
    trained = {name: np.asarray(x) for name, x in ready.load(data_dir=data_dir).trained[0].stores["classes"].items()}
    mixtures = inputs.class_mixtures("classes", [["cat"], ["dog"]], data_dir / "minilm")
    labels, episode = np.eye(2, dtype=bool)[[0, 1] * 4], Episode(np.arange(2), np.arange(2, 8))
    scores, truth = mf.evaluate(METHODS["class_words"], trained, features, labels, mixtures, episode)
    assert truth.shape == scores.shape == (1, 6, 2) and np.ptp(scores[0], axis=0).max() > 0.01


def test_missing_files_are_one_line(tmp_path, data_dir, monkeypatch):
    with pytest.raises(InputError, match=r"needs efficientnet_lite0 and minilm in .*empty, 1\d\d MB to download: run"):
        ready.load(data_dir=tmp_path / "empty")
    fetched = []
    monkeypatch.setattr(ready.download, "fetch_and_unpack", lambda wanted, folder: fetched.extend(wanted))
    with pytest.raises(InputError):  # nothing came
        ready.load(data_dir=tmp_path / "empty", fetch=True)
    assert [asset.filename for asset in fetched] == [
        "lite.safetensors",
        "minilm/model.safetensors",
        "minilm/tokenizer.json",
    ]
    with pytest.raises(InputError, match="quality 'best' is unknown: use one of standard, high, highest"):
        ready.load(quality="best", data_dir=data_dir)
    with pytest.raises(InputError, match="0, 1, 5 photos per label, not 3"):
        ready.load(n_shot=3, data_dir=data_dir)


def test_other_methods_are_refused(data_dir, photos):
    with pytest.raises(InputError, match="out of the box has class_word_ridge only, not method ridge"):
        mf.fit(mf.load(data_dir=data_dir), photos[:2], ["cat", "dog"], method="ridge")


def run(data_dir, *flags):
    predict.main([*flags, f"--data_dir={data_dir}", f"--cache_dir={jax.config.jax_compilation_cache_dir}"])


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def keep_compilation_cache():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_command_needs_no_workdir(data_dir, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(data_dir, "--labels=cat, dog = dog | hot dog", f"--images={tmp_path}", "--out=names.csv")
    found = rows("names.csv")
    assert len(found) == 8 and list(found[0]) == ["file", "labels", "cat", "dog"]
    few = mf.fit(mf.load(data_dir=data_dir), [], [], label_names=("cat", "dog"), wordings={"dog": ["dog", "hot dog"]})
    expected = few.predict([row["file"] for row in found]).probabilities
    np.testing.assert_allclose([[float(row[name]) for name in ("cat", "dog")] for row in found], expected, atol=1e-4)
    Path("support.csv").write_text("file,labels\n0.png,cat\n1.png,dog\n2.png,\n")
    run(data_dir, "--support=support.csv", "--labels=dog,cat,hot dog", f"--images={tmp_path}", "--out=both.json")
    assert list(json.loads(Path("both.json").read_text())["thresholds"]) == ["dog", "cat", "hot dog"]
    assert "from names and photos" in capsys.readouterr().out


def test_names_with_separators_are_written_so_that_they_are_read_back(data_dir, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [["cat|dog"], ["C#"], ["cat|dog", "C#"]]
    Path("support.json").write_text(json.dumps([{"file": f"{i}.png", "labels": x} for i, x in enumerate(given)]))
    monkeypatch.setattr(classifier, "THRESHOLD", 0.2)
    run(data_dir, "--support=support.json", f"--images={tmp_path}", "--out=out.csv")
    found, names = read_csv(Path("out.csv"), anywhere=True)
    few = mf.fit(mf.load(data_dir=data_dir), photos[:3], given)
    assert [set(labels) for labels in found.values()] == [set(labels) for labels in few.predict(list(found)).labels]
    assert "cat|dog" in names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "name the labels: --labels="),
        (("--labels=cat,,dog",), "has an empty name"),
        (("--labels=cat,dog,cat",), "has 'cat' twice"),
        (("--labels=cat|dog",), "is 'cat|dog' several labels? write names with commas"),
        (("--labels=cat; dog",), "is 'cat; dog' several labels? write names with commas"),
        (("--support=support.csv", "--out=support.csv"), "is the file of --support"),
        (("--labels=cat = cat |",), "a wording of 'cat' is empty"),
        (("--labels=dog", "--support=support.csv"), "label 'cat' of a support photo is not among the labels dog"),
        (("--labels=cat", "--quality=high"), "needs efficientnet_lite2 in"),
        (("--labels=cat", "--quality=high", "--workdir=runs"), "is of the model out of the box, not of runs"),
    ],
)
def test_mistakes_are_one_line(data_dir, photos, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("support.csv").write_text("file,labels\n0.png,cat\n")
    with pytest.raises(SystemExit) as caught:
        run(data_dir, f"--images={tmp_path}", "--out=out.csv", *flags)
    error = str(caught.value.code)  # which Python prints, with status 1
    assert message in error and error.count("\n") == 0 and not Path("out.csv").exists()
    assert Path("support.csv").read_text() == "file,labels\n0.png,cat\n"


def test_an_export_predicts_the_same_without_the_files(data_dir, photos, tmp_path, monkeypatch, capsys):
    export_command.main([f"--out={tmp_path / 'model'}", f"--data_dir={data_dir}"])
    assert "card.md says what it is" in capsys.readouterr().out
    before = mf.fit(mf.load(data_dir=data_dir), photos[:2], ["cat", "dog"])
    monkeypatch.setattr(ready, "load", functools.partial(ready.load, data_dir=tmp_path / "nowhere"))
    few = mf.fit(ready.load(tmp_path / "model"), photos[:2], ["cat", "dog"])
    np.testing.assert_allclose(few.predict(photos).probabilities, before.predict(photos).probabilities, atol=1e-6)
    assert few.reasons(photos[4])[0].classes == before.reasons(photos[4])[0].classes
    alone = mf.fit(ready.load(tmp_path / "model"), [], [], label_names=LABELS)
    assert "out of the box, from names alone" in alone.note
    (tmp_path / "model/minilm/tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"minilm/tokenizer.json is cut short or was altered"):
        ready.load(tmp_path / "model")
