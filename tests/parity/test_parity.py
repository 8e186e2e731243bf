"""The same script with and without the line: losses step by step, and the final adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
from tests.parity.scripts import STEPS, Outcome, Script, run

BF16 = torch.bfloat16
# PEFT has no LoHa and LoKr on 4-bit weights to compare with.
PLAIN = [("lora", "dense"), ("lora", "bnb"), ("dora", "dense"), ("dora", "bnb")]
PLAIN += [("loha", "dense"), ("lokr", "dense")]
SCRIPTS = [Script(method, base) for method, base in PLAIN]
SCRIPTS += [Script(method, base, checkpointing=True) for method, base in PLAIN[:2]]
SCRIPTS += [
    Script("lora", base, trainer) for base in ("dense", "bnb") for trainer in ("sft", "dpo")
]
SCRIPTS += [Script(method, "dense", "sft") for method in ("dora", "loha", "lokr")]
SCRIPTS += [Script("lora", "bnb", "sft", checkpointing=True)]


def both(script: Script, directory: Path) -> tuple[Outcome, Outcome]:
    if script.trainer != "plain":
        pytest.importorskip("trl")
    plain, patched = (run(script, line, directory / str(line)) for line in (False, True))
    assert len(plain.losses) == STEPS
    assert plain.losses[-1] < 0.99 * plain.losses[0], "nothing was learned"
    assert plain.adapter.keys() == patched.adapter.keys()
    return plain, patched


def rms(left: list[float], right: list[float]) -> float:
    squares = [(a - b) ** 2 for a, b in zip(left, right, strict=True)]
    return float((sum(squares) / len(squares)) ** 0.5)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_float32(script: Script, tmp_path: Path) -> None:
    """Losses within 1e-5, relative; a trainer logs them rounded."""
    plain, patched = both(script, tmp_path)
    for i, (mine, theirs) in enumerate(zip(patched.losses, plain.losses, strict=True)):
        assert abs(mine - theirs) <= 1e-5 * abs(theirs), (i, mine, theirs)
    for name, value in patched.adapter.items():
        torch.testing.assert_close(value, plain.adapter[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("trainer", ["plain", "sft", "dpo"])
@pytest.mark.parametrize(("method", "base"), PLAIN)
def test_bfloat16(method: str, base: str, trainer: str, tmp_path: Path) -> None:
    """Losses differ by no more than PEFT's own in bfloat16 do from those in float32 (rms)."""
    if trainer != "plain" and method != "lora":
        pytest.skip("one method through the trainers")
    plain, patched = both(Script(method, base, trainer, dtype=BF16), tmp_path)
    wide = run(Script(method, base, trainer), False, tmp_path / "wide")
    gap, ours = (rms(plain.losses, other.losses) for other in (wide, patched))
    assert ours <= gap, (ours, gap)
