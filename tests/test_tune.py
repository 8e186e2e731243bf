"""`fastlora tune` without a GPU: what is measured, chosen and stored."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
    seen: list[regimes.Plan] = []

    def measure(run: Callable[[], object]) -> float:
        plan = regimes._forced[-1]
        seen.append(plan)
        wanted = "mma" if len({p for p in seen}) and plan.kind == "mma" else plan.kind
        return {"mma": 1.0, "dense": 2.0, "gemv": 0.5}[wanted]

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
    """In Triton's interpreter where tests run in it; the dense plan needs no kernel of its own."""
    monkeypatch.setattr(tune, "SHAPES", ((32, 64),))
    with regimes.force(regimes.Plan("mma", regimes.Tile(16, 32, 32, 4, 1))):
        (run,) = tune.problems(CPU, direction, 3)
        assert callable(run)


def test_without_a_gpu_it_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = "import sys; sys.argv = ['fastlora', 'tune']; from fastlora.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "tune needs a CUDA device, found none" in done.stderr
    assert tune.in_force(CPU).endswith("not measured")
