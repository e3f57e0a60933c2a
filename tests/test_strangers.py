"""What holds for all input of strangers: no network unless asked for. Each parser's own promises stand in its tests."""

import importlib.util
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
import importlib, pkgutil, runpy, sys

def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        reached.append((event, arguments[-1]))

reached = []
sys.addaudithook(note)

import mlfsic_jax
for module in pkgutil.walk_packages(mlfsic_jax.__path__, "mlfsic_jax."):
    is_command = module.name.count(".") == 1 and not module.ispkg
    if is_command or module.name.endswith(".__main__"):
        continue  # run below, as programs
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name in ("torch", "transformers", "huggingface_hub", "gensim", "openvino"), error  # extras

def run(module, *arguments):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(f"mlfsic_jax.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code

def mistake(module, *arguments):
    line = run(module, *arguments)
    assert isinstance(line, str) and line.startswith("error: "), (module, line)
    print(line)

from pathlib import Path
config = f"--config={Path(mlfsic_jax.__file__).parents[1] / 'configs' / 'voc.py'}"
folders = ["--workdir=run", "--config.cache_dir=cache", "--config.data_dir=data"]
assert run("data.prepare", "--dataset=folder", "--source=mine", "--prepared_dir=prepared") in (None, 0)
mistake("data.prepare", "--dataset=voc")
mistake("main", config, *folders)
mistake("pretrain", config, "--config.train_backbone=True", *folders)
mistake("predict", "--workdir=run", "--support=support.csv", "--images=mine", "--out=out.csv")
mistake("predict", "--labels=sea,kelp", "--images=mine", "--out=out.csv")
mistake("app", "--labels=sea,kelp", "--images=mine")
try:
    mlfsic_jax.load()
except ValueError as error:
    print("load:", error)
mistake("export", "--workdir=run", "--out=exported")
mistake("report", "--workdir=run")
mistake("reproduce", "--table=voc", config, *folders)
mistake("label_embeddings", "--encoder=clip", "--labels=voc", "--out=clip.npz", "--local_files_only")
mistake("label_embeddings", "--encoder=clip", "--labels=voc", "--out=clip.npz", "--model=mine")
print("reached:", reached)
"""


def encoder_messages():
    """What loading a text encoder that is not there says, with the extra [text] and without it."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return [f'{name} is not installed: pip install "mlfsic_jax[text]"']
    return ["the model openai/clip-vit-base-patch32 cannot be loaded", "the model mine cannot be loaded"]


@pytest.mark.extras  # with the encoders' libraries and without
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
        "load: the model out of the box needs",
        *encoder_messages(),
    ):
        assert line in done.stdout
    assert done.stdout.splitlines()[-1] == "reached: []"
