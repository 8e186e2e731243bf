"""What `make` says on a machine where something is missing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "venv"


@pytest.mark.skipif(not SCRIPT.is_file(), reason="installed without the repository")
@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"PYTHON": "no-python"}, "python 3.10 or newer must be on the PATH, but no-python is not"),
        ({"CXX": "no-compiler"}, "compiler must be on the PATH to build the CPU kernels"),
    ],
)
def test_one_sentence(variables: dict[str, str], sentence: str, tmp_path: Path) -> None:
    environment = {**os.environ, "VENV": str(tmp_path / "venv"), **variables}
    run = subprocess.run(
        [str(SCRIPT), "train"], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert sentence in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()
