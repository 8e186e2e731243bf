"""Every example runs, and what it trains gets better."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
NEEDS = {"hf_trainer": ["datasets"], "lightning_module": ["lightning", "sklearn"]}
NEEDS |= {"plain_pytorch": ["sklearn"], "peft_one_line": ["peft"]}
NEEDS |= {"trl_sft": ["trl", "peft"], "trl_dpo": ["trl", "peft"]}


def test_every_example_is_known_and_short() -> None:
    assert {path.stem for path in EXAMPLES} == NEEDS.keys()
    assert all(len(path.read_text().splitlines()) < 60 for path in EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    for module in NEEDS[path.stem]:
        pytest.importorskip(module)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, str(path), "--steps", "30" if path.stem == "plain_pytorch" else "12"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout)
    if shown:
        assert float(shown[2]) < float(shown[1])
    else:
        assert re.search(r"accuracy on \d+ held-out images 0\.[6-9]", done.stdout), done.stdout
