"""Prediction against evaluation on the same episode, and as a user meets it: new labels, odd photos, mistakes."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.special import expit, logit

from configs import folder
from mlfsic_jax import backbones
from mlfsic_jax.backbones import weights as pretrained
from mlfsic_jax.run import classifier as predict
from mlfsic_jax.run import evaluate, inputs, train
from mlfsic_jax.system.errors import InputError
from tests import made_up
from tests.test_whole_program import TINY, save_word_vectors

WORDS = (*made_up.FOLDER_LABELS, "kelp", "sun", "umbrella")


def folder_run(root):
    """A run on made-up photos with a frozen backbone and GloVe: config and workdir."""
    made_up.make_folder(root / "photos", "labels", per_label=10)
    rng = np.random.default_rng(0)
    for path in sorted((root / "photos/photos").iterdir()):  # patches of colour, which a random backbone tells apart
        Image.fromarray(rng.integers(0, 255, (2, 3, 3), np.uint8)).resize((44, 40)).save(path)
    (root / "data").mkdir()
    save_word_vectors(root / "data/glove.6B.300d.txt", WORDS)
    network = backbones.create("conv4")
    variables = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    pretrained.save_weights(root / "data/conv4.safetensors", variables, network)
    config = folder.get_config()
    config.update_from_flattened_dict(TINY)
    config.backbone, config.backbone_weights = "conv4", str(root / "data/conv4.safetensors")
    config.data.source, config.data_dir = str(root / "photos"), str(root / "data")
    config.cache_dir = str(root / "cache")
    train.train_and_evaluate(config, root / "run")
    return config, root / "run"


def assert_like_evaluation(model, config, workdir):
    """All methods on an episode of photos against ``evaluate.score_episodes``."""
    run, dataset = inputs.load(config), inputs.load_dataset(config)
    (mine,) = model.trained
    key, sizes = jax.random.key(5), {"n_shot": 2, "n_query": 2}
    scores = evaluate.score_episodes(
        *(run.model, train.restore_best(config, run, 1, workdir), run.splits["novel"]),
        **{"key": key, "n_episodes": 1, "thresholds": (mine.theta,), "lcm": train.lcm_options(config)},
        **{"fitted": evaluate.fit_ridge(run.model, mine.variables, run.base, train.ridge_options(config))},
        **{"ridge": train.ridge_options(config)} | sizes,
    )
    (s,), (q,) = evaluate.draw(jax.random.split(key)[0], run.splits["novel"], 1, **sizes)
    split = dataset.splits["novel"]
    photos = {rows: [dataset.load_image(int(split.images[r])) for r in rows] for rows in (tuple(s), tuple(q))}
    names = run.splits["novel"].label_names
    labels = [[name for name, has in zip(names, run.splits["novel"].labels[r], strict=True) if has] for r in s]
    entry = json.loads((workdir / "results.json").read_text())[0]
    for method in predict.METHODS:
        few = predict.fit(model, photos[tuple(s)], labels, method=method, label_names=names)
        found = predict.predict(few, photos[tuple(q)])
        expected = scores.lcm[0, 0] if method == "lcm" else scores.methods[method][0]
        if method in evaluate.CALIBRATED:
            slope, intercept = entry["validation"]["calibration"][method]
            expected = expit(slope * expected + intercept)
        # Of probabilities near 1 the log odds tell the photos apart.
        got, expected = (logit(np.clip(p, 1e-6, 1 - 1e-6)) for p in (found.probabilities, expected))
        # Float32 in other batches; on a frozen backbone's features such a difference may round to another half.
        np.testing.assert_allclose(got, expected, atol=1e-3, err_msg=method)
        assert np.ptp(expected, axis=0).max() > 3e-3, f"{method} says the same of all photos"
        assert found.label_names == names and found.probabilities.dtype == np.float32


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    return folder_run(tmp_path_factory.mktemp("frozen"))


@pytest.fixture(scope="module")
def model(frozen):
    return predict.load(frozen[1])


@pytest.fixture
def support(frozen):
    """Five photos and labels of which the model knows two; the last photo has none of them."""
    photos = sorted((frozen[1].parent / "photos/photos").iterdir())[:5]
    return photos, [["kelp"], ["kelp", "sea"], ["pine tree"], "sea", []]


def run_copy(frozen, tmp_path):
    return shutil.copytree(frozen[1], tmp_path / "copy")


def test_probabilities_are_those_of_evaluation(model, frozen):
    assert_like_evaluation(model, *frozen)


def test_the_default_is_what_was_best_on_validation_and_says_so(model, support):
    (one,) = model.trained
    validation = dict.fromkeys(predict.METHODS, 0.5)
    model = model._replace(
        trained=(
            one._replace(validation=validation | {"ridge": 0.623, "zero_shot": 0.9}),
            one._replace(n_shot=5, validation=validation | {"lcm": 0.7}),
        )
    )
    few = predict.fit(model, *support)  # 2, 2 and 1 photos
    assert (few.method, few.trained.n_shot) == ("ridge", 1)
    assert few.note.startswith("method ridge: best on validation labels (62.3 Ma-AP, 1-shot)")
    assert "2 per label, 1-shot is nearest" in few.note
    many = [*support[0]] * 4, [*support[1]] * 4
    assert (predict.fit(model, *many).method, predict.fit(model, *many).trained.n_shot) == ("lcm", 5)
    assert "method base: chosen by you (50.0 Ma-AP there, 5-shot)" in predict.fit(model, *many, method="base").note


def test_any_number_of_photos_with_one_program(model, support, frozen):
    photos = sorted((frozen[1].parent / "photos/photos").iterdir())[10:31]
    few = predict.fit(model, *support, method="region_word_ridge")
    one = predict.predict(few, photos[0])
    programs = [f._cache_size() for f in (predict._probabilities, predict._frozen_features, evaluate.embed_batch)]
    many = predict.predict(few, photos)
    assert many.probabilities.shape == (21, 3) and one.probabilities.shape == (1, 3)
    # The same program, another place in the batch: sums in another order at most.
    np.testing.assert_allclose(many.probabilities[:1], one.probabilities, atol=1e-6)
    np.testing.assert_allclose(many.probabilities[8:13], predict.predict(few, photos[8:13]).probabilities, atol=1e-6)
    assert predict.predict(few, []).probabilities.shape == (0, 3)
    assert programs == [
        f._cache_size() for f in (predict._probabilities, predict._frozen_features, evaluate.embed_batch)
    ]
    for row, labels in zip(many.probabilities, many.labels, strict=True):
        assert set(labels) == {name for name, p in zip(many.label_names, row, strict=True) if p > 0.5}
        assert [row[many.label_names.index(name)] for name in labels] == sorted(row[row > 0.5], reverse=True)


def test_paths_images_and_arrays_are_the_same(model, support, tmp_path):
    few = predict.fit(model, *support, method="ridge")
    pixels = np.asarray(Image.open(support[0][0]))
    kinds = [support[0][0], str(support[0][0]), Image.open(support[0][0]), pixels]
    rows = [predict.predict(few, kind).probabilities for kind in kinds]
    rows.append(predict.predict(few, kinds).probabilities[3:])
    assert all(np.allclose(row, rows[0], atol=1e-6) for row in rows)

    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(tmp_path / "clear.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    for path in sorted(tmp_path.iterdir()):
        by_path, by_image = (predict.predict(few, photo).probabilities for photo in (path, Image.open(path)))
        np.testing.assert_allclose(by_path, by_image, atol=1e-6, err_msg=path.name)
        assert np.abs(by_path - rows[0]).max() > 1e-6


def test_what_lcm_keeps(model, support):
    few = predict.fit(model, *support, method="lcm")
    assert few.kept.shape == (5, 2, 2) and few.kept.dtype == bool and few.kept.any(axis=(1, 2)).all()
    everything = model._replace(trained=(model.trained[0]._replace(theta=0.5),))
    assert predict.fit(everything, *support, method="lcm").kept.all()
    base = predict.fit(model, *support, method="base")
    assert base.kept is None and base.state.prototypes.shape == (3, 16)
    np.testing.assert_array_equal(few.thresholds, [0.5] * 3)


def test_words_of_new_labels(model, support, tmp_path):
    photos = support[0][:2]
    words = predict._word_vectors(model, ("kelp", "pine_tree", "sea"), 10, None)
    lines = (model.word_files[1]).read_text().splitlines()
    table = {line.split()[0]: np.array(line.split()[1:], float) for line in lines}
    expected = [table["kelp"], (table["pine"] + table["tree"]) / 2, table["sea"]]
    np.testing.assert_allclose(words, expected, atol=1e-6)  # of numbers with four decimals
    with pytest.raises(InputError, match=r"'blob' \(missing: blob\).*--vectors=FILE.*--method=ridge"):
        predict.fit(model, photos, ["blob", "sea"], method="base")
    assert predict.fit(model, photos, ["blob", "sea"], method="prototypes").label_names == ("blob", "sea")

    mine = tmp_path / "mine.npz"
    np.savez(mine, blob=np.arange(10.0), sea=np.ones(10))
    words = predict._word_vectors(model, ("blob", "sea", "kelp"), 10, mine)
    np.testing.assert_allclose(words, [np.arange(10), np.ones(10), table["kelp"]], atol=1e-6)
    with pytest.raises(InputError, match=r"mine.npz has no vector for 1 of the 1 labels: 'kelp'"):
        predict._word_vectors(model, ("kelp",), 10, mine)
    np.savez(mine, blob=np.ones(3))
    with pytest.raises(InputError, match="vectors of 3 numbers, but the model was trained with 10"):
        predict._word_vectors(model, ("blob",), 10, mine)


def test_the_meaning_of_a_name_counts(model, support):
    photos, labels = support
    renamed = [["sun" if name == "kelp" else name for name in ([x] if isinstance(x, str) else x)] for x in labels]
    for method in predict.METHODS:
        a, b = (
            predict.predict(predict.fit(model, photos, names, method=method), photos).probabilities
            for names in (labels, renamed)
        )
        assert np.allclose(a, b) == (method in predict.WORDLESS), method


@pytest.mark.parametrize(
    ("labels", "options", "complaint"),
    [
        (["sea", "sea"], {}, "label 'sea' is on every support photo"),
        (["sea", ["sea", "kelp"]], {"method": "word_ridge"}, "label 'sea' is on every support photo"),
        (["sea"], {}, "2 support photos but labels for 1"),
        ([[], []], {}, "the support has no label"),
        (["sea", ""], {}, "'' is no label name"),
        (["sea", [3.5]], {}, "3.5 is no label name"),
        (["sea", "kelp"], {"label_names": ["sea", "kelp", "sun"]}, "label 'sun' has no support photo"),
        (["sea", "kelp"], {"label_names": ["sea"]}, "label 'kelp' of a support photo is not among the labels sea"),
        (["sea", "kelp"], {"method": "cnn"}, "method 'cnn' is unknown: use one of region_word_ridge"),
        (["sea", "kelp"], {"vectors": "none.txt"}, "none.txt does not exist"),
    ],
)
def test_mistakes_in_the_support(model, support, labels, options, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        predict.fit(model, support[0][:2], labels, **options)
    assert "\n" not in str(caught.value)


def test_one_label_and_one_photo_of_each(model, support):
    photos = support[0]
    cases = [(method, ["sea"]) for method in ("prototypes", "base")]
    cases += [
        (method, labels) for method in ("region_word_ridge", "ridge") for labels in (["sea", []], ["sea", "kelp"])
    ]
    for method, labels in cases:
        found = predict.predict(predict.fit(model, photos[: len(labels)], labels, method=method), photos)
        assert found.probabilities.shape == (5, len(found.label_names))
        assert (found.probabilities >= 0).all() and (found.probabilities <= 1).all()


@pytest.mark.parametrize(
    ("photo", "complaint"),
    [
        ("none.png", "photo none.png cannot be read from none.png: No such file"),
        (np.zeros((4, 4, 3), np.float32), r"photo number 2 is float32 \[4, 4, 3\]: give a path"),
        (b"bytes", "photo number 2 is bytes: give a path"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "photo number 2 is Image: give a path"),
    ],
)
def test_what_is_no_photo(model, support, photo, complaint):
    few = predict.fit(model, *support, method="ridge")
    with pytest.raises(InputError, match=complaint):
        predict.predict(few, [support[0][0], photo])
    rows = list(predict.predict_each(few, [support[0][0], photo, support[0][1]]))
    assert [isinstance(row, InputError) for row in rows] == [False, True, False]
    with pytest.raises(InputError, match=complaint):
        predict.fit(model, [support[0][0], photo], ["sea", "kelp"], method="ridge")


def damage(name, change=lambda data: data[: len(data) // 2]):
    def damage(run):
        for path in run.glob(name):
            path.write_bytes(change(path.read_bytes()))

    return damage


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda run: shutil.rmtree(run), "copy holds no model: give the workdir"),
        (damage("results.json"), "results.json is missing, cut short or damaged"),
        (
            damage("results.json", lambda _: b"[]"),
            "copy was trained by an older version: run its training command again",
        ),
        (damage("results.json", lambda data: data.replace(b'"scale"', b'"scales"')), "of another version"),
        (damage("trained_with.json"), "trained_with.json is missing, cut short"),
        (lambda run: (run / "label_vectors.safetensors").unlink(), "copy was trained by an older version"),
        (damage("label_vectors.safetensors"), "label_vectors.safetensors is missing, cut short or damaged"),
        (damage("model_1shot.safetensors"), "model_1shot.safetensors is missing, cut short or damaged"),
        (lambda run: (run / "model_1shot.safetensors").unlink(), "model_1shot.safetensors is missing"),
        (
            damage("trained_with.json", lambda data: data.replace(b'"weights": "', b'"weights": "0')),
            "other backbone weights than those",
        ),
        (
            damage("results.json", lambda data: data.replace(b"conv4.saf", b"gone.saf")),
            "gone.safetensors, the backbone",
        ),
    ],
)
def test_a_run_that_is_cut_short(frozen, tmp_path, harm, complaint):
    run = run_copy(frozen, tmp_path)
    harm(run)
    with pytest.raises(InputError, match=complaint) as caught:
        predict.load(run)
    assert "\n" not in str(caught.value)


def test_a_shot_count_that_was_not_trained(frozen):
    assert predict.load(frozen[1], n_shot=1).trained[0].n_shot == 1
    with pytest.raises(InputError, match="no model for 5 shots, only for 1"):
        predict.load(frozen[1], n_shot=5)


@pytest.fixture
def user(frozen, tmp_path, monkeypatch):
    """A folder as a user has it: photos, two of them bad, and a support.csv of five lines."""
    monkeypatch.chdir(tmp_path)
    source = sorted((frozen[1].parent / "photos/photos").iterdir())
    for i, path in enumerate(source[:20]):
        target = tmp_path / "mine" / ("deeper" if i % 4 == 0 else "") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (tmp_path / "mine" / "notes.txt").write_text("no photo")
    for i, path in enumerate(source[20:25]):
        shutil.copy(path, tmp_path / f"example{i}.png")
    labels = ["kelp", "kelp|sea", "pine tree", "sea", ""]
    lines = ["file,labels", *(f"example{i}.png,{names}" for i, names in enumerate(labels))]
    (tmp_path / "support.csv").write_text("\n".join(lines))
    return tmp_path


def arguments(frozen, **changes):
    flags = {"workdir": frozen[1], "support": "support.csv", "images": "mine", "out": "out.csv"}
    flags["cache_dir"] = jax.config.jax_compilation_cache_dir
    return [f"--{name}={value}" for name, value in (flags | changes).items()]


@pytest.fixture(autouse=True)
def keep_compilation_cache():
    """The command sets it for its process, which here is that of all tests."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_command(frozen, user, model):
    command = [sys.executable, "-m", "mlfsic_jax.predict", *arguments(frozen)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "best on validation labels" in done.stdout and "wrote out.csv: 20 photos, 3 labels" in done.stdout
    assert "predicting: 20/20 photos" in done.stderr and "Traceback" not in done.stderr
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "labels", "kelp", "sea", "pine tree"] and len(rows) == 20
    few = predict.fit(
        model, [f"example{i}.png" for i in range(5)], [["kelp"], ["kelp", "sea"], ["pine tree"], ["sea"], []]
    )
    for row in rows:
        (p,) = predict.predict(few, row["file"]).probabilities
        np.testing.assert_allclose([float(row[name]) for name in few.label_names], p, atol=1e-4)  # four decimals
        assert row["labels"] == "|".join(predict.labels_above(few, p))


