"""The notebooks run from top to bottom, in their small setting, and show what they say."""

import os
from pathlib import Path

import pytest

from tests.tiny import share_compiled

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "launch").glob("*.ipynb"))


def test_the_three_notebooks_are_there_and_hold_no_outputs():
    assert [path.stem for path in NOTEBOOKS] == ["colab_tpu", "lcm_select", "own_photos"]
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        assert not any(cell.get("outputs") for cell in cells) and cells[0].cell_type == "markdown"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, those of one notebook for the next."""
    folder = tmp_path_factory.mktemp("notebooks") / "cache"
    share_compiled(folder)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own parts
def test_a_notebook_runs(path, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFSIC_SMALL", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    for path_there in (
        ROOT / "configs",
        ROOT / "mlfsic_jax",
        cache,
    ):  # it writes where it runs: not into the repository
        os.symlink(path_there, tmp_path / path_there.name)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    pictures = [data for data in shown if "image/png" in data]
    pages = [data for data in shown if "<iframe" in data.get("text/html", "")]
    assert (len(pictures), len(pages)) == {"colab_tpu": (0, 2), "lcm_select": (1, 0), "own_photos": (2, 0)}[path.stem]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    if path.stem == "lcm_select":
        assert "theta 0.50: keeps 100.0%, at least 64 of 64 regions" in printed
    if path.stem == "own_photos":
        assert "largest difference: 0.0\n" in printed
