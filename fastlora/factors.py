"""What turns an adapter's parameters into the low-rank term that the fused op takes.

LoHa's update is a low-rank product by Khatri–Rao factors, LoKr's by Kronecker factors or, where
that costs more, two small matmuls beside the base. All of it is differentiable, but for the norms
of DoRA, and nothing holds N x K numbers.
"""

from __future__ import annotations

from typing import cast

import torch
from fastlora_kernels import native_products
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora import ops
from fastlora.checks import wide_dtype
from fastlora.kron import Factor, halves, kron_product, passes_of, rank_form
from fastlora.ops.library import no_autocast
from fastlora.ops.products import column_products, kronecker, native_takes, row_products

__all__ = [
    "hada_factors",
    "kron_factors",
    "kron_product",
    "row_norms",
]
Pair = tuple[Tensor, Tensor]


def hada_factors(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, backend: str = "auto"
) -> Pair:
    """Return the factors of LoHa's update: ``B A = (w1_a w1_b) * (w2_a w2_b)``.

    Row (i, j) of A is ``w1_b[i] * w2_b[j]``, column (i, j) of B is ``w1_a[:, i] * w2_a[:, j]``.

    Args:
        w1_a: (N, r1), floating.
        w1_b: (r1, K), the same dtype.
        w2_a: (N, r2).
        w2_b: (r2, K).
        backend: "auto", or the name of one backend.

    Returns:
        A (r1 r2, K) and B (N, r1 r2), in the parameters' dtype.

    Source: FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098, proposition 1.
    """
    return row_products(w1_b, w2_b, backend), column_products(w1_a, w2_a, backend)


def kron_factors(w1: Factor, w2: Factor, backend: str = "auto") -> Pair | None:
    """Return low-rank factors of LoKr's update, ``B A = kron(w1, w2)``, or None.

    With w2 a product of two, there are up to three forms:

    - ``kron(I, w2_a) kron(w1, w2_b)``, of rank n1 r2;
    - ``kron(w1, w2_a) kron(I, w2_b)``, of rank k1 r2;
    - with w1 a product too, ``kron(w1_a, w2_a) kron(w1_b, w2_b)``, of rank r1 r2.

    `fastlora.kron.rank_form` says when one of them is preferred to `kron_product`.

    Args:
        w1: (n1, k1), or a pair (n1, r1), (r1, k1) of which it is the product.
        w2: (n2, k2), or a pair (n2, r2), (r2, k2).
        backend: "auto", or the name of one backend.

    Returns:
        A (R, k1 k2) and B (n1 n2, R), in the parameters' dtype; None where `kron_product` costs
        less.

    Source: LyCORIS, Yeh et al. 2024, arXiv:2309.14859.
    """
    on_cpu = halves(w1)[0].is_cpu and not torch.compiler.is_compiling()
    form = rank_form(w1, w2, passes_of(w1, w2, backend, on_cpu))
    if form is None:
        return None
    a, b = cast(Pair, w2)
    if form[1] == "both":
        a1, b1 = cast(Pair, w1)
        return kronecker(b1, b, backend), kronecker(a1, a, backend)
    full = w1 if isinstance(w1, Tensor) else w1[0] @ w1[1]  # (n1, k1)
    if form[1] == "rows":
        return kronecker(full, b, backend), _along_diagonal(a, full.shape[0], backend)
    return _along_diagonal(b, full.shape[1], backend), kronecker(full, a, backend)


def _along_diagonal(w: Tensor, count: int, backend: str) -> Tensor:
    """Return ``kron(I, w)``: w (a, b), `count` times along the diagonal."""
    return kronecker(torch.eye(count, dtype=w.dtype, device=w.device), w, backend)


@torch.no_grad()
def row_norms(
    weight: StoredWeight,
    n: int,
    k: int,
    squares: Tensor,
    update: LowRank,
    dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """Return ``||W + s B A||`` of each row, without the N x K sum; it has no gradient.

    ``||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>``, row by row.

    Args:
        weight: the stored (N, K) weight.
        n: N.
        k: K.
        squares: (N,), the sums of squares of W's rows, `ops.weight_squares`.
        update: its A, B and scaling.
        dtype: to which W is decoded.
        backend: "auto", or the name of one backend.

    Returns:
        (N,) float32 (float64 for float64).

    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5, with the square of the sum written out.
    """
    wide = wide_dtype(dtype)
    A, B = update.A.detach(), update.B.detach()  # (R, K), (N, R)
    if A.dtype not in (torch.float32, dtype):
        A = A.to(wide)
    dots = ops.weight_dots(A, weight, dtype, backend)  # (R, N)
    with no_autocast(B.device.type):
        if native_takes(backend, B):
            A = A.to(wide)
            return native_products.row_norms(squares, dots, B, A @ A.t(), update.scaling)
        B = B.to(wide)
        A = A.to(wide)
        cross = (dots.t() * B).sum(1, dtype=torch.float64)
        own = ((B @ (A @ A.t())) * B).sum(1, dtype=torch.float64)
        total = squares.double() + 2 * update.scaling * cross + update.scaling**2 * own
        return total.clamp_min(0).sqrt().to(wide)