def test_json_and_photos_that_cannot_be_read(frozen, user, capsys):
    for name, content in (("cut.png", Path("example0.png").read_bytes()[:300]), ("text.jpg", b"not a photo")):
        Path("mine", name).write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        predict.main([*arguments(frozen, out="out.json", method="prototypes"), "--images", "example0.png", "mine/00*"])
    assert caught.value.code == predict.UNREADABLE == 3
    captured = capsys.readouterr()
    bad = [line for line in captured.err.splitlines() if line.startswith("unreadable: ")]
    assert len(bad) == 2 and "mine/cut.png" in bad[0] and "mine/text.jpg" in bad[1]
    assert "wrote out.json: 21 photos, 3 labels, 2 unreadable photos left out" in captured.out
    content = json.loads(Path("out.json").read_text())
    assert content["method"] == "prototypes" and content["thresholds"] == {"kelp": 0.5, "sea": 0.5, "pine tree": 0.5}
    assert [entry["file"] for entry in content["unreadable"]] == ["mine/cut.png", "mine/text.jpg"]
    assert len(content["photos"]) == 21 and content["photos"][-1]["file"] == "example0.png"
    for photo in content["photos"]:
        assert set(photo["labels"]) == {name for name, p in photo["probabilities"].items() if p > 0.5}


