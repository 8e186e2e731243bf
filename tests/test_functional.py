"""The public functions: the contract of every op, format, dtype and backend, and gradcheck."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastlora_kernels.low_rank import LowRank, keep_mask, keep_scale
from torch import Tensor
from torch.nn import functional

import fastlora
from fastlora import QuantizedWeight
from fastlora.kron import Factor
from fastlora.multi import stack_adapters
from tests import contract
from tests.ops_cases import (
    DTYPES,
    FORMATS,
    dense_update,
    differentiated,
    low_rank_update,
    public_weight,
    unfused,
)

SCALING = 0.6
SEED = torch.tensor([2**33 + 1])
Weight = Tensor | QuantizedWeight
Call = Callable[..., Tensor]
# name -> parameters for (n, k); ours from (x, weight, bias, *parameters); the update or the output
# of plain torch from (x, dense, bias, *parameters)
OPS: dict[str, tuple[Callable[[int, int], list[Tensor]], Call, Call]] = {}


def case(name: str, shapes: Callable[[int, int], list[Any]]) -> Callable[[Any], Any]:
    """Register a pair (ours, plain) with the shapes and sizes of its parameters."""

    def add(make: Callable[[], tuple[Call, Call]]) -> Callable[[], tuple[Call, Call]]:
        def values(n: int, k: int) -> list[Tensor]:
            return [torch.randn(shape) * size for shape, size in shapes(n, k)]

        OPS[name] = (values, *make())
        return make

    return add


def dropped(x: Tensor, dtype: torch.dtype, dropout: float) -> Tensor:
    x = x.to(dtype)
    if not dropout:
        return x
    return x * keep_mask(SEED, x.shape[0], x.shape[1], dropout) * keep_scale(dropout)


def lora_case(dropout: float) -> tuple[Call, Call]:
    given: dict[str, Any] = {"dropout": dropout, "seed": SEED} if dropout else {}

    def ours(x: Tensor, w: Weight, bias: Tensor, A: Tensor, B: Tensor, backend: str) -> Tensor:
        return fastlora.lora_linear(x, w, bias, A, B, SCALING, **given, backend=backend)

    def plain(x: Tensor, w: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        seed = SEED if dropout else None
        return unfused(x, w, bias, low_rank_update(x, LowRank(A, B, SCALING, dropout, seed)))

    return ours, plain


for _dropout in (0.0, 0.4):
    case(f"lora, dropout {_dropout}", lambda n, k: [((5, k), 0.1), ((n, 5), 0.3)])(
        functools.partial(lora_case, _dropout)
    )


def hada_case(dropout: float) -> tuple[Call, Call]:
    given: dict[str, Any] = {"dropout": dropout, "seed": SEED} if dropout else {}

    def ours(x: Tensor, w: Weight, bias: Tensor, *rest: Any) -> Tensor:
        a1, b1, a2, b2, backend = rest
        return fastlora.hada_linear(x, w, bias, a1, b1, a2, b2, SCALING, **given, backend=backend)

    def plain(x: Tensor, w: Tensor, bias: Tensor, *p: Tensor) -> Tensor:
        delta = (p[0] @ p[1]) * (p[2] @ p[3])
        return unfused(x, w, bias, dense_update(dropped(x, p[0].dtype, dropout), delta, SCALING))

    return ours, plain


for _dropout in (0.0, 0.4):
    case(
        f"hada, dropout {_dropout}",
        lambda n, k: [((n, 3), 0.4), ((3, k), 0.4), ((n, 4), 0.4), ((4, k), 0.4)],
    )(functools.partial(hada_case, _dropout))


def kron_case(halves: tuple[int, int], dropout: float) -> tuple[Call, Call]:
    given: dict[str, Any] = {"dropout": dropout, "seed": SEED} if dropout else {}

    def split(p: tuple[Tensor, ...]) -> tuple[Factor, Factor]:
        first, second = p[: halves[0]], p[halves[0] :]
        w1: Factor = first[0] if len(first) == 1 else (first[0], first[1])
        return w1, (second[0] if len(second) == 1 else (second[0], second[1]))

    def ours(x: Tensor, w: Weight, bias: Tensor, *rest: Any) -> Tensor:
        *p, backend = rest
        w1, w2 = split(tuple(p))
        return fastlora.kron_linear(x, w, bias, w1, w2, SCALING, **given, backend=backend)

    def plain(x: Tensor, w: Tensor, bias: Tensor, *p: Tensor) -> Tensor:
        w1, w2 = (f if isinstance(f, Tensor) else f[0] @ f[1] for f in split(p))
        x_kept = dropped(x, p[0].dtype, dropout)
        return unfused(x, w, bias, dense_update(x_kept, torch.kron(w1, w2), SCALING))

    return ours, plain


def kron_shapes(halves: tuple[int, int], n: int, k: int) -> list[Any]:
    n1, k1 = 4, 2
    n2, k2 = n // n1, k // k1
    first = [((n1, k1), 0.6)] if halves[0] == 1 else [((n1, 2), 0.6), ((2, k1), 0.6)]
    return first + ([((n2, k2), 0.3)] if halves[1] == 1 else [((n2, 3), 0.4), ((3, k2), 0.4)])


for _halves in ((1, 1), (1, 2), (2, 1), (2, 2)):
    for _dropout in (0.0, 0.4):
        _shapes = functools.partial(kron_shapes, _halves)
        _make = functools.partial(kron_case, _halves, _dropout)
        case(f"kron {_halves}, dropout {_dropout}", _shapes)(_make)


@case("dora", lambda n, k: [((5, k), 0.1), ((n, 5), 0.3), ((n,), 1.0)])
def dora_case() -> tuple[Call, Call]:
    def ours(x: Tensor, w: Weight, bias: Tensor, *rest: Any) -> Tensor:
        A, B, magnitude, backend = rest
        return fastlora.dora_linear(x, w, bias, A, B, magnitude, SCALING, backend=backend)

    def plain(x: Tensor, w: Tensor, bias: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        norm = (w.to(A.dtype) + SCALING * B @ A).norm(dim=1).detach()
        update = functional.linear(functional.linear(x.to(A.dtype), A), B) * SCALING
        return unfused(x, w, bias, update, m / norm)

    return ours, plain


RANKS, SCALINGS = (8, 5, 16), (0.5, 0.7, 1.1)


def multi_shapes(n: int, k: int) -> list[Any]:
    return [((r, k), 0.1) for r in RANKS] + [((n, r), 0.3) for r in RANKS]


def some_ids(m: int) -> Tensor:
    return torch.randint(-1, len(RANKS), (m,), generator=torch.Generator().manual_seed(m))


@case("multi", multi_shapes)
def multi_case() -> tuple[Call, Call]:
    def ours(x: Tensor, w: Weight, bias: Tensor, *rest: Any) -> Tensor:
        *p, backend = rest
        ids = some_ids(x.shape[0])
        return fastlora.multi_lora_linear(x, w, bias, p[:3], p[3:], SCALINGS, ids, backend=backend)

    def plain(x: Tensor, w: Tensor, bias: Tensor, *p: Tensor) -> Tensor:
        ids, wide = some_ids(x.shape[0]), x.to(p[0].dtype)
        update = sum(
            functional.linear(functional.linear(wide, p[i]), p[i + 3])
            * (ids == i).unsqueeze(1)
            * SCALINGS[i]
            for i in range(len(RANKS))
        )
        assert isinstance(update, Tensor)
        return unfused(x, w, bias, update)

    return ours, plain


def operands(name: str, m: int, n: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    """Return x, bias, the parameters in float32, and dy."""
    torch.manual_seed(m + n + k)
    params = OPS[name][0](n, k)
    return [torch.randn(m, k).to(dtype), torch.randn(n).to(dtype), *params,
            torch.randn(m, n).to(dtype)]  # fmt: skip


def both(name: str, format: str, backend: str, dense: Tensor) -> tuple[contract.Op, contract.Op]:
    """Return ours and plain torch's, from (x, bias, *parameters, dy) to y and gradients."""
    weight, values = public_weight(format, dense)
    _, ours, plain = OPS[name]

    def run(x: Tensor, bias: Tensor, *params: Tensor) -> Tensor:
        return ours(x, weight, bias, *params, backend)

    def usual(x: Tensor, bias: Tensor, *params: Tensor) -> Tensor:
        return plain(x, values.to(x.dtype), bias, *params)

    return differentiated(run), differentiated(usual)


