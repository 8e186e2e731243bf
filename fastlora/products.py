"""LoHa's and LoKr's linears as functions: adapters whose update is a product of small matrices."""

from __future__ import annotations

from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora import kron, ops
from fastlora.factors import hada_factors, kron_factors
from fastlora.kron import Factor, halves, scaled, shape_of
from fastlora.operands import Weight, as_stored, check_factors, size, with_dropout
from fastlora.ops.library import activation_dtype


def hada_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    w1_a: Tensor,
    w1_b: Tensor,
    w2_a: Tensor,
    w2_b: Tensor,
    scaling: float = 1.0,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    compute: str = "auto",
) -> Tensor:
    """Return ``x W^T + bias + scaling drop(x) ((w1_a w1_b) * (w2_a w2_b))^T``, LoHa's linear.

    The update is one of rank r1 r2 by Khatri–Rao factors: nothing holds N x K numbers.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 with backend="reference").
        weight: frozen: (N, K) in x's dtype, or a 4-bit `QuantizedWeight` of shape (N, K).
        bias: (N,), x's dtype or float32, or None.
        w1_a: (N, r1), float32 or x's dtype.
        w1_b: (r1, K), same dtype as w1_a.
        w2_a: (N, r2), same dtype as w1_a.
        w2_b: (r2, K), same dtype as w1_a.
        scaling: alpha / r, dimensionless.
        dropout: probability with which an element of x is dropped on its way to the update.
        seed: one int64 on x's device; None: a new one from torch's generator, if dropout is not 0.
        backend: "auto", or the name of one backend.
        compute: "auto", or "fp8" with a 4-bit weight; see `patch_model`.

    Returns:
        (..., N) in x's dtype, contiguous. Gradients reach x, bias and the four factors.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or a name does not fit, or the weight requires a gradient.
        NotImplementedError: no backend takes this problem; the message gives each one's reason.

    Source: FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098; LyCORIS, Yeh et al. 2024,
    arXiv:2309.14859.
    """
    stored, (n, k) = as_stored(weight, compute)
    r1, r2 = size(w1_a, 1), size(w2_a, 1)
    operands = {"w1_a": (w1_a, (n, r1)), "w1_b": (w1_b, (r1, k))}
    check_factors(
        operands | {"w2_a": (w2_a, (n, r2)), "w2_b": (w2_b, (r2, k))}, x, activation_dtype(x)
    )
    update = LowRank(*hada_factors(w1_a, w1_b, w2_a, w2_b, backend), float(scaling))
    return ops.linear(x, stored, bias, with_dropout(update, x, dropout, seed), backend)


def kron_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    w1: Factor,
    w2: Factor,
    scaling: float = 1.0,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    compute: str = "auto",
) -> Tensor:
    """Return ``x W^T + bias + scaling drop(x) kron(w1, w2)^T``, LoKr's linear.

    A low-rank form inside the fused op, or two small matmuls beside it, whichever
    `fastlora.kron.rank_form` says costs less: nothing holds N x K numbers.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 with backend="reference").
        weight: frozen: (N, K) in x's dtype, or a 4-bit `QuantizedWeight` of shape (N, K).
        bias: (N,), x's dtype or float32, or None.
        w1: (n1, k1), or a pair (n1, r1), (r1, k1) of which it is the product; float32 or x's dtype.
        w2: (n2, k2), or a pair (n2, r2), (r2, k2), with N = n1 n2 and K = k1 k2; same dtype.
        scaling: alpha / r, dimensionless.
        dropout: probability with which an element of x is dropped on its way to the update.
        seed: one int64 on x's device; None: a new one from torch's generator, if dropout is not 0.
        backend: "auto", or the name of one backend.
        compute: "auto", or "fp8" with a 4-bit weight; see `patch_model`.

    Returns:
        (..., N) in x's dtype, contiguous. Gradients reach x, bias and the factors.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or a name does not fit, or the weight requires a gradient.
        NotImplementedError: no backend takes this problem; the message gives each one's reason.

    Source: LyCORIS, Yeh et al. 2024, arXiv:2309.14859, section 3.
    """
    stored, shape = as_stored(weight, compute)
    x = x.to(activation_dtype(x))
    _check_kron(w1, w2, *shape, x)
    factors = kron_factors(w1, w2, backend)
    if factors is not None:
        update = with_dropout(LowRank(*factors, float(scaling)), x, dropout, seed)
        return ops.linear(x, stored, bias, update, backend)
    dropped = None
    if dropout:
        wide = x.to(halves(w1)[0].dtype)
        dropped = ops.drop(wide, ops.dropout_seed(x) if seed is None else seed, dropout)
    w1 = scaled(w1, float(scaling))
    return kron.kron_linear(x, stored, bias, w1, w2, backend, dropped)


def _check_kron(w1: Factor, w2: Factor, n: int, k: int, x: Tensor) -> None:
    """Check the factors of ``kron(w1, w2)``, which is to be (n, k)."""
    operands = {}
    for name, w in (("w1", w1), ("w2", w2)):
        if isinstance(w, Tensor):
            operands[name] = (w, (size(w, 0), size(w, 1)))
            continue
        if not isinstance(w, tuple) or len(w) != 2 or not all(isinstance(t, Tensor) for t in w):
            raise TypeError(
                f"{name} must be a Tensor or a pair of Tensors, got {type(w).__name__}; pass one"
            )
        left, right = w
        operands[f"{name}[0]"] = (left, (size(left, 0), size(right, 0)))
        operands[f"{name}[1]"] = (right, (size(right, 0), size(right, 1)))
    check_factors(operands, x, x.dtype)
    (n1, k1), (n2, k2) = shape_of(w1), shape_of(w2)
    if (n1 * n2, k1 * k2) != (n, k):
        raise ValueError(
            f"the product of w1's and w2's shapes must be the weight's ({n}, {k}), got"
            f" ({n1}, {k1}) and ({n2}, {k2})"
        )
