"""The command line of the program."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--config=configs/demo.py", "--config.trian.epochs=3"], 'Did you mean "train" instead of "trian"'),
        (["--config=configs/demo.py", "--config.train.epoch=3"], 'Did you mean "epochs" instead of "epoch"'),
        (["--config=configs/demo.py", "--config.train.epochs=many"], "config.train.epochs=many"),
        (["--config=configs/demo.py", "--config.model.dropout=2"], "config.model.dropout = 2.0: must be in [0, 1)"),
        (["--config=configs/absent.py"], "configs/absent.py"),
        (["--config=configs/voc.py:gpu"], "no variant 'gpu': choose one of cpu, anchored, deploy, "),
        (["--config=configs/demo.py", "extra"], "unexpected argument 'extra'"),
        (["--config=configs/demo.py", "--config.shots=1", "--config.shots=5"], "config.shots is given twice"),
        (
            ["--config=configs/demo.py", *["--config.seed", "5", "--config.eval.n_query", "5", "--config.gpu", "5"]],
            "gpu",
        ),
        ([], "--config is missing"),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_line(arguments, complaint):
    done = subprocess.run([sys.executable, "-m", "mlfsic_jax.main", *arguments], capture_output=True, text=True)
    (line,) = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and complaint in line


SHOW = """
from absl import app
from mlfsic_jax.system.flags import parse, run_config
app.run(lambda argv: run_config(lambda config: print(config.to_json())), flags_parser=parse)
"""


def test_a_tilde_is_the_home_folder_in_every_field(tmp_path):
    shutil.copy(ROOT / "configs/voc.py", tmp_path / "mine.py")
    fields = (
        "cache_dir",
        "data_dir",
        "backbone_weights",
        "data.source",
        "data.prepared_dir",
        "data.split",
        "labels.vectors",
    )
    flags = ["--config=~/mine.py:cpu", "--workdir=~/runs/a", *(f"--config.{field}=~/{field}" for field in fields)]
    home = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SHOW, *flags], env=home, capture_output=True, text=True)
    config = json.loads(done.stdout)
    assert config["backbone"] == "mobilenet_v2" and config["workdir"] == f"{tmp_path}/runs/a"
    for field in fields:
        section, _, name = field.rpartition(".")
        assert (config[section] if section else config)[name] == f"{tmp_path}/{field}"
    assert not Path("~").exists()


def test_an_installed_package_has_its_configs(tmp_path):
    if importlib.util.find_spec("setuptools") is None:  # importing it may clash with a distutils that is loaded
        pytest.skip("setuptools is not installed")
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("mlfsic_jax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib=installed"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    for config, complaint in [
        ("configs/demo.py:small", "config.train.epochs = 0: must be positive"),
        ("./configs/demo.py", "config.train.epochs = 0: must be positive"),
        (
            "configs/absent.py",
            "configs/absent.py: no such config: give a file, or one of configs/coco.py, configs/demo.py",
        ),
        ("demo.py", "demo.py: no such config"),
    ]:
        done = subprocess.run(
            [sys.executable, "-m", "mlfsic_jax.main", f"--config={config}", "--config.train.epochs=0"],
            cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1 and complaint in done.stderr
    assert sorted(path.name for path in (tmp_path / "installed/mlfsic_jax/configs").iterdir()) == sorted(
        path.name for path in (ROOT / "configs").glob("*.py")
    )