@pytest.mark.parametrize(
    ("changes", "table", "complaint"),
    [
        ({"out": "out.txt"}, None, "--out=out.txt must end in .csv or .json"),
        ({"out": "none/out.csv"}, None, "--out=none/out.csv cannot be written"),
        ({"support": "none.csv"}, None, "--support=none.csv: no such file"),
        ({"images": "none"}, None, "--images=none is no file, no folder and no pattern"),
        ({"images": "empty"}, None, "--images=empty holds no photos"),
        ({"images": "support.csv"}, None, "none of the 1 photos can be read"),
        ({"workdir": "mine"}, None, "mine holds no model"),
        ({"n_shot": "5"}, None, "has no model for 5 shots, only for 1"),
        ({"n_shot": "five"}, None, "invalid int value: 'five'"),
        ({"method": "cnn"}, None, "invalid choice: 'cnn'"),
        ({}, "file,labels\nexample0.png,kelp\nexample1.png,kepl\n", "'kepl' (missing: kepl)"),
        ({}, "file,kelp,sea,sun\nexample0.png,1,0,0\nexample1.png,0,1,0\n", "label 'sun' has no support photo"),
        ({}, "file,labels\nexample0.png,kelp\nnone.png,sea\n", "photo none.png cannot be read"),
        ({}, "file,labels\nexample0.png,kelp\nsupport.csv,sea\n", "photo support.csv is not a photo of any known kind"),
        ({}, "name,labels\nexample0.png,kelp\n", "support.csv, line 1: the columns must be file,labels"),
        ({}, "file,labels\n", "support.csv names no photo"),
        ({}, "file,labels\nexample0.png,labels\nexample1.png,sea\n", "a label called file or labels"),
    ],
)
def test_mistakes_of_the_user_end_in_one_line(frozen, user, capsys, changes, table, complaint):
    (user / "empty").mkdir()
    if table is not None:
        (user / "support.csv").write_text(table)
    with pytest.raises(SystemExit) as caught:
        predict.main(arguments(frozen, **{"method": "word_ridge"} | changes))
    line = str(caught.value.code)
    assert line.startswith("error: ") and complaint in line and "\n" not in line
    assert not any(user.glob("*out*"))


