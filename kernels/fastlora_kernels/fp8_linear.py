"""The base product with 8-bit operands on Triton: its launchers.

``y = (s q) (t p)^T`` and ``dx = (s q) (t p)``, with q and s from the rows of x or dy and p and t
from the packed weight, as `fastlora_kernels.fp8` defines them; the vendor's matmul multiplies. Its
second operand has to be contiguous along the sum, so that p is written as W (N, K) forward and as
its transpose (K, N) backward: one scale for the whole weight makes them the same values.

Traffic, beside the product's: 0.5 + 1 / blocksize bytes per weight read and 1 written, 3 bytes per
activation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor

from fastlora_kernels import fp8
from fastlora_kernels._fp8_kernels import fp8_dequantize_fwd_kernel, fp8_quantize_fwd_kernel
from fastlora_kernels._launch import OPTIONS, on_device, scratch, stored_arguments
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.regimes import decoder

# By transposed. 64 values per thread, and at least 128 bytes in a row of the result: on sm_90 5.5
# and 9.3 machine instructions per value. Not measured on a GPU yet.
TILES = {
    False: {"ROWS": 32, "COLS": 256, "num_warps": 4},
    True: {"ROWS": 128, "COLS": 128, "num_warps": 8},
}
ROW = {"BLOCK_K": 2048, "num_warps": 8}
PAD = 256  # memory of row scales ends at a multiple: torch may read on (pytorch/pytorch#133334)


def product(x: Tensor, weight: StoredWeight, n: int, k: int, transposed: bool) -> Tensor:
    """Return ``x W^T``, or ``x W`` with `transposed`, of operands in e4m3.

    Args:
        x: (M, K), or (M, N) with `transposed`; bfloat16 or float16, any strides.
        weight: 4-bit, (N, K), both multiples of 16.
        n: N.
        k: K.
        transposed: multiply with W and not with its transpose.

    Returns:
        (M, N), or (M, K) with `transposed`, in x's dtype, contiguous.

    Raises:
        NotImplementedError: the GPU of x cannot multiply in 8 bits.
    """
    reason = fp8.why_not_device(x.device) if x.is_cuda else None
    if reason is not None:
        raise NotImplementedError(f"{reason}; leave compute at 'auto' or use another GPU")
    q, s = quantize_rows(x)
    with quantized_weight(weight, n, k, transposed) as (p, t):
        return fp8.scaled_product(q, p, s, t, x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `fp8.quantize_rows` does: q (M, K) float8_e4m3fn and s (M, 1) float32."""
    m, k = x.shape
    q = torch.empty(m, k, dtype=torch.uint8, device=x.device)
    s = torch.empty(-(-m // PAD) * PAD, 1, dtype=torch.float32, device=x.device)[:m]
    with on_device(x):
        fp8_quantize_fwd_kernel[(m,)](x, q, s, k, x.stride(0), x.stride(1), **ROW, **OPTIONS)
    return q.view(fp8.E4M3), s


@contextmanager
def quantized_weight(
    weight: StoredWeight, n: int, k: int, transposed: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Lend a 4-bit weight in e4m3.

    Yields:
        p (N, K) float8_e4m3fn, or (K, N) with `transposed`, equal to what `fp8.quantize_weight`
        gives; its scale t once per row of p: (1, N) or (1, K) float32.
    """
    rows, cols = (k, n) if transposed else (n, k)
    device, tile = weight.data.device, TILES[transposed]
    t = torch.empty(1, rows, dtype=torch.float32, device=device)
    stored, meta = stored_arguments(weight)
    how = decoder(device, torch.bfloat16) if stored[0].data_ptr() % 16 == 0 else "gather"
    part = min(math.gcd(k, weight.blocksize), tile["COLS"])
    grid = (triton.cdiv(k, tile["COLS"]), triton.cdiv(n, tile["ROWS"]))
    with scratch(rows, cols, fp8.E4M3, device) as p, on_device(p):
        fp8_dequantize_fwd_kernel[grid](
            *stored, fp8.weight_peak(weight), p.view(torch.int8), t, n, k, **meta, **OPTIONS,
            DECODE=how, TRANSPOSE=transposed, PART=part, **tile,
        )  # fmt: skip
        yield p, t
