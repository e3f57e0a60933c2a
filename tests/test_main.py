"""The command line of the program."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--config=configs/demo.py", "--config.trian.epochs=3"], 'Did you mean "train" instead of "trian"'),
        (["--config=configs/demo.py", "--config.train.epoch=3"], 'Did you mean "epochs" instead of "epoch"'),
        (["--config=configs/demo.py", "--config.train.epochs=many"], "config.train.epochs=many"),
        (["--config=configs/demo.py", "--config.model.dropout=2"], "config.model.dropout = 2.0: must be in [0, 1)"),
        (["--config=configs/absent.py"], "configs/absent.py"),
        (["--config=configs/voc.py:gpu"], "no variant 'gpu': choose one of cpu, anchored, deploy, paper, finetune"),
        (["--config=configs/demo.py", "extra"], "unexpected argument 'extra'"),
        ([], "--config is missing"),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_line(arguments, complaint):
    done = subprocess.run([sys.executable, "-m", "mlfsic_jax.main", *arguments], capture_output=True, text=True)
    (line,) = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and complaint in line
