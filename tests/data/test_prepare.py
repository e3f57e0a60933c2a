"""The command that prepares a dataset: from archives, here at file:// addresses, to the data card."""

import dataclasses
import hashlib
import shutil
import tarfile
import zipfile

import pytest

from mlfsic_jax import backbones
from mlfsic_jax.data import assets, prepare
from tests import made_up


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Small archives in place of the official ones; one of VOC's photos is cut short."""
    server = tmp_path / "server"
    server.mkdir()
    made_up.make_voc(tmp_path / "voc" / "VOCdevkit", per_label=2)
    cut = tmp_path / "voc/VOCdevkit/VOC2007/JPEGImages/000003.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    with tarfile.open(server / "voc.tar", "w") as archive:
        archive.add(tmp_path / "voc" / "VOCdevkit", "VOCdevkit")
    with zipfile.ZipFile(server / "glove.zip", "w") as archive:
        archive.writestr("glove.6B.300d.txt", "word 1 2 3\n")
    (server / "network.pth").write_bytes(b"weights")

    def asset(name, members=()):
        path = server / name
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return assets.Asset(path.as_uri(), name, digest, path.stat().st_size, members=members)

    monkeypatch.setitem(assets.ASSETS, "voc", (asset("voc.tar", ("VOCdevkit/*",)),))
    monkeypatch.setitem(assets.ASSETS, "glove", (asset("glove.zip", ("glove.6B.300d.txt",)),))
    weights = asset("network.pth")
    file = backbones.WeightsFile(weights.url, weights.sha256[:8])  # torchvision's names hold eight digits
    spec = dataclasses.replace(backbones.BACKBONES["resnet50"], files=(file,))
    monkeypatch.setitem(backbones.BACKBONES, "resnet50", spec)
    monkeypatch.chdir(tmp_path)
    return server


def test_download_unpack_prepare(official, tmp_path, capsys):
    prepare.main(["--dataset=voc", "--download", "--embedding=glove", "--backbone=resnet50"])
    out = capsys.readouterr().out
    assert "voc: 40 images, 20 labels" in out and "unreadable: photo 2007/000003 is damaged" in out
    assert "1 of 40 photos cannot be read and will be left out" in out and "prepared in cache/datasets" in out
    assert (tmp_path / "data/glove.6B.300d.txt").read_text() == "word 1 2 3\n"
    assert (tmp_path / "data/network.pth").read_bytes() == b"weights"

    # Once prepared, neither the archive nor the photos are needed again.
    shutil.rmtree(official)
    prepare.main(["--dataset=voc", "--download"])
    shutil.rmtree(tmp_path / "data")
    prepare.main(["--dataset=voc"])
    captured = capsys.readouterr()
    assert captured.out.count("voc: 40 images") == 2 and "the prepared copy" in captured.err


def test_weights_and_vectors_are_fetched_beside_photos_of_ones_own(official, tmp_path, capsys):
    made_up.make_folder(tmp_path / "mine", "labels", per_label=4)
    prepare.main(["--dataset=folder", "--source=mine", "--download", "--embedding=glove", "--backbone=resnet50"])
    assert "folder: 32 images, 8 labels" in capsys.readouterr().out
    assert (tmp_path / "data/glove.6B.300d.txt").is_file() and (tmp_path / "data/network.pth").is_file()
    assert not (tmp_path / "data/VOCdevkit").exists()


def test_nothing_is_fetched_without_being_asked_for(official, tmp_path, capsys):
    with pytest.raises(SystemExit, match="error: source data/VOCdevkit does not exist, and .* no prepared copy of voc"):
        prepare.main(["--dataset=voc"])
    assert not (tmp_path / "data").exists()


def test_a_truncated_archive_is_one_clear_line(official):
    archive = official / "voc.tar"
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(SystemExit, match=r"^error: .*voc.tar.*bytes"):
        prepare.main(["--dataset=voc", "--download"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataset=nus_wide", "--download"],
            "--download knows the archives of voc and coco, --embedding and --backbone; NUS-WIDE's",
        ),
        (["--dataset=voc", "--download", "--source=x"], "--download puts voc into --data_dir=data: leave --source out"),
        (["--dataset=pets"], "invalid choice: 'pets'"),
        (["--source=x"], "required: --dataset"),
        (["--dataset=voc", "--source=nowhere"], "source nowhere does not exist"),
        (["--dataset=voc", "--backbone=conv4"], "invalid choice: 'conv4'"),
    ],
)
def test_mistakes_are_one_line(official, arguments, message):
    with pytest.raises(SystemExit) as caught:
        prepare.main(arguments)
    assert str(caught.value).startswith("error: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)
