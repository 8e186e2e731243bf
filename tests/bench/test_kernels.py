"""The microbenchmarks run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_they_run() -> None:
    chosen = "format or (linear and nf4 and 16 and bfloat16)"
    command = [sys.executable, "-m", "pytest", "-q", "bench/kernels.py", "--benchmark-disable"]
    run = subprocess.run([*command, "-k", chosen], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "passed" in run.stdout and "failed" not in run.stdout
