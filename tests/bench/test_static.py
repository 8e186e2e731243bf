"""The static evidence: what counts as worse, and that the tables agree with what was compiled."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("triton")
from fastlora_kernels import regimes

from bench import static

ROW = {
    "kernel": "k", "variant": "v", "arch": "sm_90", "spills": 0, "matrix": 8, "loop": 100,
    "per_weight": 5.0, "problem": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 3}, "k v sm_90: spills 3 registers, did 0"),
        ({"matrix": 0}, "no matrix instruction in its loop any more"),
        ({"loop": 111}, "takes 111 instructions in its loop, took 100"),
        ({"per_weight": 10.0}, "takes 10.0 per weight, took 5.0"),
        ({"problem": "does not compile"}, "k v sm_90: does not compile"),
    ],
)
def test_what_is_worse_is_said(change: dict[str, Any], words: str) -> None:
    found = static.compare([{**ROW, **change}], [ROW], same_compiler=True)
    assert len(found) == 1 and words in found[0]


def test_what_is_not_worse() -> None:
    slightly = {**ROW, "loop": 109, "per_weight": 5.4}
    assert static.compare([slightly, {**ROW, "variant": "new"}], [ROW], True) == []
    other = {**ROW, "loop": 200, "per_weight": 10.0}
    assert static.compare([other], [ROW], same_compiler=False) == []
    amd = {**ROW, "arch": "gfx942"}
    assert static.compare([{**amd, "spills": 2}], [amd], True) == []


def kept() -> list[dict[str, Any]]:
    return [json.loads(line) for line in static.FILE.read_text().splitlines()]


def test_the_file_holds_every_architecture_without_a_fault() -> None:
    rows = kept()
    assert {row["arch"] for row in rows} == set(static.ARCHS)
    assert not [row for row in rows if row["problem"]]
    assert len({static.key_of(row) for row in rows}) == len(rows)


@pytest.mark.parametrize("arch", regimes.TILES)
@pytest.mark.parametrize("direction", regimes.DIRECTIONS)
def test_the_model_counts_what_was_compiled(arch: str, direction: str) -> None:
    """Instructions per weight of every tile, within a tenth."""
    kernel = {"forward": "lora_linear_fwd_kernel", "backward": "lora_linear_bwd_dx_kernel"}
    rows = [r for r in kept() if (r["arch"], r["kernel"]) == (arch, kernel[direction])]
    usual = [r for r in rows if "bf16 adapter bf16 nested" in r["variant"]]
    checked = 0
    for tile, claimed in regimes.TILES[arch][direction].items():
        for row in usual:
            if row["tile"] == [tile.block_m, tile.block_o, tile.block_i]:
                assert row["per_weight"] == pytest.approx(claimed, rel=0.1), row["variant"]
                checked += 1
    assert checked >= 3
