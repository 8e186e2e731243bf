"""Column scaling, sums over the weight, and dropout as an op of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastlora_kernels.formats import StoredWeight
from torch import Tensor

from fastlora import ops
from tests import contract
from tests.ops_cases import DTYPES, FORMATS, differentiated, gradients, make

SEED = torch.tensor([77])


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def columns(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return z, scale, bias and dy."""
    n = shape[-1]
    scale = torch.randn(n, dtype=wide(dtype))
    return (
        torch.randn(shape).to(dtype),
        scale,
        torch.randn(n).to(dtype),
        torch.randn(shape).to(dtype),
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_scale_columns_is_as_accurate_as_torch(dtype: torch.dtype, backend: str) -> None:
    def ours(z: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return ops.scale_columns(z, scale, bias, backend)

    def plain(z: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return (z * scale + bias).to(z.dtype)

    for shape in ((1, 7), (5, 64), (130, 257)):
        inputs = columns(shape, dtype)
        name = f"{shape} {dtype}"
        contract.check(name, differentiated(ours), differentiated(plain), inputs, reps=1)


def test_scale_columns_gradcheck() -> None:
    z, scale, bias, _ = columns((3, 5), torch.float64)
    leaves = tuple(t.requires_grad_() for t in (z, scale, bias))
    assert torch.autograd.gradcheck(lambda z, g, b: ops.scale_columns(z, g, b, "reference"), leaves)
    assert torch.autograd.gradcheck(
        lambda z, scale: ops.scale_columns(z, scale, None, "reference"), leaves[:2]
    )


@pytest.mark.parametrize("needs", range(8))
def test_every_combination_of_gradients(needs: int, backend: str) -> None:
    *inputs, dy = columns((4, 6), torch.float32)
    leaves = [t.clone().requires_grad_(bool(needs >> i & 1)) for i, t in enumerate(inputs)]
    z, scale, bias = leaves
    y = ops.scale_columns(z, scale, bias, backend)
    assert y.requires_grad == (needs > 0)
    if needs:
        y.backward(dy)
    full = [t.clone().requires_grad_() for t in inputs]
    ops.scale_columns(full[0], full[1], full[2], backend).backward(dy)
    for leaf, whole in zip(leaves, full, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, _given(whole.grad))


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_any_number_of_dimensions(lead: tuple[int, ...], backend: str) -> None:
    z, scale, bias, dy = columns((*lead, 6), torch.float32)
    leaves = [t.requires_grad_() for t in (z.mT if len(lead) > 1 else z, scale, bias)]
    z = leaves[0].mT if len(lead) > 1 else leaves[0]  # not contiguous
    y = ops.scale_columns(z, scale, bias, backend)
    assert y.shape == (*lead, 6)
    torch.testing.assert_close(y, z * scale + bias)
    y.backward(dy)
    assert _given(leaves[0].grad).shape == leaves[0].shape
    dropped = ops.drop(z, SEED, 0.5)
    assert dropped.shape == z.shape


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "float32"])
def test_sums_over_the_weight(
    dtype: torch.dtype, format: str, adapter: torch.dtype | None, backend: str
) -> None:
    for n, k in ((5, 64), (40, 33)):
        case = make(1, n, k, 9, dtype, format)
        exact = case.dense().double()

        def sums(a: Tensor, weight: StoredWeight = case.weight, size: Any = (n, k)) -> Any:
            squares = ops.weight_squares(weight, size[0], size[1], dtype, backend)
            return ops.weight_dots(a, weight, dtype, backend), squares

        a = case.lora_A.to(adapter or dtype)
        dots, squares = sums(a)
        assert dots.dtype == squares.dtype == torch.float32
        torch.testing.assert_close(dots.double(), a.double() @ exact.t(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(squares.double(), exact.square().sum(1), rtol=1e-6, atol=1e-6)
        for first, again in zip((dots, squares), sums(a), strict=True):
            assert torch.equal(first, again)


def test_sums_have_no_gradient(backend: str) -> None:
    case = make(1, 5, 32, 3, torch.float32, "dense")
    weight = case.weight._replace(data=case.weight.data.clone().requires_grad_())
    dots = ops.weight_dots(case.lora_A.requires_grad_(), weight, torch.float32, backend)
    squares = ops.weight_squares(weight, 5, 32, torch.float32, backend)
    assert not dots.requires_grad and not squares.requires_grad


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
def test_drop_keeps_the_share_and_the_mean(dtype: torch.dtype) -> None:
    x = torch.ones(300, 400, dtype=dtype, requires_grad=True)
    y = ops.drop(x, SEED, 0.2)
    kept = y != 0
    assert abs(kept.float().mean().item() - 0.8) < 0.01
    assert torch.equal(y[kept], torch.full_like(y[kept], 1.25))
    y.backward(torch.ones_like(y))
    assert torch.equal(_given(x.grad), y.detach())
    assert torch.equal(ops.drop(x, SEED, 0.2), y)
    assert not torch.equal(ops.drop(x, SEED + 1, 0.2), y)


def test_drop_gradcheck() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.drop(x, SEED, 0.4), (x,))
    assert torch.autograd.gradgradcheck(lambda x: ops.drop(x, SEED, 0.4), (x,))


def test_a_new_seed_every_time_reproducible_by_the_generator() -> None:
    x = torch.zeros(1)
    torch.manual_seed(5)
    first, second = ops.dropout_seed(x), ops.dropout_seed(x)
    torch.manual_seed(5)
    assert first.dtype == torch.int64 and first.shape == (1,)
    assert torch.equal(ops.dropout_seed(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_opcheck(format: str, backend: str) -> None:
    z, scale, bias, dy = columns((4, 6), torch.float32)
    library: Any = torch.ops.fastlora
    for leaf in (z, scale, bias):
        leaf.requires_grad_()
    for shift in (bias, None):
        torch.library.opcheck(library.scale_columns.default, (z, scale, shift, backend))
    for needs in ((True, True), (True, False), (False, True)):
        given = (dy, z.detach(), scale.detach(), *needs, backend)
        torch.library.opcheck(library.scale_columns_backward.default, given)
    case = make(1, 6, 33, 3, torch.bfloat16, format)
    rest = (*case.weight, torch.bfloat16, backend)
    torch.library.opcheck(library.weight_dots.default, (case.lora_A, *rest))
    parts = (*case.weight, 33, torch.bfloat16, backend)
    torch.library.opcheck(library.weight_squares.default, parts)
    torch.library.opcheck(library.drop.default, (z, SEED, 0.3))


def test_compile_without_breaks(backend: str) -> None:
    case = make(4, 6, 32, 3, torch.float32, "nf4")

    def run(z: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        dots = ops.weight_dots(case.lora_A, case.weight, torch.float32, backend)
        squares = ops.weight_squares(case.weight, 6, 32, torch.float32, backend)
        z = ops.drop(z, SEED, 0.3) + dots.sum(0)
        return ops.scale_columns(z, scale * squares, bias, backend)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for rows in (4, 3, 5):
        inputs = columns((rows, 6), torch.float32)[:3]
        for ours, eager in zip(gradients(compiled, *inputs), gradients(run, *inputs), strict=True):
            assert torch.equal(ours, eager)
    torch._dynamo.reset()


GOOD: dict[str, Any] = {"z": torch.zeros(3, 6), "scale": torch.ones(6), "bias": torch.zeros(6)}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"z": torch.zeros(3, 6).int()}, TypeError, "z must be float32, bfloat16 or float16"),
    ({"z": torch.tensor(1.0)}, ValueError, r"z must have shape \(\.\.\., N\) and scale \(N,\)"),
    ({"scale": torch.ones(5)}, ValueError, r"got \(3, 6\) and \(5,\)"),
    ({"scale": torch.ones(6).half()}, TypeError, "scale must be torch.float32 for z of"),
    ({"scale": torch.ones(6, device="meta")}, ValueError, "all operands must be on one device"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(6,\)"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "kind", "sentence"), BAD, ids=[b[2][:30] for b in BAD])
def test_bad_operands_of_scale_columns(
    change: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        ops.scale_columns(**(GOOD | change))


def test_bad_operands_of_the_sums_and_of_drop() -> None:
    case = make(1, 6, 32, 3, torch.float32, "nf4")
    dense = make(1, 6, 32, 3, torch.float32, "dense").weight
    with pytest.raises(ValueError, match=r"a must have shape \(R, K\), got \(32,\)"):
        ops.weight_dots(case.lora_A[0], case.weight, torch.float32)
    with pytest.raises(TypeError, match=r"a must be float32 or torch.bfloat16 like the weight"):
        ops.weight_dots(case.lora_A.half(), case.weight, torch.bfloat16)
    with pytest.raises(TypeError, match=r"dtype must be that of a dense weight, torch.float32"):
        ops.weight_dots(case.lora_A, dense, torch.bfloat16)
    with pytest.raises(TypeError, match=r"a weight decodes to float32, .*got torch.int8"):
        ops.weight_squares(case.weight, 6, 32, torch.int8)
    with pytest.raises(ValueError, match="the weight must have n = 5 rows, got 6"):
        ops.weight_squares(case.weight, 5, 32, torch.float32)
    with pytest.raises(ValueError, match=r"dropout must be at least 0 and below 1, got 1.5"):
        ops.drop(case.x, SEED, 1.5)
    with pytest.raises(ValueError, match="x must have at least one dimension"):
        ops.drop(torch.tensor(1.0), SEED, 0.5)
    with pytest.raises(TypeError, match=r"x must be float32, bfloat16 or float16, got torch.int64"):
        ops.drop(SEED, SEED, 0.5)


def test_second_derivative_of_scale_columns_is_refused() -> None:
    z, scale, bias, _ = columns((3, 5), torch.float32)
    y = ops.scale_columns(z.requires_grad_(), scale, bias, "reference")
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(y.sin().sum(), z, create_graph=True)
