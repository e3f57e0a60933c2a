"""What holds for all input of strangers: no network unless asked for. Each parser's own promises stand in its tests."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import made_up

ROOT = Path(__file__).parent.parent


def test_no_test_reaches_another_machine(no_network):
    plain = socket.socket()
    for reach in (
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),  # an address that is kept for examples
        lambda: plain.connect_ex(("192.0.2.1", 80)),
        lambda: socket.getaddrinfo("example.org", 80),
        lambda: socket.gethostbyname("example.org"),
    ):
        with pytest.raises(OSError, match="tests have no network"):
            reach()
    plain.close()
    assert no_network == ["192.0.2.1", "192.0.2.1", "example.org", "example.org"]
    no_network.clear()  # or this test would fail for it
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
    assert socket.getaddrinfo("localhost", 80)


PROGRAM = """
import contextlib, importlib, pkgutil, sys

def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        reached.append((event, arguments[-1]))

reached = []
sys.addaudithook(note)

import mlfsic_jax
for module in pkgutil.walk_packages(mlfsic_jax.__path__, "mlfsic_jax."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name == "torch", error  # an extra

from mlfsic_jax.run import inputs

from mlfsic_jax.data import words as label_embeddings

from mlfsic_jax.run import classifier as predict
from mlfsic_jax.data import prepare
from configs import folder, voc

def mistake(command, *arguments):
    try:
        command(*arguments)
    except (SystemExit, mlfsic_jax.system.errors.InputError) as error:
        print(error)
    else:
        raise AssertionError(command)

prepare.main(["--dataset=folder", "--source=mine", "--prepared_dir=prepared"])
mistake(prepare.main, ["--dataset=voc"])
config = voc.get_config()
config.workdir, config.cache_dir, config.data_dir = "run", "cache", "data"
mistake(inputs.load, config)
mistake(predict.main, ["--workdir=run", "--support=support.csv", "--images=mine", "--out=out.csv"])
mistake(label_embeddings.main, ["--encoder=clip", "--labels=voc", "--out=clip.npz", "--local_files_only"])
mistake(label_embeddings.main, ["--encoder=clip", "--labels=voc", "--out=clip.npz", "--model=mine"])
print("reached:", reached)
"""


def test_no_command_opens_a_connection_unless_asked_for(tmp_path):
    made_up.make_folder(tmp_path / "mine", "labels", per_label=4)
    (tmp_path / "support.csv").write_text("file,labels\nmine/photos/0001.png,sea\n")
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    for line in (
        "folder: 32 images, 8 labels",
        "source data/VOCdevkit does not exist",
        "config.backbone_weights = 'data/",
        "run holds no model",
        "the model openai/clip-vit-base-patch32 cannot be loaded",
        "the model mine cannot be loaded",
    ):
        assert line in done.stdout
    assert done.stdout.splitlines()[-1] == "reached: []"
