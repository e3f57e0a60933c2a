"""A run on made-up photos, in which every method is evaluated, and predictions against that evaluation."""

import json

import jax
import numpy as np
from PIL import Image
from scipy.special import expit, logit

from configs import folder
from mlfsic_jax import backbones
from mlfsic_jax.backbones import weights
from mlfsic_jax.methods import METHODS, trained_of
from mlfsic_jax.run import classifier, evaluate, experiment, inputs
from tests import made_up
from tests.tiny import TINY

# Those that reach names through a published classifier are in tests/run/test_ready.py.
FOR_PHOTOS = tuple(name for name, method in METHODS.items() if not method.control and not method.words_from)
WORDS = (*made_up.FOLDER_LABELS, "kelp", "sun", "umbrella")
# The least of each method that has to train; steps in one program are 50 or 100.
BRIEF = {
    "ridge.n_components": 4,
    "classifier.epochs": 4,
    **{"classifier_pretrained.width": 8, "classifier_pretrained.training_steps": 50, "classifier_pretrained.epochs": 4},
    **{"maml.width": 8, "maml.training_steps": 50, "maml.inner_steps": 1, "maml.epochs": 4},
    **{"laso.width": 8, "laso.n_components": 4, "laso.training_steps": 100, "laso.batch_size": 4, "laso.epochs": 4},
    **{"pla.width": 8, "pla.n_components": 4, "pla.embedding": 4, "pla.training_steps": 50, "pla.batch_size": 4},
    "pla.epochs": 4,
}


def folder_run(root, methods=FOR_PHOTOS):
    """A run on made-up photos with a frozen backbone and GloVe: config and workdir."""
    made_up.make_folder(root / "photos", "labels", per_label=10)
    rng = np.random.default_rng(0)
    for path in sorted((root / "photos/photos").iterdir()):  # patches of colour, which a random backbone tells apart
        Image.fromarray(rng.integers(0, 255, (2, 3, 3), np.uint8)).resize((44, 40)).save(path)
    (root / "data").mkdir()
    made_up.save_word_vectors(root / "data/glove.6B.300d.txt", WORDS)
    network = backbones.create_backbone("conv4")
    variables = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    weights.save_weights(root / "data/conv4.safetensors", variables, network)
    config = folder.get_config()
    config.update_from_flattened_dict(TINY | BRIEF | {"eval.methods": methods})
    config.backbone, config.backbone_weights = "conv4", str(root / "data/conv4.safetensors")
    config.data.source, config.data_dir = str(root / "photos"), str(root / "data")
    config.cache_dir = str(root / "cache")
    experiment.train_and_evaluate(config, root / "run")
    return config, root / "run"


def assert_like_evaluation(model, config, workdir):
    """All methods on an episode of photos against ``evaluate.score_episodes``, with what training them again gives."""
    run, dataset = inputs.load(config), inputs.load_dataset(config)
    (mine,) = model.trained
    variables = experiment.restore_best(config, run, 1, workdir)
    views = inputs.feature_views(run, variables)
    methods, stores = experiment.open_methods(config, 1, views["base"], variables)
    trained = {name: trained_of(method, stores, mine.tuned.get(name)) for name, method in methods.items()}
    key, sizes = jax.random.key(5), {"n_shot": 1, "n_query": TINY["eval.n_query"]}  # compiled for the run
    scores = evaluate.score_episodes(methods, trained, views["novel"], key=key, n_episodes=1, **sizes)
    (s,), (q,) = evaluate.draw(jax.random.split(key)[0], run.splits["novel"], 1, **sizes)
    split = dataset.splits["novel"]
    photos = {rows: [dataset.load_image(int(split.images[r])) for r in rows] for rows in (tuple(s), tuple(q))}
    names = run.splits["novel"].label_names
    labels = [[name for name, has in zip(names, run.splits["novel"].labels[r], strict=True) if has] for r in s]
    entry = json.loads((workdir / "results.json").read_text())[0]
    assert list(entry["methods"]) == list(methods) and list(scores.methods) == list(methods)
    for method in (name for name in methods if not METHODS[name].control):
        few = classifier.fit(model, photos[tuple(s)], labels, method=method, label_names=names)
        found = few.predict(photos[tuple(q)])
        expected = scores.methods[method][0]
        if METHODS[method].calibrated:
            slope, intercept = entry["validation"]["calibration"][method]
            expected = expit(slope * expected + intercept)
        elif METHODS[method].logits:
            expected = expit(expected.astype(np.float64)).astype(np.float32)
        # Log odds tell photos apart whose probabilities are near 1.
        got, expected = (logit(np.clip(p, 1e-6, 1 - 1e-6)) for p in (found.probabilities, expected))
        # Float32 in other batches; on a frozen backbone's features such a difference may round to another half.
        np.testing.assert_allclose(got, expected, atol=1e-3, err_msg=method)
        assert np.ptp(expected, axis=0).max() > 3e-3, f"{method} says the same of all photos"
        assert found.label_names == names and found.probabilities.dtype == np.float32
