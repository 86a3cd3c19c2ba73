"""The notebooks run from their first cell to the last, on made-up data, and are kept clean."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
# Run behind the first cell, which finds the recipes: what makes a run cheap.
CHEAPER = """
from recipes.models import transformers
from tests import traced_once

traced_once.use()
transformers.BLOCKS = 1
"""


def cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook."""
    found: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_title_and_no_errors(path: Path) -> None:
    kept = cells(path)
    assert kept[0]["cell_type"] == "markdown"
    assert "".join(kept[0]["source"]).startswith("# ")
    outputs = [output for cell in kept for output in cell.get("outputs", ())]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    # Nothing of the machine that ran it.
    text = path.read_text()
    assert not [word for word in ("/home/", "/work/", "/opt/", "/tmp/") if word in text]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# Jupyter's packages warn of event loops and folders of their own.
@pytest.mark.filterwarnings("default")
def test_a_notebook_runs_without_the_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install 'kqat[docs]'")
    nbformat = pytest.importorskip("nbformat")
    kernelspec = pytest.importorskip("jupyter_client.kernelspec")
    monkeypatch.setenv("KQAT_NOTEBOOK_QUICK", "1")
    monkeypatch.setenv("KQAT_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    # A kernel of this very Python, whatever is installed beside it.
    folder = tmp_path / "kernels" / "this"
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "this"}))
    specs = kernelspec.KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")])
    notebook = nbformat.read(path, as_version=4)
    first = next(n for n, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(CHEAPER))
    client = nbclient.NotebookClient(
        notebook, timeout=400, resources={"metadata": {"path": str(path.parent)}}
    )
    client.create_kernel_manager()
    client.km.kernel_spec_manager = specs
    client.km.kernel_name = "this"
    client.execute()
    printed = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()))
    assert "made up" in printed
    assert "at most" in printed
