"""The C++ kernel of DoRA's whole forward against its parts, by instruction set."""

from __future__ import annotations

import pytest
import torch
from fastlora_kernels import native, native_columns
from fastlora_kernels.low_rank import LowRank

from tests import contract
from tests.kernels.native_problems import KINDS, operands, stored

PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
# m, n, k, r: one token, ragged everywhere, more than one panel of columns, more than one of depth
SHAPES = [(1, 64, 64, 4), (37, 70, 192, 5), (130, 300, 2112, 16), (33, 33, 96, 40)]


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2], "dense"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(str(d)[6:] for d in pair))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_whole_is_its_parts(
    isa: str,
    shape: tuple[int, int, int, int],
    pair: tuple[torch.dtype, torch.dtype],
    kind: str,
) -> None:
    torch.manual_seed(0)
    m, n, k, _ = shape
    weight = stored(n, k, pair[0], kind)
    x, _, bias, a, b = operands(shape, *pair)
    update, magnitude = LowRank(a, b, 0.7), torch.rand(n) + 0.5
    squares = native_columns.weight_squares(weight, n, k, pair[0])
    with contract.poisoned():
        got = native_columns.scaled_linear(x, weight, bias, update, squares, magnitude)
    dense = weight.data if kind == "dense" else native.dequantize_4bit(weight, n, k, pair[0])
    whole = dense.double() + 0.7 * b.double() @ a.double()
    torch.testing.assert_close(got.norms.double(), whole.norm(dim=1), rtol=3e-6, atol=0)
    z, s = native.lora_linear(x, weight, n, None, update)
    if m > 1:  # one token: other sums than a panel's
        assert torch.equal(got.z, z)
    elif pair[0] == torch.float32:
        torch.testing.assert_close(got.z, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.s, s, rtol=1e-5, atol=1e-5)
    scale = magnitude / got.norms
    assert torch.equal(got.y, native_columns.scale_columns(got.z, scale, bias))


def test_a_row_of_zeros_stays_one(isa: str) -> None:
    weight = stored(8, 64, torch.float32, "dense")
    weight.data[3] = 0.0
    update, ones = LowRank(torch.randn(2, 64), torch.zeros(8, 2), 1.0), torch.ones(8)
    squares = weight.data.square().sum(1)
    got = native_columns.scaled_linear(torch.randn(40, 64), weight, None, update, squares, ones)
    assert (got.y[:, 3] == 0).all() and got.norms[3] == 0
