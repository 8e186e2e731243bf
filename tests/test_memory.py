"""A forward and a backward never hold the dense weight: their peak memory, measured alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def peak(shape: str, tokens: int) -> int:
    command = [sys.executable, "-m", "bench.linear", "--one-memory", shape, str(tokens)]
    run = subprocess.run(
        [*command, "fastlora nf4"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(run.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("tokens", [1, 1024])
@pytest.mark.parametrize(("shape", "n", "k"), [("1B k/v", 512, 2048), ("1B q/o", 2048, 2048)])
def test_peak_is_less_than_the_dense_weight(shape: str, n: int, k: int, tokens: int) -> None:
    assert peak(shape, tokens) < 2 * n * k
