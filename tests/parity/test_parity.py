"""The same script with and without the line: losses step by step, and the final adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

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


Runs = Callable[[Script, bool], Outcome]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Run a script, or return what it returned before: it is the same every time."""

    @cache
    def outcome(script: Script, with_the_line: bool) -> Outcome:
        return run(script, with_the_line, tmp_path_factory.mktemp(str(script)))

    return outcome


def both(script: Script, once: Runs) -> tuple[Outcome, Outcome]:
    if script.trainer != "plain":
        pytest.importorskip("trl")
    plain, patched = (once(script, line) for line in (False, True))
    assert len(plain.losses) == STEPS
    assert plain.losses[-1] < 0.99 * plain.losses[0], "nothing was learned"
    assert plain.adapter.keys() == patched.adapter.keys()
    return plain, patched


def rms(left: list[float], right: list[float]) -> float:
    squares = [(a - b) ** 2 for a, b in zip(left, right, strict=True)]
    return float((sum(squares) / len(squares)) ** 0.5)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_float32(script: Script, once: Runs) -> None:
    """Losses within 1e-5, relative; a trainer logs them rounded."""
    plain, patched = both(script, once)
    for i, (mine, theirs) in enumerate(zip(patched.losses, plain.losses, strict=True)):
        assert abs(mine - theirs) <= 1e-5 * abs(theirs), (i, mine, theirs)
    for name, value in patched.adapter.items():
        torch.testing.assert_close(value, plain.adapter[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("script", [s for s in SCRIPTS if not s.checkpointing], ids=str)
def test_bfloat16(script: Script, once: Runs) -> None:
    """Losses differ by no more than PEFT's own in bfloat16 do from those in float32 (rms)."""
    plain, patched = both(replace(script, dtype=BF16), once)
    wide = once(script, False)
    gap, ours = (rms(plain.losses, other.losses) for other in (wide, patched))
    assert ours <= gap, (ours, gap)
