"""The notebook, its code cells run one after the other in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from tests.scripts import EXAMPLES

NOTEBOOK = EXAMPLES / "quickstart.ipynb"
# What a notebook's kernel has: `display`, which here prints.
KERNEL = """
import sys
from types import ModuleType
sys.modules["IPython"], display = ModuleType("IPython"), ModuleType("IPython.display")
sys.modules["IPython.display"], display.HTML, display.display = display, str, print
"""


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.journey
def test_the_notebook_runs(tmp_path):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    code = "\n".join([KERNEL, *("".join(cell["source"]) for cell in code_cells())])
    result = subprocess.run(
        [sys.executable, "-"], input=code, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for words in (
        "teacher: ",
        "student: 3 forward passes",
        "The answer is 45.",
        "threshold 0.95: 18 passes",
        "<iframe",
    ):
        assert words in result.stdout, result.stdout
    assert {path.name for path in tmp_path.iterdir()} <= {"examples", "fine-tuned"}, "nothing was cloned"


def test_the_notebook_holds_no_outputs():
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code_cells())