def large(op: contract.Op) -> contract.Op:
    """Return the op without gradients of a handful of values, whose error is luck."""
    return lambda *inputs: tuple(t for i, t in enumerate(op(*inputs)) if i < 3 or t.numel() >= 64)


FACTORS = {"native": (contract.RMS_FACTOR, contract.MAX_FACTOR), "reference": (2.0, 3.0)}


def hold_contract(name: str, format: str, backend: str, dense: Tensor, inputs: Any) -> None:
    """Assert that y, dx, dbias and the parameters' gradients are as near to float64 as torch's.

    torch's path makes the N x K update. Ours sums in another order, over the rank, so that the
    rounding of a float32 parameter's gradient is another: it is held to that of the same sums in
    plain torch, the reference backend, and to 16 roundings of its size beyond the N x K path's.
    """
    ours, plain = both(name, format, backend, dense)
    same_sums, _ = both(name, format, "reference", dense)
    label = f"{name} {tuple(inputs[-1].shape)} {dense.dtype} {format}"
    op, sums, truth = large(ours), large(same_sums), large(plain)
    contract.check(label, op, sums, inputs, truth=truth, reps=1)
    doubles = [t.double() for t in inputs]
    results = zip(ours(*inputs), plain(*inputs), plain(*doubles), strict=True)
    for i, (mine, usual, exact) in enumerate(results):
        if i > 2 and name.startswith(("hada", "kron")):
            error, theirs = (contract.rms(t.double() - exact) for t in (mine, usual))
            roundings = 16 if mine.numel() >= 64 else 64  # the error of a handful is luck
            few = roundings * torch.finfo(mine.dtype).eps * contract.rms(exact)
            assert error <= 1.25 * theirs + few, (
                f"{label}[{i}]: {error:.3e}, {theirs:.3e}, {few:.3e}"
            )
            continue
        # The definition's sums are BLAS's, whose order depends on shapes and on the processor, and
        # it rounds DoRA's sum once more before the magnitude's gradient is taken.
        contract.compare(f"{label}[{i}]", mine, usual, exact, *FACTORS[backend])


