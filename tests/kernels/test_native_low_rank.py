"""The C++ kernels of every adapter: dropout, spans, column scaling, sums over the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank, keep_mask, keep_scale, span_mask
from torch import Tensor

from fastlora.backends import native as backend
from fastlora.backends import reference
from tests import contract
from tests.kernels.native_problems import KINDS, operands, stored

SCALING = 0.7
DROPOUT = 0.3
# m, n, k, r: one token; few; around the vector, tile and panel widths; more than one panel deep
SHAPES = [
    (1, 64, 128, 64),
    (11, 17, 129, 9),
    (8, 33, 64, 4),
    (17, 129, 1000, 17),
    (70, 96, 2304, 64),
]
DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]
NAMES = ["bf16-f32", "bf16-bf16", "f32-f32", "f16-f32", "f16-f16"]


def some_spans(m: int, r: int) -> Tensor:
    """Return ranges of ranks, of every kind: empty, whole, at either end, in any order."""
    edges = torch.randint(0, r + 1, (m, 2)).sort(dim=1).values.int()
    edges[::5] = torch.tensor([0, r])
    edges[1::7] = torch.tensor([r, r])
    edges[2::7] = torch.tensor([0, 0])
    return edges


def run(module: Any, weight: StoredWeight) -> contract.Op:
    """y, dx, dA, dB of a backend for x, dy, bias, A, B, seed and spans."""

    def op(
        x: Tensor, dy: Tensor, bias: Tensor, a: Tensor, b: Tensor, seed: Any, spans: Any
    ) -> tuple[Tensor, ...]:
        update = LowRank(a, b, SCALING, DROPOUT, seed, spans)
        y, s = module.lora_linear(x, weight, bias, update)
        return y, *module.lora_linear_backward(dy, x, s, weight, update, True, True)

    return op


def exactly(weight: StoredWeight, dtype: torch.dtype) -> contract.Op:
    """The same in float64 on the stored weight, the truth of the contract."""

    def op(
        x: Tensor, dy: Tensor, bias: Tensor, a: Tensor, b: Tensor, seed: Any, spans: Any
    ) -> tuple[Tensor, ...]:
        w = reference.dequantize(weight, dy.shape[1], x.shape[1], dtype).double()
        keep = torch.ones_like(x)
        if seed is not None:
            keep = keep_mask(seed, x.shape[0], x.shape[1], DROPOUT) * keep_scale(DROPOUT)
        has = 1.0 if spans is None else span_mask(spans, a.shape[0]).double()
        s, t = (x * keep) @ a.t() * has, SCALING * dy @ b * has
        y = x @ w.t() + bias + SCALING * s @ b.t()
        return y, dy @ w + keep * (t @ a), t.t() @ (x * keep), SCALING * dy.t() @ s

    return op


@pytest.mark.parametrize("which", ["dropout", "spans", "both"])
@pytest.mark.parametrize("kind", ["nf4-64-double", "fp4-64-double", "dense"])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=NAMES)
def test_dropout_and_spans(
    isa: str, kind: str, dtype: torch.dtype, adapter: torch.dtype, which: str
) -> None:
    torch.manual_seed(0)
    for shape in SHAPES if kind == KINDS[0] else SHAPES[1::2]:
        m, n, k, r = shape
        weight, inputs = stored(n, k, dtype, kind), operands(shape, dtype, adapter)
        seed = torch.tensor([-(2**62) + 12345]) if which != "spans" else None
        spans = some_spans(m, r) if which != "dropout" else None
        op, plain = run(backend, weight), run(reference, weight)
        name, truth = f"{isa} {kind} {shape} {which}", exactly(weight, dtype)
        contract.check(name, op, plain, [*inputs, seed, spans], truth=truth, reps=1)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**62 + 7])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_the_mask_is_the_same(isa: str, seed: int, p: float) -> None:
    """With A the identity, s is the dropped-out x itself."""
    m, k = 37, 67
    x, eye = torch.ones(m, k), torch.eye(k)
    given = torch.tensor(seed)
    weight = StoredWeight(torch.zeros(4, k), None, None, None, "dense", 0)
    update = LowRank(eye, torch.zeros(4, k), 1.0, p, given)
    _, s = backend.lora_linear(x, weight, None, update)
    assert torch.equal(s != 0, keep_mask(given, m, k, p))
    torch.testing.assert_close(s[s != 0], torch.full_like(s[s != 0], keep_scale(p)))


def test_rows_without_ranks_are_the_base(isa: str) -> None:
    torch.manual_seed(1)
    for m in (1, 5, 40):
        weight = stored(48, 128, torch.bfloat16, "nf4-64-double")
        x, dy, bias, a, b = operands((m, 48, 128, 6), torch.bfloat16, torch.float32)
        spans = torch.zeros(m, 2, dtype=torch.int32)
        update = LowRank(a, b, SCALING, spans=spans)
        y, s = backend.lora_linear(x, weight, bias, update)
        assert not s.any()
        torch.testing.assert_close(y, reference.lora_linear(x, weight, bias, None)[0])
        dx, da, db = backend.lora_linear_backward(dy, x, s, weight, update, True, True)
        assert not da.any() and not db.any()
        plain = reference.lora_linear_backward(dy, x, None, weight, None, True, False)[0]
        torch.testing.assert_close(dx, plain, rtol=1e-2, atol=1e-2)


def test_layouts_and_places_of_nan_with_dropout(isa: str) -> None:
    torch.manual_seed(2)
    for shape in ((3, 16, 128, 4), (20, 40, 96, 4)):
        weight = stored(shape[1], shape[2], torch.bfloat16, "nf4-64-double")
        spans = some_spans(shape[0], shape[3])
        inputs = [*operands(shape, torch.bfloat16, torch.float32), torch.tensor([5]), spans]
        op = run(backend, weight)
        contract.check_layouts(isa, op, inputs, which=(0, 1, 3, 4))
        # A dropped or masked NaN need not spread: the base carries it to y and dx all the same.
        contract.check_not_finite(isa, op, run(reference, weight), inputs, (0, 1))


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    torch.manual_seed(3)
    before = torch.get_num_threads()
    for m, n, k, r in ((1, 96, 256, 8), (100, 300, 2304, 8)):
        weight = stored(n, k, torch.bfloat16, "nf4-64-double")
        inputs = operands((m, n, k, r), torch.bfloat16, torch.float32)
        rest = (torch.tensor([5]), some_spans(m, r))
        scale = torch.rand(n)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums = (
                backend.weight_dots(inputs[3], weight, n, torch.bfloat16),
                backend.weight_squares(weight, n, k, torch.bfloat16),
                *backend.scale_columns_backward(inputs[1], inputs[1], scale, True, True),
            )
            results.append((*run(backend, weight)(*inputs, *rest), *sums))
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(map(contract.same_bits, results[0], other))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=NAMES)
def test_sums_over_the_weight(
    isa: str, kind: str, dtype: torch.dtype, adapter: torch.dtype
) -> None:
    """Sums of products of 16 bits in float32 too: a few times torch's rounding is float32's."""
    torch.manual_seed(4)
    for r, n, k in ((1, 130, 128), (8, 48, 129), (17, 130, 2304), (64, 33, 96)):
        weight, a = stored(n, k, dtype, kind), torch.randn(r, k).to(adapter)
        exact = reference.dequantize(weight, n, k, dtype).double()
        truth = a.double() @ exact.t(), exact.square().sum(1)
        ours, plain = (
            (m.weight_dots(a, weight, n, dtype), m.weight_squares(weight, n, k, dtype))
            for m in (backend, reference)
        )
        for i in range(2):
            name = f"{isa} {kind} {r, n, k}[{i}]"
            contract.compare(name, ours[i], plain[i], truth[i], rms_factor=4.0, max_factor=5.0)
        with contract.poisoned():
            again = backend.weight_dots(a, weight, n, dtype)
            assert contract.same_bits(again, ours[0])
            assert contract.same_bits(backend.weight_squares(weight, n, k, dtype), ours[1])


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_column_scaling(isa: str, dtype: torch.dtype, bias: torch.dtype | None) -> None:
    torch.manual_seed(5)

    def op(module: Any) -> contract.Op:
        def both(z: Tensor, dy: Tensor, scale: Tensor, shift: Any) -> tuple[Tensor, ...]:
            grads = module.scale_columns_backward(dy, z, scale, True, True)
            return module.scale_columns(z, scale, shift), *grads

        return both

    for m, n in ((0, 16), (1, 5), (3, 64), (9, 257), (130, 1030)):
        z, dy, scale = torch.randn(m, n).to(dtype), torch.randn(m, n).to(dtype), torch.randn(n)
        shift = None if bias is None else torch.randn(n).to(bias)
        inputs = (z, dy, scale, shift)
        contract.check(f"{isa} {m, n}", op(backend), op(reference), inputs, reps=1)
        if m:
            contract.check_layouts(isa, op(backend), inputs, which=(0, 1))
            contract.check_not_finite(isa, op(backend), op(reference), inputs, (0, 1))
    parts = backend.scale_columns_backward(dy, None, scale, True, False)
    assert parts[1].numel() == 0 and torch.equal(parts[0], op(backend)(z, dy, scale, None)[1])
    parts = backend.scale_columns_backward(dy, z, scale, False, True)
    assert parts[0].numel() == 0 and torch.equal(parts[1], op(backend)(z, dy, scale, None)[2])
