"""LoKr's update as two small matmuls around the base, the vec trick, and what each form costs.

With x as k1 rows of k2 values, ``kron(w1, w2) x`` is ``w1 x w2^T``: a factor, or each half of a
factor that is a product of two, is one matmul along one of the two dimensions. They may be done in
any order that keeps the halves of a factor in theirs; the cheapest is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.native_library import DTYPES, isa
from torch import Tensor

from fastlora import ops
from fastlora.ops.library import is_plain, no_autocast
from fastlora.ops.products import is_built

Factor = Tensor | tuple[Tensor, Tensor]
Shape = tuple[int, int]
# What the passes of the vec trick over x and y cost, in flops per element of them: x is read and
# cast once more, the update is written, read and added.
PASSES = 256
NATIVE_PASSES = 32  # of the C++ kernel, where products of low rank have no matrix unit
MOST_NUMBERS = 1 << 15  # of the factors that the kernel takes: its sums fit in a core's cache


def shape_of(w: Factor) -> Shape:
    """Return (rows, columns) of a factor."""
    left, right = (w, w) if isinstance(w, Tensor) else w
    return left.shape[0], right.shape[1]


def halves(w: Factor) -> tuple[Tensor, ...]:
    """Return the matrices of a factor in the order in which they are applied."""
    return (w,) if isinstance(w, Tensor) else (w[1], w[0])


def _orders(first: int, second: int) -> Iterator[tuple[int, ...]]:
    """Yield every order of `first` matmuls along dimension 0 and `second` along dimension 1."""
    if not first or not second:
        yield (0,) * first + (1,) * second
        return
    yield from ((0, *rest) for rest in _orders(first - 1, second))
    yield from ((1, *rest) for rest in _orders(first, second - 1))


def best_order(w1: Factor, w2: Factor) -> tuple[int, tuple[int, ...]]:
    """Return (flops per token, the dimension of each matmul) of the cheapest vec trick."""
    parts = [[tuple(half.shape) for half in halves(w)] for w in (w1, w2)]

    def flops(order: tuple[int, ...]) -> int:
        size, done, total = [shape_of(w1)[1], shape_of(w2)[1]], [0, 0], 0
        for dim in order:
            rows, columns = parts[dim][done[dim]]
            total += 2 * rows * columns * size[1 - dim]
            size[dim] = rows
            done[dim] += 1
        return total

    return min([(flops(order), order) for order in _orders(len(parts[0]), len(parts[1]))])


def _along_columns(y: Tensor, w: Tensor) -> Tensor:
    """Return ``y w^T`` for y (M, a, b); always one matmul, with or without a gradient."""
    m, a, b = y.shape
    return (y.reshape(m * a, b) @ w.t()).view(m, a, w.shape[0])


def _along_rows(y: Tensor, w: Tensor) -> Tensor:
    """Return ``w y`` for y (M, a, b)."""
    return _along_columns(y.transpose(1, 2), w).transpose(1, 2)


def kron_product(x: Tensor, w1: Factor, w2: Factor) -> Tensor:
    """Return ``x kron(w1, w2)^T``, computed in the dtype of the factors.

    Args:
        x: (..., k1 k2), floating.
        w1: (n1, k1), or a pair (n1, r1), (r1, k1) of which it is the product.
        w2: (n2, k2), or a pair (n2, r2), (r2, k2).

    Returns:
        (..., n1 n2) in the dtype of w1. Gradients reach x and every factor.

    Source: LyCORIS, Yeh et al. 2024, arXiv:2309.14859; the vec trick: Van Loan 2000, "The
    ubiquitous Kronecker product", section 2.
    """
    (n1, k1), (n2, k2) = shape_of(w1), shape_of(w2)
    todo = [iter(halves(w1)), iter(halves(w2))]
    lead = x.shape[:-1]
    with no_autocast(x.device.type):
        y = x.to(halves(w1)[0].dtype).reshape(-1, k1, k2)  # (M, k1, k2)
        for dim in best_order(w1, w2)[1]:
            w = next(todo[dim])
            y = _along_rows(y, w) if dim == 0 else _along_columns(y, w)
        return y.reshape(*lead, n1 * n2)


def scaled(w: Factor, scaling: float) -> Factor:
    """Return a factor, much smaller than what it is multiplied with, times the scaling."""
    return w * scaling if isinstance(w, Tensor) else (w[0] * scaling, w[1])


def kron_linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    w1: Factor,
    w2: Factor,
    backend: str = "auto",
    dropped: Tensor | None = None,
) -> Tensor:
    """Return ``x W^T + bias + dropped kron(w1, w2)^T`` in x's dtype by the vec trick.

    On the CPU the C++ kernel adds the update to the base's output, and its gradient to the base's,
    in place; large factors are torch's, as the kernel sums their gradients in every core's cache.

    Args:
        x: (..., k1 k2).
        weight: the stored (n1 n2, k1 k2) weight, frozen.
        bias: (n1 n2,), or None.
        w1: see `kron_product`.
        w2: see `kron_product`.
        backend: "auto", or the name of one backend.
        dropped: (..., k1 k2), what the update reads in x's place; None: x.
    """
    read = x if dropped is None else dropped
    if not native_adds(read, w1, w2, backend) or read.dtype != x.dtype:
        y = ops.linear(x, weight, bias, None, backend)
        return (y + kron_product(read, w1, w2)).to(y.dtype)
    return ops.kron_linear(x, weight, bias, *_as_three(w1, w2), backend, dropped)


def add_in_place(x: Tensor, w1: Factor, w2: Factor, y: Tensor) -> Tensor:
    """Return y, to which ``x kron(w1, w2)^T`` was added by the C++ kernel; without a gradient."""
    return ops.add_kron(y, x, *_as_three(w1, w2))


def _as_three(w1: Factor, w2: Factor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return w1 as a matrix, and p and q: w2 is p, or q p."""
    full = w1 if isinstance(w1, Tensor) else w1[0] @ w1[1]
    return (full, w2, None) if isinstance(w2, Tensor) else (full, w2[1], w2[0])


