"""Measured tables: stored, read, refused; and used instead of the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from fastlora_kernels import regimes, tuned

ROWS: dict[str, Any] = {
    "forward": ((1, "gemv", (1, 16, 256, 4, 1)), (64, "mma", (64, 128, 128, 8, 3))),
    "backward": ((32, "mma", (32, 256, 64, 4, 3)), (128, "dense", None)),
}
MEASURED = tuned.Measured("2026-01-02T03:04:05+00:00", ROWS)
CPU = torch.device("cpu")


def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tuned.path_of("NVIDIA H200 (SXM)", "sm_90", "3.6.0")
    assert path == tmp_path / "fastlora/tuned/nvidia-h200-sxm-sm_90-triton3.6.0.json"
    assert tuned.load(path) is None
    tuned.save(path, MEASURED)
    assert tuned.load(path) == MEASURED
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    monkeypatch.setenv("FASTLORA_TUNED", "0")
    assert tuned.load(path) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2, not 1"),
        ({"tables": {"forward": []}}, "'backward'"),
        ({"tables": {**ROWS, "forward": [[64, "dense", None], [1, "dense", None]]}}, "ascend"),
        ({"tables": {**ROWS, "forward": [[64, "mma", [64, 0, 1, 1, 1]]]}}, "five positive"),
        ({"tables": {**ROWS, "forward": [[64, "mma", None]]}}, "a plan of kind 'mma'"),
    ],
)
def test_a_damaged_file_is_said_and_left(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    tuned.save(path, MEASURED)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.warns(UserWarning, match=f"can't be used .*{words}"):
        assert tuned.load(path) is None
    path.write_text("{")
    with pytest.warns(UserWarning, match="can't be used"):
        assert tuned.load(path) is None


def test_the_measured_table_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    regimes._measured_table.cache_clear()
    monkeypatch.setattr(regimes, "measured", lambda device: MEASURED)
    try:
        found = regimes.plan(CPU, torch.bfloat16, 40, "forward", 64)
        assert found == regimes.Plan("mma", regimes.Tile(64, 128, 128, 8, 3))
        assert regimes.plan(CPU, torch.bfloat16, 65, "forward", 64) == regimes.DENSE
        assert regimes.plan(CPU, torch.bfloat16, 100, "backward", 64) == regimes.DENSE
        with regimes.assume("sm_80"):
            assumed = regimes.plan(CPU, torch.bfloat16, 40, "forward", 64)
        assert assumed == regimes.row(regimes.default_table("sm_80", "forward"), 40)
    finally:
        regimes._measured_table.cache_clear()


def test_a_forced_plan_is_used_for_all() -> None:
    with regimes.force(regimes.DENSE):
        assert regimes.plan(CPU, torch.bfloat16, 1, "forward", 64) == regimes.DENSE
    assert regimes.plan(CPU, torch.bfloat16, 1, "forward", 64) != regimes.DENSE
