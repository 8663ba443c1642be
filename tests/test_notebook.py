"""The notebook's two files hold the same cells, and its cells run; outputs are never compared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from jdpo.json_files import read_json

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "docs" / "notebooks" / "dpo_step_by_step.md"
WRITTEN = SOURCE.with_suffix(".ipynb")
MOST_BYTES = 2 * 2**20

_CODE = re.compile(r"^```\{code-cell\} ipython3\n(?::tags: [^\n]*\n\n)?(.*?)\n```$", re.MULTILINE | re.DOTALL)


def _written() -> dict[str, Any]:
    return read_json(WRITTEN)


def test_code_of_both_files_is_the_same() -> None:
    """`python scripts/write_notebook.py` writes the .ipynb after the .md was changed."""
    code = ["".join(cell["source"]) for cell in _written()["cells"] if cell["cell_type"] == "code"]
    assert code == _CODE.findall(SOURCE.read_text(encoding="utf-8"))
    assert len(code) > 20


def test_every_cell_was_executed_without_an_error() -> None:
    cells = [cell for cell in _written()["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8


def test_file_is_small_and_names_no_folder_of_its_writer() -> None:
    text = WRITTEN.read_text(encoding="utf-8")
    assert len(text.encode()) <= MOST_BYTES
    assert str(Path.home()) not in text
    assert str(ROOT) not in text


@pytest.mark.extras
def test_cells_of_both_files_are_the_same() -> None:
    import nbformat

    from scripts.write_notebook import read_source

    of_source = [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in read_source().cells]
    written = nbformat.read(WRITTEN, as_version=4)
    assert [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in written.cells] == of_source


@pytest.mark.extras
def test_cells_run_and_so_does_the_one_for_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell of a copy runs as for a user: on one device, with compiled programs of its own."""
    from scripts.write_notebook import execute, read_source

    # The suite's settings, for eight devices and quick compilation, are not those of a user.
    for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    notebook = read_source()
    (own,) = (cell for cell in notebook.cells if "own-model" in cell.metadata.get("tags", ()))
    # A folder in the place of a hub name: the trained model of an earlier cell, which trains for an epoch.
    own.source = own.source.replace('MY_MODEL = ""', "MY_MODEL = str(chat_run.model_dir)")
    execute(notebook, tmp_path)
    shown = "".join(output.get("text", "") for output in own.outputs)
    assert "before: It is" in shown
    assert "after: It is" in shown
    assert (tmp_path / "my-first-dpo" / "model").is_dir()
