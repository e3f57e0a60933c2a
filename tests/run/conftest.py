"""Small runs that many tests look at."""

import pytest

from mlfsic_jax.run.experiment import train_and_evaluate
from mlfsic_jax.run.export import export
from mlfsic_jax.run.saved import load
from tests.own_photos import folder_run
from tests.tiny import longer, scenes


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing interrupted, in ``run``, and its results."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, train_and_evaluate(longer(folder), folder / "run")


@pytest.fixture(scope="session")
def exported_scenes(tmp_path_factory):
    """A run on generated scenes whose backbone is trained: config, workdir and its export."""
    root = tmp_path_factory.mktemp("scenes")
    config = scenes(root, **{"data.images_per_split": (60, 40, 40)})
    train_and_evaluate(config, root / "run")
    export(root / "run", root / "out")
    return config, root / "run", root / "out"


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A run with a frozen backbone and GloVe, whose files move away after the export: model, photos and the export."""
    root = tmp_path_factory.mktemp("exported")
    _, run = folder_run(root)
    before = load(run)
    export(run, root / "out")
    export(run, root / "few", n_words=3)
    for name in ("run", "data", "cache"):
        (root / name).rename(root / f"moved_{name}")
    words = root / "moved_run/label_vectors.safetensors", root / "moved_data/glove.6B.300d.txt"
    return before._replace(word_files=words), sorted((root / "photos/photos").iterdir()), root / "out"


@pytest.fixture
def support(frozen):
    """Five photos and labels of which the model knows two; the last photo has none of them."""
    photos = sorted((frozen[1].parent / "photos/photos").iterdir())[:5]
    return photos, [["kelp"], ["kelp", "sea"], ["pine tree"], "sea", []]
