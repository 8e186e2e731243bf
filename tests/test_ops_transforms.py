"""Transforms of torch.func, forward-mode AD and torch.jit.trace, which see no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastlora_kernels.formats.codebook import kept_table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fastlora
from fastlora import ops
from tests import models
from tests.ops_cases import make


def _jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))


def _dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, torch.ones_like(x)))


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": _jvp,
    "vjp": torch.func.vjp,
    "vmap": lambda f, x: torch.func.vmap(f)(x.unsqueeze(0)),
    "dual": _dual,
    "trace": lambda f, x: torch.jit.trace(f, x, check_trace=False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("format", ["dense", "nf4"])
@pytest.mark.parametrize("grads", [False, True])
def test_an_op_refuses(way: str, format: str, grads: bool) -> None:
    case = make(6, 10, 32, 3, torch.float32, format)

    def run(x: Tensor) -> Tensor:
        return ops.linear(x, case.weight, case.bias, None)

    with torch.set_grad_enabled(grads):
        expected = run(case.x)
        with pytest.raises(NotImplementedError, match=r"run outside of torch.func's transforms"):
            WAYS[way](run, case.x)
        assert torch.equal(run(case.x), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_refuses(way: str, dora: bool) -> None:
    config = fastlora.LoraConfig(r=2, use_dora=dora, target_modules=["up"])
    layer = fastlora.patch_model(models.plain(), config, quantize="nf4").get_submodule(
        "blocks.0.up"
    )
    with pytest.raises(NotImplementedError, match=r"run outside of torch.func's transforms"):
        WAYS[way](layer, torch.randn(3, 32))


def test_tables_are_plain_whatever_is_at_work_at_first() -> None:
    @kept_table
    def table(size: int) -> Tensor:
        return torch.arange(size, dtype=torch.float32)

    def run(x: Tensor) -> Tensor:
        return x + table(3)

    torch.func.jvp(run, (torch.ones(3),), (torch.ones(3),))
    with FakeTensorMode(), torch.inference_mode():
        table(4)
    for size in (3, 4):
        assert table(size) is table(size)
        assert type(table(size)) is Tensor and not table(size).is_inference()
        assert table(size).tolist() == list(range(size))
