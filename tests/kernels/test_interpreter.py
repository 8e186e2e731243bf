from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests import interpreter

pytestmark = pytest.mark.skipif(interpreter.on_gpu(), reason="the GPU needs no interpreter")


def _interpreted(function: Any) -> Any:
    """Return the kernel for the interpreter, whatever the environment says now."""
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function)


def _arithmetic(a_ptr, b_ptr, out_ptr, sum_ptr, SIZE):  # type: ignore[no-untyped-def]
    import triton.language as tl

    index = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + index), tl.load(b_ptr + index)
    tl.store(out_ptr + index, a + b)
    tl.store(out_ptr + SIZE + index, a * b)
    tl.store(out_ptr + 2 * SIZE + index, a - b)
    tl.store(out_ptr + 3 * SIZE + index, -a)
    tl.store(out_ptr + 4 * SIZE + index, tl.where(a < b, a, b))
    tl.store(out_ptr + 5 * SIZE + index, a * 2.0)
    tl.store(out_ptr + 6 * SIZE + index, (a.to(tl.float32) / 3.0).to(tl.bfloat16))
    tl.store(sum_ptr, tl.max(a, 0))


def test_bfloat16_arithmetic_is_that_of_torch() -> None:
    a, b = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    out, largest = torch.zeros(7, 64).bfloat16(), torch.zeros(1).bfloat16()
    import triton.language as tl

    kernel = _interpreted(_arithmetic)
    kernel.__globals__ = {"tl": tl}
    kernel[(1,)](a, b, out, largest, tl.constexpr(64))
    wanted = [a + b, a * b, a - b, -a, torch.minimum(a, b), a * 2, (a.float() / 3).bfloat16()]
    for row, expected in zip(out, wanted, strict=True):
        assert torch.equal(row, expected)
    assert torch.equal(largest[0], a.max())


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.tensor([float("inf"), -0.0, 1e-40])])
    ours = torch.from_numpy(interpreter.encode(values.numpy()).view("int16")).view(torch.bfloat16)
    wanted = values.bfloat16()
    nan = torch.isnan(wanted)
    assert torch.equal(torch.isnan(ours), nan)
    assert torch.equal(ours[~nan], wanted[~nan])


def test_environment_is_left_alone() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1"


def test_too_late_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "fastlora_kernels.lora_linear")
    with pytest.raises(RuntimeError, match="must run before triton is imported"):
        interpreter.prepare()
