"""A folder of noise, and the model out of the box with small stand-ins."""

import numpy as np
import pytest
from PIL import Image

import mlfsic_jax as mf
from mlfsic_jax.app.session import open_session
from tests import ready_model

LABELS = ("cat", "dog", "hot dog")


@pytest.fixture(scope="session")
def model_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    ready_model.write_files(folder)
    return folder


@pytest.fixture(scope="session")
def predictor(model_files):
    with pytest.MonkeyPatch.context() as patch:
        ready_model.stand_in(patch, model_files)
        return mf.load(data_dir=model_files)


@pytest.fixture
def folder(tmp_path):
    """Eight photos, one on its side, a damaged one, and names that a page must not take for its own text."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    names = [*(f"{i}.png" for i in range(6)), "sub/<img src=x onerror=alert(1)>.png", 'sub/a "b" & c.png']
    for name in names:
        Image.fromarray(rng.integers(0, 255, (2, 3, 3), np.uint8)).resize((44, 40)).save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (44, 40), "red").save(folder / "side.jpg", exif=exif)
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xffno photo")
    return folder


@pytest.fixture
def session(folder, predictor, tmp_path):
    found = open_session(folder, None, predictor, tmp_path / "cache")
    for name in LABELS:
        found.store.name_label(name)
    found.collection.embed_all(lambda: None)
    found.refit()
    yield found
    found.close()
