"""A run on drawn scenes whose names are read by the backbone's own CLIP, then photos and an export from it."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from mlfsic_jax import backbones
from mlfsic_jax.backbones import clip_text, weights
from mlfsic_jax.core import clip
from mlfsic_jax.data.features import View
from mlfsic_jax.run import classifier, experiment, inputs
from mlfsic_jax.run.export import export
from mlfsic_jax.run.saved import load
from mlfsic_jax.system.errors import InputError
from tests.backbones.test_clip_text import JOINT, attention_pooling, text_tensors, tokenizer_json
from tests.test_whole_program import _VIT, random_variables
from tests.tiny import scenes

METHODS = ("ridge", "class_words", "class_word_ridge", "class_word_ridge_permuted")
MAKE = {  # either has five positions
    "clip_resnet50": lambda: backbones.ClipResNet((1, 1, 1), width=2),
    "clip_vit_b_32_tokens": lambda: backbones.ClipVisionTransformer(patch=16, image_size=32, all_tokens=True, **_VIT),
}


@pytest.fixture(scope="module", params=MAKE)
def trained(request, tmp_path_factory):
    """(config, folder) of a run with a small CLIP."""
    root, name = tmp_path_factory.mktemp("clip"), request.param
    with pytest.MonkeyPatch.context() as patch:
        spec = dataclasses.replace(backbones.BACKBONES[name], create=lambda axis_name=None: MAKE[name](), image_size=32)
        patch.setitem(backbones.BACKBONES, name, spec)
        weights.save_weights(root / "image.safetensors", random_variables(MAKE[name](), 32), MAKE[name]())
        pooling = {f"visual.attnpool.{key}": array for key, array in attention_pooling(32, 5).items()}
        if name != "clip_resnet50":
            pooling = {"visual.proj": np.random.default_rng(1).normal(size=(32, JOINT)).astype(np.float32)}
        state = {key: array for key, array in text_tensors().items() if key != "visual.proj"}
        save_file(state | load_file(root / "image.safetensors") | pooling, root / "clip.safetensors")
        (root / "data/clip").mkdir(parents=True)
        (root / "data/clip/tokenizer.json").write_text(json.dumps(tokenizer_json()))
        config = scenes(root, **{"eval.methods": METHODS, "train_backbone": False, "backbone": name})
        config.unlock().update(backbone_weights=str(root / "clip.safetensors"), data_dir=str(root / "data"))
        experiment.train_and_evaluate(config, root / "run")
        yield config, root


def test_the_methods_are_evaluated_by_clips_texts(trained):
    config, root = trained
    entry = json.loads((root / "run/results.json").read_text())[0]
    assert list(entry["methods"]) == list(METHODS)
    assert entry["methods"]["class_words"] != entry["methods"]["class_word_ridge"]
    view = inputs.load(config).splits["novel"]
    with pytest.raises(InputError, match="^CLIP needs no classes, so there are no classes without kinds: "):
        view.words("classes without kinds")


def pooled(config, root, view: View):
    """Images of a view in CLIP's space."""
    local = np.asarray(view.inputs(np.arange(len(view.labels))), np.float32).reshape(len(view.labels), -1, 32)
    return np.asarray(clip.pool(weights.load_pooling(root / "clip.safetensors", config.backbone, 32), local))


def test_photos_are_labelled_by_their_cosines_with_texts(trained):
    config, root = trained
    run, model = inputs.load(config), load(root / "run")
    photos = inputs.load_dataset(config).load_image
    mean = pooled(config, root, run.base).mean(axis=0)
    np.testing.assert_allclose(model.trained[0].stores["classes"]["mean_logits"], mean, rtol=0, atol=1e-5)

    names = ("red dog", "hot cat", "zebra")
    few = classifier.fit(model, [], [], label_names=names, method="class_words")
    files = clip_text.TextFiles(root / "clip.safetensors", root / "data/clip/tokenizer.json")
    texts = clip_text.encode_texts([f"a photo of a {name}" for name in names], files)
    image = np.asarray(photos(0))
    features = inputs.features_of(model.backbone, model.backbone_variables, image[None]).astype(np.float16)
    view = View(lambda rows: features, np.zeros((1, 3), bool), None, names)
    cosines = (pooled(config, root, view) - mean) @ texts.T
    model.trained[0].calibration["class_words"] = (90.0, -1.0)  # in place of that of noise, which is flat
    expected = expit(90 * 7 * (cosines - cosines.mean()) - 1)
    # A sum in another order may round some features to the next float16, 5e-4 away: some 1e-5 of a cosine, 2e-3 here.
    np.testing.assert_allclose(few.predict(image).probabilities, expected, rtol=0, atol=5e-3)
    assert np.ptp(expected) > 0.1


def test_an_export_carries_text_encoder_and_tokenizer(trained):
    _, root = trained
    model = load(root / "run")
    photos = [np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8) for i in range(4)]
    export(root / "run", root / "model")
    state = load_file(root / "model/clip/model.safetensors")
    assert "text_projection" in state and not any(key.startswith("visual.") for key in state)
    few, again = (
        classifier.fit(m, photos[:3], ["red dog", "cat", "box"], method="class_word_ridge")
        for m in (model, load(root / "model"))
    )
    np.testing.assert_allclose(again.predict(photos).probabilities, few.predict(photos).probabilities, atol=1e-6)
    assert "best" not in few.note and few.explain(photos[3]) is not None
    with pytest.raises(InputError, match="has no classes that names are reached through"):
        few.reasons(photos[3])
    (root / "data/clip/tokenizer.json").rename(root / "tokenizer.json")
    with pytest.raises(InputError, match=r"^no tokenizer .*data/clip/tokenizer.json for CLIP's texts: get it with .*"):
        classifier.fit(model, [], [], label_names=("cat", "dog"), method="class_words")
    (root / "tokenizer.json").rename(root / "data/clip/tokenizer.json")
