"""A run that evaluates the methods that go by names, on a folder of photos, then photos, export and page from it."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import folder
from mlfsic_jax.data import class_words
from mlfsic_jax.data.words import load_word_vectors
from mlfsic_jax.report.page import write_report
from mlfsic_jax.run import classifier, experiment, inputs
from mlfsic_jax.run.export import export
from mlfsic_jax.run.saved import load
from mlfsic_jax.system.errors import InputError
from tests import made_up, ready_model
from tests.tiny import TINY

METHODS = (
    *("ridge", "class_words", "class_word_ridge", "class_word_ridge_no_kinds", "class_word_ridge_permuted"),
    *("class_word_ridge_made_up", "base"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("named")
    names = made_up.make_folder(root / "photos", "labels", per_label=10)
    rng = np.random.default_rng(0)
    for path in sorted((root / "photos/photos").iterdir()):
        Image.fromarray(rng.integers(0, 255, (2, 3, 3), np.uint8)).resize((44, 40)).save(path)
    (root / "data").mkdir()
    made_up.save_word_vectors(root / "data/glove.6B.300d.txt", names)
    ready_model.write_files(root / "data")
    with pytest.MonkeyPatch.context() as patch:
        ready_model.stand_in(patch, root / "data")
        config = folder.get_config()
        config.update_from_flattened_dict(TINY | {"eval.methods": METHODS})
        config.backbone, config.data.image_size = ready_model.BACKBONE, ready_model.SIZE
        config.data.source, config.data_dir, config.cache_dir = (str(root / d) for d in ("photos", "data", "cache"))
        experiment.train_and_evaluate(config, root / "run")
        yield root


def test_the_methods_are_evaluated_with_their_controls(trained):
    entry = json.loads((trained / "run/results.json").read_text())[0]
    assert list(entry["methods"]) == list(METHODS)
    assert {"class_word_ridge-ridge", "class_word_ridge_permuted-ridge"} <= set(entry["paired"])
    assert "class_word_ridge" in entry["validation"]["calibration"]


def test_made_up_words_take_the_place_of_names(trained):
    encoder, names = trained / "data/minilm", ("cat", "pine tree")
    words = [class_words.made_up_word(name) for name in names]
    assert words[0] != words[1] == class_words.made_up_word("pine tree") and not set(words) & set(names)
    np.testing.assert_array_equal(
        inputs.class_mixtures("classes by made-up words", [[name] for name in names], encoder),
        inputs.class_mixtures("classes", [[word] for word in words], encoder),
    )


def test_photos_page_and_export(trained):
    model = load(trained / "run")
    photos = sorted((trained / "photos/photos").iterdir())
    few = classifier.fit(model, photos[:3], ["kelp", "sea", "pine tree"], method="class_word_ridge")
    assert few.reasons(photos[5])[0].classes and "best" not in few.note
    page = write_report(trained / "run", trained / "page.html", episodes=1).read_text()
    assert "class word ridge score of a predicted label" in page  # whose regions are joined
    export(trained / "run", trained / "model")
    assert (trained / "model/minilm/model.safetensors").is_file()
    again = classifier.fit(load(trained / "model"), photos[:3], ["kelp", "sea", "pine tree"], method="class_word_ridge")
    np.testing.assert_allclose(again.predict(photos).probabilities, few.predict(photos).probabilities, atol=1e-6)
    with pytest.raises(InputError, match="control for evaluations"):
        classifier.fit(model, photos[:2], ["kelp", "sea"], method="class_word_ridge_permuted")
    with pytest.raises(InputError, match="'sea' has no support photo"):
        classifier.fit(model, photos[:1], ["kelp"], label_names=["kelp", "sea"], method="base")


def test_without_minilm_glove_tells_which_classes_a_name_means(trained, capsys):
    """Kernel regression on the classes whose words the file has, as with MiniLM; the other classes get nothing."""
    words, names = trained / "data/glove.6B.300d.txt", ("sea", "pine tree")
    with words.open("a") as file:
        for word, vector in {"tench": 2, "goldfish": 3, "hammerhead": 5}.items():
            file.write(f"{word} {' '.join(str((i * vector) % 7 - 3) for i in range(10))}\n")
    (trained / "data/minilm").rename(trained / "data/elsewhere")
    try:
        model = load(trained / "run")
        few = classifier.fit(model, [], [], label_names=names, method="class_words")
        assert f"names reach classes through the word vectors {words};" in capsys.readouterr().out
        export(trained / "run", trained / "without")
        again = classifier.fit(load(trained / "without"), [], [], label_names=names, method="class_words")
    finally:
        (trained / "data/elsewhere").rename(trained / "data/minilm")
    assert not (trained / "without/minilm").exists()
    mixtures = inputs.class_mixtures("classes", [[name] for name in names], words)
    there = ("tench", "goldfish", "hammerhead")
    label, known = (load_word_vectors(words, some, some) for some in (names, there))
    label, known = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (label, known))
    kernel = np.exp(5 * (known @ known.T - 1)) + 0.1 * np.eye(3)
    expected = np.linalg.solve(kernel, np.exp(5 * (known @ label.T - 1))).T
    np.testing.assert_allclose(mixtures[:, [0, 1, 4]], expected, atol=1e-5)
    assert mixtures.shape == (2, 1000) and not np.delete(mixtures, [0, 1, 4], axis=1).any()
    photos = sorted((trained / "photos/photos").iterdir())[:3]
    # The exported words are float16.
    np.testing.assert_allclose(again.predict(photos).probabilities, few.predict(photos).probabilities, atol=2e-3)