def test_photos_outside_of_the_csv_file_s_folder(frozen, user, tmp_path):
    (user / "tables").mkdir()
    absolute = user / "example1.png"
    (user / "tables/support.csv").write_text(f"file,labels\n../example0.png,kelp\n{absolute},sea\n")
    predict.main(arguments(frozen, support="tables/support.csv", images="mine/deeper", method="ridge"))
    assert len(Path("out.csv").read_text().splitlines()) == 6


def test_names_of_photos_and_labels_in_any_script(frozen, user, capsys):
    for name in (b"caf\xe9.png", "\u6d77.png".encode()):  # the first in Latin-1, which is no UTF-8
        shutil.copy("example0.png", os.path.join(b"mine/deeper", name))
    Path("support.csv").write_text(
        "file,labels\nexample0.png,caf\u00e9\nexample1.png,cafe\u0301|\u6d77\nexample2.png,\u6d77\n"
    )
    predict.main(arguments(frozen, images="mine/deeper", method="ridge"))
    lines = Path("out.csv").read_bytes().splitlines()
    assert lines[0].decode() == "file,labels,caf\u00e9,\u6d77"
    assert any(line.startswith(b"mine/deeper/caf\xe9.png,") for line in lines)
    assert any(line.startswith("mine/deeper/\u6d77.png,".encode()) for line in lines)
    Path("cut.csv").write_text("file,labels\n/dev/zero,sea\nexample1.png,kelp\n")
    with pytest.raises(SystemExit, match="error: photo /dev/zero cannot be read from /dev/zero: it is no file"):
        predict.main(arguments(frozen, support="cut.csv", method="ridge"))