def native_adds(x: Tensor, w1: Factor, w2: Factor, backend: str) -> bool:
    """Return whether the C++ kernel is there and takes these."""
    fits = is_plain(x) and x.is_cpu and x.dtype in DTYPES and not torch.is_autocast_enabled("cpu")
    return fits and _kernel_takes(w1, w2, backend)


def _kernel_takes(w1: Factor, w2: Factor, backend: str) -> bool:
    """Return whether the C++ kernel is there and takes these factors, on the CPU."""
    numbers = math.prod(shape_of(w1)) + sum(half.numel() for half in halves(w2))
    known = all(half.dtype in DTYPES for half in (*halves(w1), *halves(w2)))
    return backend in ("auto", "native") and known and numbers <= MOST_NUMBERS and is_built()


def passes_of(w1: Factor, w2: Factor, backend: str, on_cpu: bool) -> int:
    """Return what the passes of the vec trick over x and y cost; see `rank_form`."""
    cheap = on_cpu and _kernel_takes(w1, w2, backend) and isa() != "amx"
    return NATIVE_PASSES if cheap else PASSES


def rank_form(w1: Factor, w2: Factor, passes: int = PASSES) -> tuple[int, str] | None:
    """Return (rank, kind) of the low-rank form that is to be preferred, None for the vec trick.

    "both": the halves of w1 with those of w2. "rows": the identity of size n1 with w2's left half.
    "columns": the identity of size k1 with w2's right half.

    Let R be the smallest rank of these. Its form is preferred when ``2 R (N + K)`` flops per token
    are fewer than the vec trick's and `passes` for each of its N + K wide elements, and when its
    ``R (N + K)`` numbers are at most ``8 r^2 (N + K)``.
    """
    if isinstance(w2, Tensor):
        return None
    (n1, k1), (n2, k2), r = shape_of(w1), shape_of(w2), w2[1].shape[0]
    forms = [(n1 * r, "rows"), (k1 * r, "columns")]
    if not isinstance(w1, Tensor):
        forms.append((w1[1].shape[0] * r, "both"))
    rank, kind = min(forms)
    wide = n1 * n2 + k1 * k2
    if rank > 8 * r * r or 2 * rank * wide >= best_order(w1, w2)[0] + passes * wide:
        return None
    return rank, kind
