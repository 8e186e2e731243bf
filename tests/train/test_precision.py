"""Where 16-bit products are slow, runs compute in float32, and say so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastlora.train import precision, quickstart
from fastlora.train.models import load_model
from fastlora.train.options import QuickstartOptions

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["slow", "fast"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A CPU without and with instructions for bfloat16."""
    for module in (precision, quickstart):
        monkeypatch.setattr(module, "slow_on_cpu", lambda dtype: bool(request.param))
    return bool(request.param)


def test_float32_is_never_slow() -> None:
    assert not precision.slow_on_cpu(torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_bfloat16_is_slow_without_avx512() -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii")
    if " avx2" not in flags:
        pytest.skip("another processor than x86")
    if "avx512bw" not in flags:
        assert precision.slow_on_cpu(torch.bfloat16)
    if "avx512_bf16" in flags:
        assert not precision.slow_on_cpu(torch.bfloat16)


def test_why_widen(slow: bool) -> None:
    assert precision.why_widen(True, CPU) == "they are trained themselves"
    assert precision.why_widen(False, CPU) == (precision.WHY_SLOW if slow else None)
    assert precision.why_widen(False, torch.device("cuda")) is None
    assert precision.why_widen(False, None) is None


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_frozen_model_is_loaded_in_what_is_fast(slow: bool, quantize: str | None) -> None:
    widen = precision.why_widen(False, CPU)
    loaded = load_model("nano", "AutoModelForCausalLM", quantize=quantize, widen=widen)
    dtype = loaded.model.get_input_embeddings().weight.dtype
    assert dtype == (torch.float32 if slow else torch.bfloat16)
    said = f"the bfloat16 weights were loaded as float32: {precision.WHY_SLOW}"
    assert (said in loaded.notes) == slow
    assert loaded.model.config.dtype == dtype


def test_quickstart_trains_in_what_is_fast(slow: bool) -> None:
    job = quickstart.Quickstart(QuickstartOptions(steps=1, sequence_length=64))
    assert job.dtype == (torch.float32 if slow else torch.bfloat16)
    assert job.model.get_input_embeddings().weight.dtype == job.dtype
