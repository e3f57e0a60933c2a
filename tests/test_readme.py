"""What the README shows works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_three_functions_are_shown():
    assert [name for name in ("sample_episode", "lcm_select", "multilabel_metrics") if name in "".join(EXAMPLES)] == [
        "sample_episode",
        "lcm_select",
        "multilabel_metrics",
    ]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_and_print_what_they_say(example, capsys):
    values = {}
    exec(example, values)  # our own README
    if "episode" in values:
        assert capsys.readouterr().out == "(30,) (24,)\n"
    if "keep" in values:
        assert values["keep"].shape == values["score"].shape == values["importance"].shape == (8, 7, 7)
        assert values["keep"].dtype == bool and 0 < values["keep"].mean() < 1
    if "metrics" in values:
        assert all(0 <= v <= 1 for v in values["metrics"].values())


def test_importing_the_package_loads_jax_and_numpy_only():
    heavy = ("flax", "optax", "orbax", "tensorflow", "tensorflow_datasets", "PIL", "ml_collections", "torch")
    code = f"import sys, mlfsic_jax; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_files_and_commands_that_are_named_exist():
    for path in re.findall(r"(?:bash |--config=|\]\()((?:launch|configs|[A-Z]+)[\w./]*)", README):
        assert (ROOT / path).exists(), path


def test_every_promise_names_a_test_that_exists():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named, file = re.findall(r"`([\w/]+\.py)?::(test_\w+)`", page), ""
    assert len(named) > 70
    for in_file, test in named:
        file = in_file or file  # "::test_x" goes on with the file before it
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), test
