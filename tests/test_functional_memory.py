"""No adapter makes N x K numbers: neither a result, nor a gradient, nor anything autograd keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlora
from tests.test_functional import OPS, operands

N, K, M = 256, 320, 24


class Sizes(TorchDispatchMode):
    """Records the numbers of every tensor that an operation returns, but for views of `given`."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given.untyped_storage().data_ptr()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() != self.given:
                self.made.append((str(func), storage.nbytes() // tensor.itemsize))
        return result


def run(name: str, weight: Any, backend: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    x, bias, *params, dy = operands(name, M, N, K, torch.float32)
    leaves = [t.requires_grad_() for t in (x, bias, *params)]
    return lambda: OPS[name][1](x, weight, bias, *params, backend), [*leaves, dy]


@pytest.mark.parametrize("name", OPS)
def test_no_result_has_as_many_numbers_as_the_weight(name: str) -> None:
    weight = fastlora.quantize_4bit(torch.randn(N, K))
    forward, (*leaves, dy) = run(name, weight, "native")
    with Sizes(weight.packed) as sizes:
        y = forward()
        torch.autograd.grad(y, leaves, dy)
    assert {"fastlora.lora_linear.default", "fastlora.lora_linear_backward.default"} <= {
        name for name, _ in sizes.made
    }
    biggest = max(sizes.made, key=lambda entry: entry[1])
    assert biggest[1] < N * K // 2, biggest


@pytest.mark.parametrize("name", OPS)
def test_autograd_keeps_rows_and_factors_alone(name: str, backend: str) -> None:
    """At most x, S and a column's worth, the packed weight and factors of 8 r^2 (N + K) numbers."""
    weight = fastlora.quantize_4bit(torch.randn(N, K))
    forward, (*leaves, _) = run(name, weight, backend)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    own = {t.untyped_storage().data_ptr() for t in leaves}
    own |= {t.untyped_storage().data_ptr() for t in (weight.packed, weight.absmax)}
    extra = sum(size for place, size in kept.items() if place not in own)
    assert max(size for place, size in kept.items() if place not in own) < N * K
    if not name.startswith("kron (1, 1)") and not name.startswith("kron (2, 1)"):
        r = 29 if name == "multi" else 5
        assert extra < 4 * (8 * (N + K) * r**2 + M * (r**2 + N)), extra


@pytest.mark.parametrize("name", [name for name in OPS if "dropout 0.4" in name])
def test_dropout_keeps_no_mask(name: str, backend: str) -> None:
    forward, _ = run(name, torch.randn(N, K), backend)
    sizes: list[tuple[torch.dtype, int]] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append((t.dtype, t.numel()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    assert not [entry for entry in sizes if entry[0] in (torch.bool, torch.uint8)]
