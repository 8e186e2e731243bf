"""The linear of stacked experts: the contract on every backend, segments of every kind."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from fastlora_kernels import native
from fastlora_kernels.formats import StoredWeight
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import QuantizedExperts, experts_linear, quantize_experts
from fastlora.grouped import combine_rows, dispatch_rows, route
from tests import contract

ENDS = {
    "some empty": [0, 9, 9, 40, 57],
    "one takes all": [0, 0, 57, 57, 57],
    "rows of none": [3, 3, 20, 31, 50],
    "few each": [1, 3, 4, 4, 6],
}
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


class Case(NamedTuple):
    weight: Any
    dense: Tensor
    ends: Tensor
    parts: list[Tensor]  # x, bias, A, B, dy


def make(
    ends: list[int],
    format: str,
    dtype: torch.dtype,
    adapter: torch.dtype,
    sizes: tuple[int, int, int] = (48, 64, 5),
    double: bool = True,
) -> Case:
    torch.manual_seed(0)
    e, m, (n, k, r) = len(ends), 57, sizes
    dense: Tensor = (torch.randn(e, n, k) * k**-0.5).to(dtype)
    weight: Any = dense
    if format != "dense":
        weight = quantize_experts(dense, format, 64, double)
        dense = weight.dequantize(dtype)
    parts = [
        torch.randn(m, k).to(dtype),
        torch.randn(e, n).to(dtype),
        (torch.randn(e, r, k) * k**-0.5).to(adapter),
        torch.randn(e, n, r).to(adapter),
        torch.randn(m, n).to(dtype),
    ]
    return Case(weight, dense, torch.tensor(ends), parts)


def unfused(case: Case) -> contract.Op:
    """The plain torch path on the decoded weights, and its gradients."""

    def op(*inputs: Tensor) -> tuple[Tensor, ...]:
        *leaves, dy = [t.detach().requires_grad_() for t in inputs]
        x, bias, A, B = leaves
        y, start = torch.zeros(dy.shape, dtype=x.dtype), 0
        for i, end in enumerate(case.ends.tolist()):
            own = x[start:end]
            base = own @ case.dense[i].to(x.dtype).T + bias[i]
            low = (own.to(A.dtype) @ A[i].T) @ B[i].T * 0.7
            y = torch.cat([y[:start], (base + low).to(x.dtype), y[end:]])
            start = end
        return (y.detach(), *torch.autograd.grad(y, leaves, dy.detach()))

    return op


def ours(case: Case, backend: str = "auto") -> contract.Op:
    def op(*inputs: Tensor) -> tuple[Tensor, ...]:
        *leaves, dy = [t.detach().requires_grad_() for t in inputs]
        x, bias, A, B = leaves
        y = experts_linear(x, case.weight, bias, A, B, 0.7, case.ends, backend=backend)
        return (y.detach(), *torch.autograd.grad(y, leaves, dy.detach()))

    return op


@pytest.mark.parametrize("ends", sorted(ENDS))
@pytest.mark.parametrize("format", ["dense", "nf4", "fp4"])
@pytest.mark.parametrize(("dtype", "adapter"), PAIRS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_contract(
    backend: str, dtype: torch.dtype, adapter: torch.dtype, format: str, ends: str
) -> None:
    case = make(ENDS[ends], format, dtype, adapter, double=ends != "few each")
    # the reference is torch's matmul too, but of single rows it is not the same one every time
    factor = contract.RMS_FACTOR if backend == "native" else 2.0
    check = (ours(case, backend), unfused(case), case.parts)
    contract.check(f"{backend} {ends}", *check, rms_factor=factor)


@pytest.mark.parametrize("isa", native.ISAS)
def test_every_instruction_set_gives_the_bits_of_expert_by_expert(isa: str) -> None:
    before = native.isa()
    try:
        native.set_isa(isa)
    except ValueError:
        pytest.skip(f"this CPU has no {isa}")
    try:
        for sizes in ((33, 130, 3), (64, 65, 16)):
            case = make([20, 20, 45, 57], "nf4", torch.bfloat16, torch.float32, sizes)
            x, bias, A, B, _ = case.parts
            y = experts_linear(x, case.weight, bias, A, B, 0.5, case.ends)
            for i, rows in ((0, slice(0, 20)), (2, slice(20, 45)), (3, slice(45, 57))):
                one = fastlora.lora_linear(x[rows], case.weight[i], bias[i], A[i], B[i], 0.5)
                assert torch.equal(y[rows], one)
    finally:
        native.set_isa(before)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    threads = torch.get_num_threads()
    for ends in ([5, 9, 15, 22, 30, 37, 43, 57], [0, 50, 51, 57]):
        case, results = make(ends, "nf4", torch.bfloat16, torch.float32), []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ours(case)(*case.parts))
        torch.set_num_threads(threads)
        for found in results[1:]:
            assert all(map(torch.equal, found, results[0]))


def test_many_experts_no_rows_and_no_adapter() -> None:
    case = make([0] * 128, "nf4", torch.float32, torch.float32, (8, 64, 2))
    _, bias, A, B, _ = case.parts
    A.requires_grad_(), B.requires_grad_()
    empty = torch.empty(0, 64, requires_grad=True)
    y = experts_linear(empty, case.weight, bias, A, B, 1.0, case.ends)
    assert y.shape == (0, 8)
    grads = torch.autograd.grad(y.sum(), [empty, A, B])
    assert [g.shape for g in grads] == [empty.shape, A.shape, B.shape]
    assert not any(g.any() for g in grads)
    x = torch.randn(57, 64)
    ends = torch.arange(128).clamp(max=57)
    y = experts_linear(x, case.weight, None, None, None, 0.0, ends)
    torch.testing.assert_close(y[3], case.dense[4] @ x[3])


def test_gradients_alone_checkpointing_and_autocast() -> None:
    case = make(ENDS["some empty"], "nf4", torch.float32, torch.float32)
    x, bias, A, B, dy = case.parts
    x.requires_grad_()
    whole = ours(case)(*case.parts)
    y = experts_linear(x, case.weight, bias, A, B, 0.7, case.ends)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], whole[1])
    A.requires_grad_()
    args = (x.detach(), case.weight, bias, A, B, 0.7, case.ends)
    y = checkpoint(experts_linear, *args, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y, A, dy)[0], whole[3])
    with torch.autocast("cpu", torch.bfloat16):
        y = experts_linear(x, case.weight, bias, A, B, 0.7, case.ends)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), whole[0], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("format", ["dense", "nf4"])
@pytest.mark.filterwarnings("ignore")
def test_opcheck_and_compile(format: str) -> None:
    case = make(ENDS["some empty"], format, torch.float32, torch.float32)
    x, bias, A, B, dy = case.parts
    for part in (x, bias, A, B):
        part.requires_grad_()
    dense = StoredWeight(case.weight, None, None, None, "dense", 0)
    stored = dense if format == "dense" else case.weight.stored()
    args = (x, *stored, bias, A, B, 0.7, case.ends, "auto")
    torch.library.opcheck(torch.ops.fastlora.experts_linear.default, args)

    def step(x: Tensor, ids: Tensor) -> Tensor:
        to = route(ids, 5)
        y = experts_linear(
            dispatch_rows(x, to), case.weight, bias, A, B, 0.7, to.ends, backend="native"
        )
        return combine_rows(y, to, torch.ones(ids.shape))

    ids = torch.randint(0, 5, (57, 2))
    plain = torch.autograd.grad(step(x, ids), [x, A], dy)
    compiled = torch.compile(step, fullgraph=True)
    assert torch.equal(compiled(x, ids), step(x, ids))
    assert all(map(torch.equal, torch.autograd.grad(compiled(x, ids), [x, A], dy), plain))


def test_routing_is_the_sum_over_chosen_experts() -> None:
    torch.manual_seed(0)
    x = torch.randn(11, 4, requires_grad=True)
    ids, weights = torch.randint(0, 7, (11, 3)), torch.rand(11, 3, requires_grad=True)
    to = route(ids, 6)  # 6 is no expert: its rows come last
    assert to.ends[-1] == (ids < 6).sum()
    y = combine_rows(dispatch_rows(x, to), to, weights)
    want = x * weights.sum(1, keepdim=True)
    torch.testing.assert_close(y, want)
    for got, right in zip(
        torch.autograd.grad(y.square().sum(), [x, weights]),
        torch.autograd.grad(want.square().sum(), [x, weights]),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


def test_quantised_experts_are_quantised_matrices() -> None:
    torch.manual_seed(0)
    for shape in ((3, 7, 9), (2, 48, 80)):
        dense = torch.randn(shape).bfloat16()
        for double in (True, False):
            stacked = quantize_experts(
                dense.transpose(1, 2).contiguous().transpose(1, 2), "fp4", 64, double
            )
            for i, matrix in enumerate(dense):
                one = fastlora.quantize_4bit(matrix, "fp4", 64, double)
                assert torch.equal(stacked[i].packed, one.packed)
                assert torch.equal(stacked[i].dequantize(), one.dequantize())
            assert torch.equal(stacked.dequantize()[1], stacked[1].dequantize())
            assert stacked.nbytes == sum(stacked[i].nbytes for i in range(shape[0]))


def test_what_is_refused() -> None:
    case = make(ENDS["some empty"], "nf4", torch.float32, torch.float32)
    x, bias, A, B, _ = case.parts
    rest = (case.weight, bias, A, B, 1.0)
    with pytest.raises(ValueError, match="ends must ascend from 0 to at most the 57 rows"):
        experts_linear(x, *rest, torch.tensor([0, 9, 8, 40, 57]))
    with pytest.raises(ValueError, match="ends must ascend"):
        experts_linear(x, *rest, torch.tensor([0, 9, 9, 40, 58]))
    with pytest.raises(TypeError, match=r"ends must be int64 of shape \(5,\)"):
        experts_linear(x, *rest, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="that fits the 63 columns of x"):
        experts_linear(x[:, :63], *rest, case.ends)
    with pytest.raises(ValueError, match=r"lora_A must have shape \(5, r, 64\)"):
        experts_linear(x, case.weight, bias, A[:3], B, 1.0, case.ends)
    with pytest.raises(TypeError, match="come together, got only one"):
        experts_linear(x, case.weight, bias, A, None, 1.0, case.ends)
    with pytest.raises(TypeError, match="x and dense weights must have one dtype"):
        experts_linear(x, case.dense.bfloat16(), bias, A, B, 1.0, case.ends)
    with pytest.raises(ValueError, match="must be frozen"):
        experts_linear(x, case.dense.clone().requires_grad_(), bias, A, B, 1.0, case.ends)
    odd = quantize_experts(torch.randn(2, 1, 5), "nf4", 32, False)
    with pytest.raises(ValueError, match="of one row must have an even number of columns, got 1 x"):
        experts_linear(torch.randn(4, 5), odd, None, None, None, 1.0, torch.tensor([2, 4]))
    with pytest.raises(ValueError, match=r"must have shape \(E, N, K\), got \(4, 4\)"):
        quantize_experts(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="E rows in each part"):
        weight = case.weight
        QuantizedExperts(weight.packed, weight.absmax[:2], weight.shape, torch.float32, "nf4", 64)
