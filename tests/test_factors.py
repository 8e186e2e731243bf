"""The factors of adapters: products, norms, stacks and spans, in exact arithmetic."""

from __future__ import annotations

import pytest
import torch
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora import factors, ops
from fastlora.factors import (
    hada_factors,
    kron_factors,
    kron_product,
    row_norms,
)
from fastlora.kron import Factor, best_order, rank_form
from fastlora.multi import grouping, permuted, spans_of, stack_adapters
from tests.ops_cases import FORMATS, make

Shape = tuple[int, int]


def normal(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def pair(rows: int, r: int, columns: int) -> tuple[Tensor, Tensor]:
    return normal(rows, r), normal(r, columns)


def whole(w: Factor) -> Tensor:
    return w if isinstance(w, Tensor) else w[0] @ w[1]


def leaves_of(*factors: Factor) -> list[Tensor]:
    return [t for w in factors for t in ((w,) if isinstance(w, Tensor) else w)]


def same_gradients(ours: Tensor, exact: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, exact)
    g = torch.randn_like(exact)
    mine, theirs = (torch.autograd.grad(y, leaves, g) for y in (ours, exact))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sizes", [(5, 7, 3, 2), (1, 1, 1, 1), (16, 8, 4, 4), (3, 12, 1, 5)])
def test_hada_factors_make_the_product_of_products(sizes: tuple[int, ...]) -> None:
    n, k, r1, r2 = sizes
    parts = (*pair(n, r1, k), *pair(n, r2, k))
    A, B = hada_factors(*parts)
    assert A.shape == (r1 * r2, k) and B.shape == (n, r1 * r2)
    assert A.is_contiguous() and B.is_contiguous()
    same_gradients(B @ A, (parts[0] @ parts[1]) * (parts[2] @ parts[3]), list(parts))


def test_gradients_of_the_factors_are_differentiable() -> None:
    parts = (*pair(3, 2, 4), *pair(3, 2, 4))
    assert torch.autograd.gradcheck(hada_factors, parts)
    assert torch.autograd.gradgradcheck(hada_factors, parts)

    def factors(w1: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        given = kron_factors(w1, (a, b))
        assert given is not None
        return given

    leaves = (normal(2, 3), *pair(4, 2, 5))
    assert torch.autograd.gradcheck(factors, leaves)
    assert torch.autograd.gradgradcheck(factors, leaves)


# (n1, k1), rank of w1 or 0, (n2, k2), rank of w2 or 0, and the form that costs least
KRON: list[tuple[Shape, int, Shape, int, str | None]] = [
    ((4, 4), 0, (8, 8), 2, "columns"),
    ((2, 5), 0, (9, 4), 3, "rows"),
    ((5, 2), 0, (4, 9), 3, "columns"),
    ((4, 6), 2, (7, 8), 2, "both"),
    ((1, 1), 0, (6, 10), 2, "columns"),
    ((4, 6), 2, (7, 8), 0, None),
    ((4, 6), 0, (7, 8), 0, None),
    ((8, 8), 0, (2, 3), 1, "columns"),
    ((9, 9), 0, (2, 3), 1, None),  # rank 9 > 8 r^2
]


@pytest.mark.parametrize("case", KRON, ids=str)
def test_kron(case: tuple[Shape, int, Shape, int, str | None]) -> None:
    (n1, k1), r1, (n2, k2), r2, kind = case
    w1: Factor = pair(n1, r1, k1) if r1 else normal(n1, k1)
    w2: Factor = pair(n2, r2, k2) if r2 else normal(n2, k2)
    form, leaves = rank_form(w1, w2), leaves_of(w1, w2)
    assert (None if form is None else form[1]) == kind
    factors = kron_factors(w1, w2)
    assert (factors is None) == (form is None)
    if factors is not None and form is not None:
        A, B = factors
        assert A.shape == (form[0], k1 * k2) and B.shape == (n1 * n2, form[0])
        assert A.is_contiguous() and B.is_contiguous()
        same_gradients(B @ A, torch.kron(whole(w1), whole(w2)), leaves)
    for lead in ((), (3,), (0,), (2, 3)):
        x = normal(*lead, k1 * k2)
        exact = x @ torch.kron(whole(w1), whole(w2)).t()
        same_gradients(kron_product(x, w1, w2), exact, [x, *leaves])


def test_the_rank_form_of_pefts_default_shapes() -> None:
    """LoKr of rank 8 with factor 8 at 2048 x 2048: rank 64, as LoHa; large w1: the vec trick."""
    meta = {"device": "meta"}

    def of(n1: int, n2: int, r: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        w2 = (torch.empty(n2, r, **meta), torch.empty(r, n2, **meta))  # type: ignore[call-overload]
        return torch.empty(n1, n1, **meta), w2  # type: ignore[call-overload]

    assert rank_form(*of(8, 256, 8)) == (64, "columns")
    assert rank_form(*of(32, 64, 8)) is None


def test_the_order_of_the_vec_trick_is_the_cheapest() -> None:
    w1, w2 = normal(50, 50), pair(60, 3, 40)
    flops, order = best_order(w1, w2)
    assert order == (1, 0, 1)  # down to rank 3, then w1, then up
    assert flops == 2 * (3 * 40 * 50 + 50 * 50 * 3 + 60 * 3 * 50)
    assert best_order(normal(2, 50), w2)[1] == (0, 1, 1)


@pytest.fixture(params=["native", "torch"])
def last_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What puts the sums of `row_norms` together: the C++ library, or torch as on a GPU."""
    if request.param == "torch":
        monkeypatch.setattr(factors, "native_takes", lambda *arguments: False)


@pytest.mark.usefixtures("last_step")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_row_norms(format: str, size: float, backend: str) -> None:
    """As near to float64 as torch's norm of the float32 sum, however large the update is."""
    n, k, r = 200, 320, 5
    for dtype in (torch.float32, torch.bfloat16):
        case = make(1, n, k, r, dtype, format)
        update = LowRank(case.lora_A * size, case.lora_B * 10, 0.7)
        squares = ops.weight_squares(case.weight, n, k, dtype, backend)
        norms = row_norms(case.weight, n, k, squares, update, dtype, backend)
        delta = update.B.double() @ update.A.double() * 0.7
        exact = (case.dense().double() + delta).norm(dim=1)
        plain = (case.dense().float() + update.B @ update.A * 0.7).norm(dim=1)
        assert norms.dtype == torch.float32 and not norms.requires_grad
        error, usual = ((v.double() / exact - 1).abs() for v in (norms, plain))
        assert error.square().mean().sqrt() <= 1.25 * usual.square().mean().sqrt() + 2**-24
        assert error.max() <= 2 * usual.max() + 2**-24


def test_row_norms_in_float64() -> None:
    case = make(1, 9, 32, 3, torch.float64, "dense")
    update = LowRank(case.lora_A.double(), case.lora_B.double(), 0.7)
    squares = ops.weight_squares(case.weight, 9, 32, torch.float64, "reference")
    norms = row_norms(case.weight, 9, 32, squares, update, torch.float64, "reference")
    exact = (case.dense() + 0.7 * update.B @ update.A).norm(dim=1)
    torch.testing.assert_close(norms, exact, rtol=1e-14, atol=0)


@pytest.mark.usefixtures("last_step")
def test_row_norms_where_the_update_cancels_the_weight() -> None:
    """Of a row that vanishes nothing is left but rounding: small, and not NaN."""
    case = make(1, 6, 32, 6, torch.float32, "dense")
    A, B = torch.linalg.qr(case.dense().t())[0].t(), None
    B = -case.dense() @ A.t()
    squares = ops.weight_squares(case.weight, 6, 32, torch.float32, "reference")
    update = LowRank(A.contiguous(), B.contiguous(), 1.0)
    norms = row_norms(case.weight, 6, 32, squares, update, torch.float32, "reference")
    assert torch.isfinite(norms).all()
    assert (norms < 2e-3 * squares.sqrt()).all()


@pytest.mark.parametrize("scaling", [(2.0, 2.0, 2.0), (2.0, 0.3, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_stacked_adapters_are_their_sum(scaling: tuple[float, ...], dtype: torch.dtype) -> None:
    parts = [(torch.randn(r, 9).to(dtype), torch.randn(7, r).to(dtype)) for r in (2, 1, 4)]
    update = stack_adapters([a for a, _ in parts], [b for _, b in parts], scaling)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert update.A.dtype == (dtype if len(set(scaling)) == 1 else wide)
    total = sum(s * b.double() @ a.double() for s, (a, b) in zip(scaling, parts, strict=True))
    assert isinstance(total, Tensor)
    ours = update.scaling * update.B.double() @ update.A.double()
    torch.testing.assert_close(ours, total, rtol=1e-6, atol=1e-6)


def test_spans_of_ids() -> None:
    ids = torch.tensor([2, -1, 0, 1, 2])
    expected = [[3, 7], [0, 0], [0, 2], [2, 3], [3, 7]]
    for given in (ids, ids.int()):
        spans = spans_of([2, 1, 4], given)
        assert spans.dtype == torch.int32 and spans.tolist() == expected
    assert spans_of([2], ids[:0]).shape == (0, 2)


def test_constants_of_inference_mode_serve_training() -> None:
    """What is kept between calls is no inference tensor, which autograd would refuse."""

    def run() -> Tensor:
        A, B = [torch.ones(3, 4)] * 2, [torch.ones(5, 3, requires_grad=True)] * 2
        return stack_adapters(A, B, (0.123, 0.456)).B.sum()

    with torch.inference_mode():
        run()
    run().backward()


def test_grouping_of_ids() -> None:
    mixed = torch.tensor([2, 0, 2, -1, 0, 2, 1, 0])
    order = grouping(mixed, 1, 3)
    assert order is not None and mixed[order].tolist() == [-1, 0, 0, 0, 1, 2, 2, 2]
    assert order.tolist() == [3, 1, 4, 7, 6, 0, 2, 5]  # as they come, within an adapter
    assert grouping(mixed[order], 1, 3) is None
    assert grouping(mixed, 64, 3) is None  # blocks of rows as they are
    assert grouping(mixed[:1], 1, 3) is None and grouping(mixed, 0, 3) is None


def test_permuting_there_and_back() -> None:
    x, order = normal(8, 2, 3), torch.randperm(8)
    back = order.argsort()
    there = permuted(x, order, back)
    assert torch.equal(there, x[order])
    assert torch.equal(permuted(there, back, order), x)
    assert torch.autograd.gradcheck(lambda x: permuted(x, order, back), (x,))
