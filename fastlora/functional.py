"""The ops as functions, for people who write their own layers: LoRA, DoRA, many LoRAs at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fastlora import ops
from fastlora.checks import low_rank, wide_dtype
from fastlora.factors import row_norms
from fastlora.multi import grouping, permuted, spans_of, stack_adapters
from fastlora.operands import (
    Weight,
    as_stored,
    check_factors,
    check_ids,
    check_vector,
    size,
    with_dropout,
)
from fastlora.ops.library import activation_dtype
from fastlora.weight_checks import weight_shape


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    compute: str = "auto",
) -> Tensor:
    """Return ``x W^T + bias + scaling (drop(x) A^T) B^T``.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 with backend="reference").
        weight: frozen: (N, K) in x's dtype, or a 4-bit `QuantizedWeight` of shape (N, K).
        bias: (N,), x's dtype or float32, or None.
        lora_A: (r, K), float32 or x's dtype, or None.
        lora_B: (N, r), same dtype as lora_A, or None.
        scaling: alpha / r, dimensionless.
        dropout: probability with which an element of x is dropped on its way to lora_A. The mask is
            recomputed from the seed, never stored.
        seed: one int64 on x's device; None: a new one from torch's generator, if dropout is not 0.
        backend: "auto", or the name of one backend.
        compute: "auto", or "fp8" with a 4-bit weight; see `patch_model`.

    Returns:
        (..., N) in x's dtype, contiguous. Gradients reach x, bias, lora_A and lora_B, once.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or a name does not fit, or the weight requires a gradient.
        NotImplementedError: no backend takes this problem; the message gives each one's reason.

    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; Dettmers et al. 2023, arXiv:2305.14314.
    """
    stored, _ = as_stored(weight, compute)
    update = low_rank(lora_A, lora_B, float(scaling), 0.0, None, None)
    return ops.linear(x, stored, bias, with_dropout(update, x, dropout, seed), backend)


def dora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float = 1.0,
    *,
    norms: Tensor | None = None,
    backend: str = "auto",
    compute: str = "auto",
) -> Tensor:
    """Return ``g (x W^T + scaling (x A^T) B^T) + bias``, ``g = magnitude / ||W + scaling B A||``.

    The norm is that of each row; it counts as a constant in the gradient, as in the paper's section
    4.3. It is computed without the N x K sum.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 with backend="reference").
        weight: frozen: (N, K) in x's dtype, or a 4-bit `QuantizedWeight` of shape (N, K).
        bias: (N,), x's dtype or float32, or None.
        lora_A: (r, K), float32 or x's dtype.
        lora_B: (N, r), same dtype as lora_A.
        magnitude: (N,), floating.
        scaling: alpha / r, dimensionless.
        norms: (N,), the row norms of ``W + scaling B A`` where they are known, as in inference;
            None: they are computed.
        backend: "auto", or the name of one backend.
        compute: "auto", or "fp8" with a 4-bit weight; see `patch_model`.

    Returns:
        (..., N) in x's dtype. Gradients reach x, bias, lora_A, lora_B and magnitude, once.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or a name does not fit, or the weight requires a gradient.
        NotImplementedError: no backend takes this problem; the message gives each one's reason.

    Source: DoRA, Liu et al. 2024, arXiv:2402.09353, eq. 5 and 11.
    """
    stored, (n, k) = as_stored(weight, compute)
    dtype = activation_dtype(x)
    update = low_rank(lora_A, lora_B, float(scaling), 0.0, None, None)
    if update is None:
        raise TypeError("dora_linear needs lora_A and lora_B, got None; use lora_linear without")
    check_vector("magnitude", magnitude, n, x)
    if norms is None:
        decoded = stored.data.dtype if stored.format == "dense" else dtype
        squares = ops.weight_squares(stored, n, k, decoded, backend)
        if ops.finds_norms(x, stored, update, n, backend):
            rest = (update, magnitude, None, squares, backend)
            return ops.scaled_linear(x, stored, bias, *rest)
        norms = row_norms(stored, n, k, squares, update, decoded, backend)
    else:
        check_vector("norms", norms, n, x)
    norms = norms.detach().to(wide_dtype(dtype))
    return ops.scaled_linear(x, stored, bias, update, magnitude, norms, None, backend)


def multi_lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    adapter_ids: Tensor,
    *,
    backend: str = "auto",
    compute: str = "auto",
) -> Tensor:
    """Return ``x W^T + bias + scaling_i (x A_i^T) B_i^T``, the adapter i being that of each row.

    All adapters are one update side by side along the rank, of which each row has its own part: one
    call, however many adapters there are, for training as well. Rows are brought into the order of
    their adapters and back where they are not in groups already.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 with backend="reference").
        weight: frozen: (N, K) in x's dtype, or a 4-bit `QuantizedWeight` of shape (N, K).
        bias: (N,), x's dtype or float32, or None.
        lora_A: (r_i, K) for each adapter, all float32 or all x's dtype; ranks may differ.
        lora_B: (N, r_i) for each adapter, same dtype.
        scaling: alpha / r of each adapter.
        adapter_ids: int32 or int64 on x's device: the first dimensions of x, such as (B,) or (B, T)
            for x (B, T, K); the adapter of each row, -1 for none.
        backend: "auto", or the name of one backend.
        compute: "auto", or "fp8" with a 4-bit weight; see `patch_model`.

    Returns:
        (..., N) in x's dtype, contiguous. Gradients reach x, bias and every adapter, once.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device, a name or an id does not fit, or the weight requires a
            gradient.
        NotImplementedError: no backend takes this problem; the message gives each one's reason.

    Source: Punica, Chen et al. 2023, arXiv:2310.18547; S-LoRA, Sheng et al. 2023, arXiv:2311.03285.
    """
    stored, (n, k) = as_stored(weight, compute)
    if not len(lora_A) == len(lora_B) == len(scaling) or not lora_A:
        raise ValueError(
            "lora_A, lora_B and scaling must have one entry per adapter, at least one, got"
            f" {len(lora_A)}, {len(lora_B)} and {len(scaling)}"
        )
    ranks = [size(a, 0) for a in lora_A]
    operands = {f"lora_A[{i}]": (a, (ranks[i], k)) for i, a in enumerate(lora_A)}
    operands |= {f"lora_B[{i}]": (b, (n, ranks[i])) for i, b in enumerate(lora_B)}
    check_factors(operands, x, activation_dtype(x))
    check_ids(adapter_ids, x, len(lora_A))
    weight_shape(stored, x.shape[-1])  # x has the weight's K columns
    update = stack_adapters(lora_A, lora_B, scaling)
    ids = adapter_ids.reshape(-1)
    each = math.prod(x.shape[adapter_ids.dim() : -1])  # rows of x that share an id
    order = grouping(ids, each, len(lora_A))
    if order is None:
        spans = spans_of(ranks, ids, each)
        return ops.linear(x, stored, bias, update._replace(spans=spans), backend)
    back = order.argsort()
    blocks = permuted(x.reshape(-1, each, k), order, back)
    spans = spans_of(ranks, ids.index_select(0, order), each)
    y = ops.linear(blocks, stored, bias, update._replace(spans=spans), backend)
    return permuted(y, back, order).view(*x.shape[:-1], n)
