"""The product with 8-bit operands, in plain PyTorch: what the fp8 kernels compute.

``x W^T  ->  (s_m q_mk) (t p_nk)^T``, with q and p in e4m3 (4 significant bits, largest value 448)
and scales that are powers of two: s_m of each row of x, t of the whole weight. e4m3 is a floating
format, so one scale for all of W costs precision only where blocks are thousands of times smaller
than the largest; it serves both directions, and it comes from the blocks' magnitudes alone. Powers
of two make every division exact: a value is rounded once.

A row that holds NaN or infinity has the scale NaN, so that its products are NaN.

Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3 (e4m3).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastlora_kernels.formats import StoredWeight, dequantize

E4M3 = torch.float8_e4m3fn
SIDES = 16  # both sides of a weight must be multiples of it
CAPABILITY = (8, 9)  # the first with 8-bit floating matrix units
ROUND_UP = 0x1FFFFF  # carries a float32 above 1.75 * 2**e into the next exponent: 448 = 1.75 * 2**8
EXPONENT = 0x7F800000
TINY = 2.0**-100
OUTPUTS = 1024  # of a layer whose error is measured, at most
SEED = 448  # of the tokens with which an error is measured; 0 may be that of the weight
_UNITS = (
    "fp8 compute needs a GPU with 8-bit floating matrix units (compute capability 8.9 or newer)"
)


def power_of_two(peak: Tensor) -> Tensor:
    """Return the least power of two s with ``peak / s <= 448``, float32; peak at least 2**-100."""
    bits = peak.float().clamp_min(TINY).view(torch.int32)
    return (((bits + ROUND_UP) & EXPONENT) - (8 << 23)).view(torch.float32)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row of x (M, K) in e4m3 with a scale of its own.

    Returns:
        q (M, K) float8_e4m3fn and s (M, 1) float32, a power of two, with ``x ~ s q``. A row with a
        value that is not finite: q = 0 and s = NaN.
    """
    size = x.float().abs()
    peak = size.where(size < torch.inf, torch.inf).amax(1, keepdim=True)
    finite = peak < torch.inf
    scale = power_of_two(peak.where(finite, 1.0))
    q = (x.float() / scale).where(finite, 0.0).to(E4M3)
    return q, scale.where(finite, torch.nan)


def weight_peak(weight: StoredWeight) -> Tensor:
    """Return the largest block magnitude before its offset: one float32, without its dimensions.

    Of a double-quantised weight, that of the 256 blocks that share a scale; reads none of the
    weight.
    """
    peaks = weight.absmax if weight.nested_absmax is None else weight.nested_absmax
    assert peaks is not None
    largest: Tensor = torch.linalg.vector_norm(peaks, torch.inf)
    return largest


def weight_scale(weight: StoredWeight) -> Tensor:
    """Return t of a 4-bit weight: one float32, a power of two; NaN if a magnitude is infinite."""
    peak, offset = weight_peak(weight), weight.nested_offset
    if offset is not None:
        peak = peak + offset.abs().reshape(())
    return power_of_two(peak).where(peak < torch.inf, torch.nan)


