"""`fastlora tune` without a GPU: what is measured, chosen and stored."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from fastlora_kernels import regimes, tuned

from fastlora import tune

CPU = torch.device("cpu")


def test_the_fastest_plan_is_chosen_and_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "SHAPES", ((32, 64), (64, 64)))
    monkeypatch.setattr(regimes, "tuned_path", lambda device: tmp_path / "table.json")

    def measure(run: Callable[[], object]) -> float:
        return {"mma": 1.0, "dense": 2.0, "gemv": 0.5}[regimes._forced[-1].kind]

    choices = tune.tune(CPU, measure)
    assert [c.tokens for c in choices] == [*regimes.TOKENS, *regimes.TOKENS]
    assert choices[0].plan.kind == "gemv"
    assert {c.plan.kind for c in choices[1:]} == {"mma"}
    assert all(c.speedup >= 1 for c in choices)
    assert any(c.speedup == 2 for c in choices), "the model prefers dense for many tokens"
    tune.store(CPU, choices)
    found = tuned.load(tmp_path / "table.json")
    assert found is not None and len(found.tables["backward"]) == len(regimes.TOKENS)


def test_dense_above_the_last_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regimes, "tuned_path", lambda device: tmp_path / "table.json")
    tile = regimes.Plan("mma", regimes.Tile(16, 64, 256, 4, 3))
    rows = [("forward", 1, tile), ("forward", 16, regimes.DENSE), ("forward", 32, tile)]
    rows += [("forward", 64, regimes.DENSE), ("backward", 1, regimes.DENSE)]
    tune.store(CPU, [tune.Choice(d, m, plan, plan, 1.0) for d, m, plan in rows])
    found = tuned.load(tmp_path / "table.json")
    assert found is not None
    assert [row[:2] for row in found.tables["forward"]] == [(1, "mma"), (16, "dense"), (32, "mma")]
    assert found.tables["backward"] == ()


@pytest.mark.parametrize("direction", regimes.DIRECTIONS)
def test_the_calls_that_are_measured_run(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter; a tile gives what the dense plan gives."""
    monkeypatch.setattr(tune, "SHAPES", ((32, 64),))
    (run,) = tune.problems(CPU, direction, 3)
    found: list[Any] = []
    for plan in (regimes.Plan("mma", regimes.Tile(16, 32, 32, 4, 1)), regimes.DENSE):
        with regimes.force(plan):
            found.append(run())
    tiled, dense = (next(t for t in outputs if t.numel()) for outputs in found)
    torch.testing.assert_close(tiled, dense, rtol=0.02, atol=0.05)


def test_without_a_gpu_it_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = "import sys; sys.argv = ['fastlora', 'tune']; from fastlora.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "tune needs a CUDA device, found none" in done.stderr
    assert tune.in_force(CPU).endswith("not measured")