KINDS = [(dtype, format) for dtype in DTYPES for format in FORMATS] + [(torch.float16, "nf4")]


@pytest.mark.parametrize(("dtype", "format"), KINDS, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_contract(name: str, dtype: torch.dtype, format: str, backend: str) -> None:
    m, n, k = (64, 260, 96) if format == "nf4" else (60, 48, 70)
    dense = (torch.randn(n, k) * 0.1).to(dtype)
    hold_contract(name, format, backend, dense, operands(name, m, n, k, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_parameters_in_the_dtype_of_x(name: str, dtype: torch.dtype, backend: str) -> None:
    inputs = [t.to(dtype) for t in operands(name, 64, 132, 128, dtype)]
    hold_contract(name, "nf4", backend, (torch.randn(132, 128) * 0.1).to(dtype), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_one_token(name: str, dtype: torch.dtype, backend: str) -> None:
    x, bias, *params, _ = inputs = operands(name, 1, 96, 128, dtype)
    weight, values = public_weight("nf4", (torch.randn(96, 128) * 0.1).to(dtype))
    _, ours, plain = OPS[name]
    y, usual = ours(x, weight, bias, *params, backend), plain(x, values, bias, *params)
    doubles = [t.double() for t in inputs[:-1]]
    exact = plain(doubles[0], values.double(), *doubles[1:])
    contract.compare(name, y, usual, exact)


@pytest.mark.parametrize("name", OPS)
def test_gradcheck_of_the_definition(name: str) -> None:
    x, bias, *params, _ = (t.double() for t in operands(name, 5, 8, 6, torch.float64))
    if name == "dora":
        return _dora_gradcheck(x, bias, params)
    weight, (_, ours, _) = torch.randn(8, 6, dtype=torch.float64), OPS[name]
    leaves = tuple(t.requires_grad_() for t in (x, bias, *params))
    assert torch.autograd.gradcheck(lambda x, b, *p: ours(x, weight, b, *p, "reference"), leaves)


def _dora_gradcheck(x: Tensor, bias: Tensor, params: list[Tensor]) -> None:
    """The norm is a constant to the gradient, so that it must be one to the differences too."""
    weight, (A, B, magnitude) = torch.randn(8, 6, dtype=torch.float64), params
    norms = (weight + SCALING * B @ A).norm(dim=1)
    leaves = tuple(t.requires_grad_() for t in (x, bias, A, B, magnitude))

    def run(x: Tensor, bias: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        rest: dict[str, Any] = {"norms": norms, "backend": "reference"}
        return fastlora.dora_linear(x, weight, bias, A, B, m, SCALING, **rest)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("name", OPS)
def test_any_layout_and_number_of_rows(name: str, backend: str) -> None:
    """x of more dimensions, not contiguous, or without rows."""
    for lead in ((2, 3), (0,), (4, 0)):
        m = torch.Size(lead).numel()
        x, bias, *params, _ = operands(name, m, 24, 32, torch.float32)
        weight = fastlora.quantize_4bit(torch.randn(24, 32))
        ours = OPS[name][1]
        rows = ours(x, weight, bias, *params, backend)
        if name == "multi":
            continue
        spread = torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0].view(*lead, 32)
        leaves = [spread.requires_grad_(), *(p.requires_grad_() for p in params)]
        y = ours(leaves[0], weight, bias, *leaves[1:], backend)
        assert y.shape == (*lead, 24)
        torch.testing.assert_close(y.reshape(m, 24), rows)
        y.sum().backward()
        assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("name", [name for name in OPS if name != "multi"])
def test_any_layout_of_parameters(name: str, backend: str) -> None:
    x, bias, *params, _ = operands(name, 5, 24, 32, torch.float32)
    weight, found = torch.randn(24, 32), []
    for turned in (False, True):
        leaves = [(p.t().contiguous().t() if turned else p).detach() for p in params]
        y = OPS[name][1](x, weight, bias, *[p.requires_grad_() for p in leaves], backend)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_ids_of_rows_sequences_and_tokens(backend: str) -> None:
    x, bias, *params, _ = operands("multi", 6, 24, 32, torch.float32)
    weight = fastlora.quantize_4bit(torch.randn(24, 32))

    def run(x: Tensor, ids: Tensor) -> Tensor:
        rest: dict[str, Any] = {"backend": backend}
        given = (params[:3], params[3:], SCALINGS)
        return fastlora.multi_lora_linear(x, weight, bias, *given, ids, **rest)

    ids = torch.tensor([2, 2, 2, -1, -1, -1])
    rows = run(x, ids)
    assert torch.equal(run(x.view(2, 3, 32), ids.view(2, 3)).view(6, 24), rows)
    assert torch.equal(run(x.view(2, 3, 32), torch.tensor([2, -1])).view(6, 24), rows)
    assert torch.equal(run(x.view(2, 3, 32), torch.tensor([2, -1]).int()).view(6, 24), rows)
    alone = fastlora.lora_linear(x[0], weight, bias, params[2], params[5], SCALINGS[2],
                                 backend=backend)  # fmt: skip
    torch.testing.assert_close(run(x[0], torch.tensor(2)), alone)
    assert run(x.view(2, 3, 32)[:0], ids[:0]).shape == (0, 3, 24)
    base = fastlora.lora_linear(x[3:], weight, bias, backend=backend)
    torch.testing.assert_close(rows[3:], base)


def test_unsorted_ids_are_a_permutation_of_sorted_ones(backend: str) -> None:
    x, bias, *params, dy = operands("multi", 50, 24, 32, torch.float32)
    weight = fastlora.quantize_4bit(torch.randn(24, 32))
    ids = some_ids(50)
    results = []
    for order in (torch.arange(50), ids.argsort(stable=True)):
        leaves = [t.detach().clone().requires_grad_() for t in (x[order], *params)]
        rest: dict[str, Any] = {"backend": backend}
        given = (leaves[1:4], leaves[4:], SCALINGS, ids[order])
        y = fastlora.multi_lora_linear(leaves[0], weight, bias, *given, **rest)
        grads = torch.autograd.grad(y, leaves, dy[order])
        back = order.argsort()
        results.append((y[back], grads[0][back], *grads[1:]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_new_seed_each_call(backend: str) -> None:
    x, bias, A, B, _ = operands("lora, dropout 0.4", 6, 24, 32, torch.float32)
    weight = torch.randn(24, 32)

    def run(**given: Any) -> Tensor:
        return fastlora.lora_linear(x, weight, bias, A, B, SCALING, **given, backend=backend)

    torch.manual_seed(4)
    first, second = run(dropout=0.5), run(dropout=0.5)
    torch.manual_seed(4)
    assert torch.equal(run(dropout=0.5), first) and not torch.equal(first, second)
    assert torch.equal(run(dropout=0.5, seed=SEED), run(dropout=0.5, seed=SEED))
    assert torch.equal(run(seed=SEED), run())


def test_takes_tensor_and_quantized_weight(backend: str) -> None:
    x, bias, A, B, _ = operands("lora, dropout 0.4", 5, 24, 32, torch.float32)
    dense = torch.randn(24, 32)
    quantized = fastlora.quantize_4bit(dense)
    y = fastlora.lora_linear(x, quantized, bias, A, B, 0.5, backend=backend)
    same = fastlora.lora_linear(x, quantized.dequantize(), bias, A, B, 0.5, backend=backend)
    torch.testing.assert_close(y, same)
    plain = fastlora.lora_linear(x, dense, backend="reference")
    assert torch.equal(plain, functional.linear(x, dense))


def test_known_norms_are_taken(backend: str) -> None:
    x, bias, A, B, magnitude, _ = operands("dora", 5, 24, 32, torch.float32)
    weight = torch.randn(24, 32)
    norms = (weight + SCALING * B @ A).norm(dim=1)
    rest: dict[str, Any] = {"backend": backend}
    given = (x, weight, bias, A, B, magnitude, SCALING)
    computed = fastlora.dora_linear(*given, **rest)
    torch.testing.assert_close(fastlora.dora_linear(*given, norms=norms, **rest), computed)
    half = fastlora.dora_linear(*given, norms=2 * norms, **rest)
    torch.testing.assert_close(2 * (half - bias), computed - bias)


def test_one_adapter_of_many_is_that_adapter() -> None:
    """Equal scalings are not folded into B, which keeps its dtype and its bits."""
    a, b = torch.randn(3, 8).bfloat16(), torch.randn(5, 3).bfloat16()
    update = stack_adapters([a, a], [b, b], [0.3, 0.3])
    assert update.scaling == 0.3 and torch.equal(update.B, torch.cat([b, b], 1))