def quantize_weight(weight: StoredWeight, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Return a 4-bit weight in e4m3.

    Returns:
        p (N, K) float8_e4m3fn, the float32 value divided by t and rounded once; t, see
        `weight_scale`.
    """
    scale = weight_scale(weight)
    return (dequantize(weight, n, k, torch.float32) / scale).to(E4M3), scale


def product(x: Tensor, weight: StoredWeight, n: int, k: int, transposed: bool) -> Tensor:
    """Return ``x W^T``, or ``x W`` with `transposed`, of operands in e4m3.

    Args:
        x: (M, K), or (M, N) with `transposed`; float32, bfloat16 or float16.
        weight: 4-bit, (N, K).
        n: N.
        k: K.
        transposed: multiply with W and not with its transpose.

    Returns:
        (M, N), or (M, K) with `transposed`, summed in float32 and rounded to x's dtype.
    """
    q, s = quantize_rows(x)
    p, t = quantize_weight(weight, n, k)
    matrix = p.float() if transposed else p.float().t()
    return ((q.float() @ matrix) * (s * t)).to(x.dtype)


def relative_error(weight: StoredWeight, n: int, k: int, dtype: torch.dtype, rows: int) -> float:
    """Return how far the product is from the exact one: rms of the difference over rms.

    Args:
        weight: 4-bit, (N, K), of which the first 1024 outputs are computed.
        n: N.
        k: K.
        dtype: of the activations, of which `rows` are drawn from a normal distribution, always the
            same.
        rows: how many.
    """
    generator, outputs = torch.Generator().manual_seed(SEED), min(n, OUTPUTS)
    x = torch.randn(rows, k, generator=generator).to(dtype).to(weight.data.device)
    exact_weight = dequantize(_first_outputs(weight, outputs, k), outputs, k, torch.float32)
    exact = x.float() @ exact_weight.t()
    (q, s), t = quantize_rows(x), weight_scale(weight)
    p = (exact_weight / t).to(E4M3)
    difference = (q.float() @ p.float().t()) * (s * t) - exact
    size = torch.linalg.vector_norm(exact)
    return float(torch.linalg.vector_norm(difference) / size) if size > 0 else 0.0


def _first_outputs(weight: StoredWeight, n: int, k: int) -> StoredWeight:
    """Return the first n rows of a 4-bit weight with k columns, an even number."""
    assert weight.absmax is not None
    blocks = -(-n * k // weight.blocksize)
    return weight._replace(data=weight.data[:n], absmax=weight.absmax[:blocks])


def why_not_shape(n: int, k: int) -> str | None:
    """Return why a weight (n, k) cannot be multiplied in 8 bits, or None."""
    if n % SIDES or k % SIDES or not n or not k:
        return f"fp8 compute takes weights whose sides are multiples of {SIDES}, got {n} x {k}"
    return None


def why_not_device(device: torch.device) -> str | None:
    """Return why a device cannot multiply in 8 bits, or None; asked once per device."""
    if device.type != "cuda":
        return f"{_UNITS}, got {device.type}"
    return _why_not_gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _why_not_gpu(index: int) -> str | None:
    name = torch.cuda.get_device_name(index)
    if torch.version.hip is not None:
        return (
            "fp8 compute is for NVIDIA GPUs: AMD's matrix units (gfx942) take e4m3fnuz, which is"
            f" another format than e4m3fn, got {name}"
        )
    capability = torch.cuda.get_device_capability(index)
    if capability < CAPABILITY:
        return f"{_UNITS}, got {name} with {capability[0]}.{capability[1]}"
    return _why_not_torch(torch.device("cuda", index))


def _why_not_torch(device: torch.device) -> str | None:
    """Return why this torch has no such product on a GPU, or None; tries a small one."""
    q = torch.zeros(32, 32, device=device).to(E4M3)
    ones = torch.ones(32, device=device)
    try:
        scaled_product(q, q, ones[:, None], ones[None], torch.bfloat16)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        return f"torch {torch.__version__} has no fp8 product with row scales here: {reason}"
    return None


def scaled_product(q: Tensor, p: Tensor, s: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``(s q) (p t)^T`` on the matrix units.

    Args:
        q: (M, K) float8_e4m3fn, contiguous.
        p: (N, K) float8_e4m3fn, contiguous; N and K multiples of 16.
        s: (M, 1) float32.
        t: (1, N) float32.
        dtype: bfloat16 or float16.

    Returns:
        (M, N) dtype. With row scales every torch gives bfloat16, and not every one float16, which
        is therefore rounded to bfloat16 first: 2**-9, a tenth of what e4m3 costs.
    """
    y = torch._scaled_mm(
        q, p.t(), scale_a=s, scale_b=t, out_dtype=torch.bfloat16, use_fast_accum=False
    )
    return y if dtype == torch.bfloat16 else y.to(dtype)
