"""The ops: accuracy, gradients, opcheck, compile, checkpointing, autocast, refusals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from fastlora_kernels.formats import StoredWeight, dequantize
from fastlora_kernels.low_rank import LowRank
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import ops
from tests import contract

SHAPES = [(1, 1, 2, 1), (3, 17, 64, 1), (7, 5, 33, 3), (64, 129, 64, 16), (129, 24, 130, 8)]
FORMATS = ["dense", "nf4", "fp4"]
DTYPES = [torch.float32, torch.bfloat16]
PLAIN = (0.5, 0.0, None, None)  # scaling; no dropout, no spans
NOTHING = (None, None, None, 0.0, 0.0, None, None)  # neither bias nor update


class Case(NamedTuple):
    x: Tensor
    weight: StoredWeight
    bias: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor


def make(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, format: str, double: bool = True
) -> Case:
    g = torch.Generator().manual_seed(m * 7 + n * 5 + k * 3 + r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    dense = (normal(n, k) * 0.1).to(dtype)
    weight = StoredWeight(dense, None, None, None, "dense", 0)
    if format != "dense":
        weight = fastlora.quantize_4bit(dense, format, 64, double).stored()
    x, bias, dy = normal(m, k).to(dtype), normal(n).to(dtype), normal(m, n).to(dtype)
    return Case(x, weight, bias, normal(r, k) * 0.1, normal(n, r) * 0.1, dy)


Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def with_gradients(forward: Forward, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return y, dx, dbias, dA, dB."""
    *parts, dy = inputs
    leaves = [t.detach().requires_grad_() for t in parts]
    y = forward(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def functions(case: Case, backend: str) -> tuple[contract.Op, contract.Op]:
    """Return ours and the unfused torch path, both from (x, bias, A, B, dy) to y and gradients."""
    n, k = case.lora_B.shape[0], case.lora_A.shape[1]
    dense = dequantize(case.weight, n, k, case.x.dtype)

    def ours(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return ops.linear(x, case.weight, bias, LowRank(A, B, 0.7), backend)

    def unfused(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y = functional.linear(x, dense.to(x.dtype), bias)
        update = functional.linear(functional.linear(x.to(A.dtype), A), B) * 0.7
        return (y + update).to(x.dtype)

    return (lambda *t: with_gradients(ours, *t)), (lambda *t: with_gradients(unfused, *t))


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
    s = (case.x @ A.t()).detach()
    tail = (case.lora_A.detach(), case.lora_B.detach(), *PLAIN)
    for need_dx, need_dlora in ((True, True), (True, False), (False, True)):
        flags = (need_dx, need_dlora, backend)
        torch.library.opcheck(backward, (case.dy, case.x, s, *case.weight, *tail, *flags))


@pytest.fixture
def compiler() -> Iterator[Callable[..., Any]]:
    """torch.compile that starts afresh and allows no graph break."""
    torch._dynamo.reset()
    yield functools.partial(torch.compile, fullgraph=True)
    torch._dynamo.reset()


def block(case: Case, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y = ops.linear(x, case.weight, case.bias, LowRank(A, B, 0.5), backend)
        return functional.silu(y) * 2

    return run


def gradients(run: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = run(*leaves)
    y.float().square().sum().backward()
    return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_compile_without_breaks(format: str, backend: str, compiler: Callable[..., Any]) -> None:
    case = make(6, 10, 32, 3, torch.float32, format)
    run = block(case, backend)
    compiled = compiler(run, backend="aot_eager")
    for rows in (6, 5, 9):
        inputs = (torch.randn(2, rows, 32), case.lora_A, case.lora_B)
        for ours, eager in zip(gradients(compiled, *inputs), gradients(run, *inputs), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.slow
def test_compile_with_inductor(compiler: Callable[..., Any]) -> None:
    case = make(6, 10, 32, 3, torch.float32, "nf4")
    run = block(case, "reference")
    inputs = (case.x, case.lora_A, case.lora_B)
    compiled = gradients(compiler(run), *inputs)
    for ours, eager in zip(compiled, gradients(run, *inputs), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, backend: str) -> None:
    case = make(6, 10, 32, 3, torch.float32, "nf4")
    run = block(case, backend)

    def again(*inputs: Tensor) -> Tensor:
        result: Tensor = checkpoint(run, *inputs, use_reentrant=reentrant)
        return result

    inputs = (case.x, case.lora_A, case.lora_B)
    for ours, plain in zip(gradients(again, *inputs), gradients(run, *inputs), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("format", ["dense", "nf4"])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(format: str, compiled: bool, backend: str, compiler: Callable[..., Any]) -> None:
    case = make(6, 10, 32, 3, torch.float32, format)
    run: Callable[..., Tensor] = block(case, backend)
    if compiled:
        run = compiler(run, backend="aot_eager")
    inputs = (case.x, case.lora_A, case.lora_B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, dx, dA, dB = gradients(run, *inputs)
        assert functional.linear(case.x, torch.zeros(2, 32)).dtype == y.dtype == torch.bfloat16
    weight = case.weight
    if format == "dense":
        weight = weight._replace(data=weight.data.bfloat16())
    alone = block(case._replace(weight=weight), backend)
    by_hand = gradients(lambda x, A, B: alone(x.bfloat16(), A, B), *inputs)
    assert dx.dtype == dA.dtype == dB.dtype == torch.float32
    for ours, expected in zip((y, dx, dA, dB), by_hand, strict=True):
        assert torch.equal(ours, expected)


def test_functional_takes_tensor_and_quantized_weight(backend: str) -> None:
    case = make(5, 6, 8, 2, torch.float32, "dense")
    dense = case.weight.data
    quantized = fastlora.quantize_4bit(dense)
    rest = (case.bias, case.lora_A, case.lora_B, 0.5)
    y = fastlora.lora_linear(case.x, quantized, *rest, backend=backend)
    same = fastlora.lora_linear(case.x, quantized.dequantize(), *rest, backend=backend)
    torch.testing.assert_close(y, same)
    assert torch.equal(
        fastlora.lora_linear(case.x, dense, backend="reference"), functional.linear(case.x, dense)
    )


CASE = make(4, 6, 8, 2, torch.float32, "nf4")
GOOD: dict[str, Any] = {
    "x": CASE.x, "weight": CASE.weight, "bias": CASE.bias,
    "lora_A": CASE.lora_A, "lora_B": CASE.lora_B, "scaling": 1.0, "dropout": 0.5,
    "seed": torch.tensor([1]), "spans": torch.tensor([[0, 2]] * 4).int(), "backend": "reference",
}  # fmt: skip
DENSE = StoredWeight(torch.zeros(6, 8), None, None, None, "dense", 0)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension, got a scalar"),
    ({"x": CASE.x[:, :4]}, ValueError, r"for an input of K = 4 columns must be .*\(6, 4\)"),
    ({"x": CASE.x.int()}, TypeError, "x must be float32, bfloat16 or float16, got torch.int32"),
    ({"x": CASE.x.half(), "weight": DENSE, "bias": None}, TypeError, "must have one dtype"),
    ({"weight": DENSE._replace(data=torch.zeros(6, 9))}, ValueError, r"got \(6, 9\)"),
    ({"weight": DENSE._replace(format="nf3")}, ValueError, "format must be one of"),
    ({"weight": DENSE._replace(format="nf4")}, TypeError, "must be packed uint8 with its absmax"),
    ({"weight": CASE.weight._replace(blocksize=48)}, ValueError, "blocksize must be one of"),
    ({"weight": CASE.weight._replace(blocksize=32)}, ValueError, "absmax must have 2 values"),
    ({"weight": CASE.weight._replace(nested_absmax=None)}, TypeError, "absmax must be float32"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
    ({"bias": torch.zeros(6).half()}, TypeError, "bias must be float32 or torch.float32"),
    ({"lora_A": torch.zeros(2, 9)}, ValueError, r"lora_A must have shape \(r, 8\)"),
    ({"lora_A": torch.zeros(0, 8), "lora_B": torch.zeros(6, 0)}, ValueError, "r at least 1"),
    ({"lora_B": CASE.lora_B.half()}, TypeError, "must both be float32 or torch.float32 like x"),
    ({"lora_A": CASE.lora_A.to("meta")}, ValueError, "all operands must be on one device"),
    ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
    ({"seed": torch.tensor([1.0])}, TypeError, "seed must be one int64, got torch.float32"),
    ({"seed": torch.tensor([1, 2])}, TypeError, r"seed must be one int64, got torch.int64 \(2,\)"),
    ({"spans": torch.zeros(4, 2)}, TypeError, "spans must be int32 of shape"),
    ({"spans": torch.zeros(3, 2).int()}, ValueError, "spans must have one row for each row"),
    ({"weight": CASE.weight._replace(nested_offset=None)}, TypeError, "come together, got only"),
    ({"weight": CASE.weight._replace(nested_offset=torch.zeros(2))}, TypeError, "one float32"),
    ({"backend": "cuda"}, ValueError, r"backend must be one of \['auto',"),
    ({"backend": 3}, TypeError, "backend must be a str, got int"),
]


def linear(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, backend: str, **low: Any
) -> Tensor:
    A, B = low.pop("lora_A"), low.pop("lora_B")
    return ops.linear(x, weight, bias, LowRank(A, B, **low), backend)


@pytest.mark.parametrize(("change", "kind", "sentence"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_operands(change: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    args = GOOD | change
    with pytest.raises(kind, match=sentence):
        linear(**args)


@pytest.mark.parametrize(
    ("change", "kind", "sentence"), BAD[1:22], ids=[b[2][:40] for b in BAD[1:22]]
)
def test_bad_operands_say_the_same_when_fake(
    change: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    args = GOOD | change
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: Any) -> Any:
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        weight = StoredWeight(*map(fake, args.pop("weight")))
        operands = {name: fake(value) for name, value in args.items()}
        with pytest.raises(kind, match=sentence):
            linear(weight=weight, **operands)


def test_weight_gradient_is_refused() -> None:
    weight = torch.zeros(6, 8, requires_grad=True)
    sentence = "the weight of a fastlora linear must be frozen"
    with pytest.raises(ValueError, match=sentence):
        fastlora.lora_linear(CASE.x, weight, backend="reference")
    with pytest.raises(ValueError, match=sentence):
        op = torch.ops.fastlora.lora_linear.default
        op(CASE.x, weight, None, None, None, "dense", 0, *NOTHING, "reference")
    with torch.no_grad():
        assert fastlora.lora_linear(CASE.x, weight, backend="reference").shape == (4, 6)


@pytest.mark.parametrize("through_op", [False, True])
def test_second_derivative_is_refused(through_op: bool) -> None:
    x = CASE.x.clone().requires_grad_()
    flat = (CASE.bias, CASE.lora_A, CASE.lora_B, *PLAIN, "reference")
    update = LowRank(CASE.lora_A, CASE.lora_B, 0.5)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        if through_op:
            y = torch.ops.fastlora.lora_linear(x, *CASE.weight, *flat)[0]
        else:
            y = ops.linear(x, CASE.weight, CASE.bias, update, "reference")
        (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        dx.sum().backward()


def test_backward_op_checks_its_operands() -> None:
    op = torch.ops.fastlora.lora_linear_backward
    tail = (*CASE.weight, CASE.lora_A, CASE.lora_B, *PLAIN)
    with pytest.raises(ValueError, match=r"dy must have shape \(\.\.\., 6\)"):
        op(CASE.dy[:, :5], CASE.x, None, *tail, True, False, "reference")
    with pytest.raises(TypeError, match="dA and dB need x, s and the adapter"):
        op(CASE.dy, CASE.x, None, *tail, True, True, "reference")
    with pytest.raises(ValueError, match="x and dy must have the same rows"):
        op(CASE.dy, CASE.x[:2], torch.zeros(2, 2), *tail, True, True, "reference")


def test_functional_refusals() -> None:
    with pytest.raises(TypeError, match="weight must be a Tensor or a QuantizedWeight, got list"):
        fastlora.lora_linear(CASE.x, [1.0])  # type: ignore[arg-type]
    column = fastlora.quantize_4bit(torch.ones(3, 1))
    with pytest.raises(ValueError, match="one column must have an even number of rows"):
        fastlora.lora_linear(torch.ones(2, 1), column)
