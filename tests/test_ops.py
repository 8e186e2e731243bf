"""The fused linear: accuracy, gradients, dropout, spans, shapes, what it saves, opcheck."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora import ops
from tests import contract
from tests.ops_cases import (
    DTYPES,
    FORMATS,
    Case,
    differentiated,
    low_rank_update,
    make,
    some_spans,
    unfused,
    with_gradients,
)

SHAPES = [(1, 1, 2, 1), (3, 17, 64, 1), (7, 5, 33, 3), (64, 129, 64, 16), (129, 24, 130, 8)]
PLAIN = (0.5, 0.0, None, None)  # scaling; no dropout, no spans
NOTHING = (None, None, None, 0.0, 0.0, None, None)  # neither bias nor update


def functions(
    case: Case, backend: str, seed: Tensor | None = None, spans: Tensor | None = None
) -> tuple[contract.Op, contract.Op]:
    """Return ours and the unfused torch path, both from (x, bias, A, B, dy) to y and gradients."""
    dense, rest = case.dense(), (0.7, 0.3, seed, spans)

    def ours(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return ops.linear(x, case.weight, bias, LowRank(A, B, *rest), backend)

    def plain(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return unfused(x, dense, bias, low_rank_update(x, LowRank(A, B, *rest)))

    return differentiated(ours), differentiated(plain)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_torch(
    shape: tuple[int, int, int, int], dtype: torch.dtype, format: str, backend: str
) -> None:
    case = make(*shape, dtype, format)
    ours, unfused = functions(case, backend)
    inputs = (case.x, case.bias, case.lora_A, case.lora_B, case.dy)
    contract.check(f"{shape} {dtype} {format}", ours, unfused, inputs, reps=2)


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_layouts_and_not_finite(format: str, backend: str) -> None:
    case = make(6, 10, 64, 3, torch.float32, format)
    ours, unfused = functions(case, backend)
    inputs = (case.x, case.bias, case.lora_A, case.lora_B, case.dy)
    contract.check_layouts(format, ours, inputs, (0, 2, 3, 4), exact=backend != "reference")
    contract.check_not_finite(format, ours, unfused, inputs, (0, 1, 2, 3, 4))


@pytest.mark.parametrize("double", [True, False])
def test_bfloat16_adapter_and_single_absmax(double: bool, backend: str) -> None:
    case = make(9, 12, 64, 4, torch.bfloat16, "nf4", double)
    ours, unfused = functions(case, backend)
    A, B = case.lora_A.bfloat16(), case.lora_B.bfloat16()
    contract.check("bf16 adapter", ours, unfused, (case.x, case.bias, A, B, case.dy))


def test_gradcheck_of_the_definition() -> None:
    case = make(4, 5, 6, 2, torch.float64, "dense")
    bias, A, B = case.bias, case.lora_A.double(), case.lora_B.double()
    leaves = tuple(t.requires_grad_() for t in (case.x, bias, A, B))

    def forward(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return ops.linear(x, case.weight, bias, LowRank(A, B, 0.7), "reference")

    assert torch.autograd.gradcheck(forward, leaves)


@pytest.mark.parametrize("which", ["dropout", "spans", "both"])
@pytest.mark.parametrize("format", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dropout_and_spans(dtype: torch.dtype, format: str, which: str, backend: str) -> None:
    for shape in ((11, 17, 64, 9), (64, 129, 130, 16)):
        case = make(*shape, dtype, format)
        seed = torch.tensor([2**40 + 3]) if which != "spans" else None
        spans = some_spans(shape[0], shape[3]) if which != "dropout" else None
        ours, plain = functions(case, backend, seed, spans)
        inputs = (case.x, case.bias, case.lora_A, case.lora_B, case.dy)
        most = 3.0 if shape[0] < 16 else contract.MAX_FACTOR  # the largest of few sums is luck
        label = f"{shape} {dtype} {format} {which}"
        contract.check(label, ours, plain, inputs, reps=1, max_factor=most)


def test_gradcheck_with_dropout_and_spans() -> None:
    case = make(7, 5, 6, 4, torch.float64, "dense")
    rest = (0.7, 0.3, torch.tensor([5]), some_spans(7, 4))
    leaves = [case.x, case.bias, case.lora_A.double(), case.lora_B.double()]

    def forward(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return ops.linear(x, case.weight, bias, LowRank(A, B, *rest), "reference")

    assert torch.autograd.gradcheck(forward, tuple(t.requires_grad_() for t in leaves))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_any_number_of_dimensions(lead: tuple[int, ...], format: str, backend: str) -> None:
    case = make(1, 10, 33, 3, torch.float32, format)
    x = torch.randn(*lead, 33, requires_grad=True)
    A = case.lora_A.requires_grad_()
    update = LowRank(A, case.lora_B, 0.5)
    y = ops.linear(x, case.weight, case.bias, update, backend)
    rows = ops.linear(x.reshape(-1, 33), case.weight, case.bias, update, backend)
    assert y.shape == (*lead, 10) and y.is_contiguous()
    assert torch.equal(y.reshape(-1, 10), rows)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert A.grad is not None and A.grad.shape == A.shape


@pytest.mark.parametrize("needs", range(16))
def test_every_combination_of_gradients(needs: int, backend: str) -> None:
    case = make(5, 6, 9, 2, torch.float32, "nf4")
    inputs = [case.x, case.bias, case.lora_A, case.lora_B]
    leaves = [t.clone().requires_grad_(bool(needs >> i & 1)) for i, t in enumerate(inputs)]
    x, bias, A, B = leaves
    y = ops.linear(x, case.weight, bias, LowRank(A, B, 0.5), backend)
    assert y.requires_grad == (needs > 0)
    if needs:
        y.backward(case.dy)

    def forward(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return ops.linear(x, case.weight, bias, LowRank(A, B, 0.5), backend)

    full = with_gradients(forward, *inputs, case.dy)[1:]
    for leaf, gradient in zip(leaves, full, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(sizes)


def test_saves_x_only_for_the_adapter() -> None:
    case = make(1000, 4, 8, 2, torch.float32, "dense")
    x = case.x.requires_grad_()
    frozen = saved_bytes(
        lambda: ops.linear(
            x, case.weight, None, LowRank(case.lora_A, case.lora_B, 1.0), "reference"
        )
    )
    A = case.lora_A.clone().requires_grad_()
    trained = saved_bytes(
        lambda: ops.linear(x, case.weight, None, LowRank(A, case.lora_B, 1.0), "reference")
    )
    assert frozen < x.nbytes <= trained


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_opcheck(format: str, backend: str) -> None:
    case = make(6, 10, 33, 3, torch.float32, format)
    forward = torch.ops.fastlora.lora_linear.default
    backward = torch.ops.fastlora.lora_linear_backward.default
    A, B = case.lora_A.requires_grad_(), case.lora_B.requires_grad_()
    inputs = [case.x[:0], case.x.t().contiguous().t(), case.x.view(2, 3, 33)]
    for x in inputs:
        args = (x.detach().requires_grad_(), *case.weight, case.bias, A, B, *PLAIN, backend)
        torch.library.opcheck(forward, args)
    x = case.x.clone().requires_grad_()
    torch.library.opcheck(forward, (x, *case.weight, *NOTHING, backend))
    spread = (0.5, 0.3, torch.tensor([7]), some_spans(6, 3))
    torch.library.opcheck(forward, (x, *case.weight, case.bias, A, B, *spread, backend))
    s = (case.x @ A.t()).detach()
    low = (case.lora_A.detach(), case.lora_B.detach())
    for flags in ((True, True), (True, False), (False, True)):
        for rest in (PLAIN, spread):
            operands = (case.dy, case.x, s, *case.weight, *low, *rest, *flags, backend)
            torch.library.opcheck(backward, operands)
