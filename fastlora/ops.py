"""The ops: schema, fake, gradient, and the function that calls them.

``fastlora::lora_linear`` and ``fastlora::lora_linear_backward`` are opaque to `torch.compile`; the
backend is chosen inside them. In plain eager mode an autograd.Function calls the same
implementation without the dispatcher, which saves more than ten microseconds per call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from fastlora_kernels.formats import StoredWeight
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastlora.checks import check_backward, check_forward, wide_dtype
from fastlora.dispatch import check_backend, choose
from fastlora.quant import QuantizedWeight

_WEIGHT = (
    "Tensor weight, Tensor? absmax, Tensor? nested_absmax, float nested_offset, str format,"
    " int blocksize"
)
LIBRARY: Any = torch.library.Library("fastlora", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define(
    f"lora_linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? lora_A, Tensor? lora_B,"
    " float scaling, str backend) -> (Tensor y, Tensor s)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
LIBRARY.define(
    f"lora_linear_backward(Tensor dy, Tensor? x, Tensor? s, {_WEIGHT}, Tensor? lora_A,"
    " Tensor? lora_B, float scaling, bool need_dx, bool need_dlora, str backend)"
    " -> (Tensor dx, Tensor dA, Tensor dB)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
Grads = tuple[Tensor, Tensor, Tensor]


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context in which a backend's own torch calls keep the dtypes they are given."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _AS_IT_IS


_AS_IT_IS: AbstractContextManager[Any] = nullcontext()


def _forward(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return (y, s) from the backend that takes the problem; x of any number of dimensions."""
    n, k = check_forward(x, weight, bias, lora_A, lora_B)
    rows = x if x.dim() == 2 else x.reshape(-1, k)  # (M, K)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    r, dtype = (0, None) if lora_A is None else (lora_A.shape[0], lora_A.dtype)
    m, kind = rows.shape[0], (x.device.type, x.dtype, weight.format, weight.blocksize)
    module = choose("lora_linear", *kind, m, n, k, r, dtype, backend)
    with _no_autocast(x.device.type):
        y, s = module.lora_linear(rows, weight, bias, lora_A, lora_B, scaling)
    return (y if x.dim() == 2 else y.view(*x.shape[:-1], n)), s


def _backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    need_dx: bool,
    need_dlora: bool,
    backend: str,
) -> Grads:
    """Return (dx, dA, dB) from the backend that takes the problem."""
    n, k = check_backward(dy, x, s, weight, lora_A, lora_B, need_dlora)
    rows = dy if dy.dim() == 2 else dy.reshape(-1, n)  # (M, N)
    if x is not None and x.dim() != 2:
        x = x.reshape(-1, k)
    r, dtype = (0, None) if lora_A is None else (lora_A.shape[0], lora_A.dtype)
    m, kind = rows.shape[0], (dy.device.type, dy.dtype, weight.format, weight.blocksize)
    module = choose("lora_linear_backward", *kind, m, n, k, r, dtype, backend)
    with _no_autocast(dy.device.type):
        dx, dA, dB = module.lora_linear_backward(
            rows, x, s, weight, lora_A, lora_B, scaling, need_dx, need_dlora
        )
    return (dx.view(*dy.shape[:-1], k) if need_dx and dy.dim() != 2 else dx), dA, dB


def _forward_op(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Run the op with the arguments of its schema: `rest` starts with the stored weight."""
    return _forward(x, StoredWeight(*rest[:6]), *rest[6:])


def _backward_eager(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> Grads:
    return _backward(dy, x, s, StoredWeight(*rest[:6]), *rest[6:])


def _backward_op(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> Grads:
    """Run the op; what is not needed comes back as separate tensors without elements."""
    need_dx, need_dlora = rest[9:11]
    dx, dA, dB = _backward_eager(dy, x, s, *rest)
    dx = dx if need_dx else dy.new_empty(0)
    return (dx, dA, dB) if need_dlora else (dx, dy.new_empty(0), dy.new_empty(0))


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    bias, lora_A, lora_B, _, backend = rest[6:]
    check_backend(backend)
    n, _ = check_forward(x, StoredWeight(*rest[:6]), bias, lora_A, lora_B)
    m = math.prod(x.shape[:-1])
    shape = (0,) if lora_A is None else (m, lora_A.shape[0])
    return x.new_empty((*x.shape[:-1], n)), x.new_empty(shape, dtype=wide_dtype(x.dtype))


def _backward_fake(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> Grads:
    lora_A, lora_B, _, need_dx, need_dlora, backend = rest[6:]
    check_backend(backend)
    _, k = check_backward(dy, x, s, StoredWeight(*rest[:6]), lora_A, lora_B, need_dlora)
    dx = dy.new_empty((*dy.shape[:-1], k) if need_dx else (0,))
    if not need_dlora:
        return dx, dy.new_empty(0), dy.new_empty(0)
    return dx, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save what the backward needs: x and s only when the adapter wants its gradient."""
    x, weight, absmax, nested, offset, format, blocksize, bias, lora_A, lora_B = inputs[:10]
    needs = ctx.needs_input_grad
    if needs[1]:
        raise ValueError(_WEIGHT_GRAD)
    ctx.need_dlora = needs[8] or needs[9]
    flat = format != "dense" and x.shape[-1] % 2 == 1  # a flat packed weight does not know its K
    keep_x = x if ctx.need_dlora or flat else None
    keep_s = output[1] if ctx.need_dlora else None
    ctx.save_for_backward(keep_x, keep_s, weight, absmax, nested, lora_A, lora_B)
    ctx.stored = (offset, format, blocksize)
    ctx.scaling, ctx.backend = inputs[10:]
    ctx.bias_dtype = None if bias is None else bias.dtype


_WEIGHT_GRAD = (
    "the weight of a fastlora linear must be frozen, got one that requires a gradient; call"
    " weight.requires_grad_(False) or train it with torch.nn.functional.linear"
)


def _gradients(ctx: Any, dy: Tensor, call: Callable[..., Grads]) -> tuple[Tensor | None, ...]:
    """Return one gradient per input of the op, through `call`, the op or its implementation."""
    x, s, weight, absmax, nested, lora_A, lora_B = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = dA = dB = dbias = None
    if needs[0] or ctx.need_dlora:
        parts = (weight, absmax, nested, *ctx.stored, lora_A, lora_B, ctx.scaling)
        dx, dA, dB = call(dy, x, s, *parts, needs[0], ctx.need_dlora, ctx.backend)
    if needs[7]:
        total = dy.reshape(-1, dy.shape[-1]).contiguous().sum(0, dtype=wide_dtype(dy.dtype))
        dbias = total.to(ctx.bias_dtype)
    wanted = (dx if needs[0] else None, dA if needs[8] else None, dB if needs[9] else None)
    return wanted[0], None, None, None, None, None, None, dbias, wanted[1], wanted[2], None, None


def _remember_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _remember(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _gradients_op(ctx: Any, dy: Tensor, ds: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, torch.ops.fastlora.lora_linear_backward)


def _refuse_double(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "fastlora::lora_linear has no second derivative; build it from torch operations where"
        " create_graph=True is needed"
    )


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("lora_linear", _forward_op, _device)
    LIBRARY.impl("lora_linear_backward", _backward_op, _device)
torch.library.register_fake("fastlora::lora_linear", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fastlora::lora_linear_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "fastlora::lora_linear", _gradients_op, setup_context=_remember_op, lib=LIBRARY
)
torch.library.register_autograd("fastlora::lora_linear_backward", _refuse_double, lib=LIBRARY)


class _LoraLinear(torch.autograd.Function):
    """The op without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, s = _forward_op(*inputs)
        _remember(ctx, inputs, (y, s))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            _refuse_double(ctx)
        return _gradients(ctx, dy, _backward_eager)


_KINDS = frozenset((Tensor, torch.nn.Parameter, type(None)))


def _plain(x: Tensor, weight: Tensor, bias: object, lora_A: object, lora_B: object) -> bool:
    """Return whether no subclass, mode or transform has to see the op."""
    return (
        not torch.compiler.is_compiling()
        and _KINDS.issuperset((type(x), type(weight), type(bias), type(lora_A), type(lora_B)))
        and _get_current_dispatch_mode() is None
        and not torch._C._are_functorch_transforms_active()
    )


def linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    backend: str = "auto",
) -> Tensor:
    """Return ``x W^T + bias + scaling (x A^T) B^T`` for a stored weight; see `lora_linear`.

    Under autocast, x and a dense weight are cast to the autocast dtype, as for
    `torch.nn.functional.linear`; the adapter keeps its own dtype.
    """
    data = weight.data
    grads = torch.is_grad_enabled()
    if grads and data.requires_grad:
        raise ValueError(_WEIGHT_GRAD)
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.is_floating_point():
        dtype = torch.get_autocast_dtype(device)
        if x.dtype != torch.float64:
            x = x.to(dtype)
            data = data.to(dtype) if weight.format == "dense" else data
    inputs = (x, data, *weight[1:], bias, lora_A, lora_B, float(scaling), backend)
    if not _plain(x, data, bias, lora_A, lora_B):
        return cast(Tensor, torch.ops.fastlora.lora_linear(*inputs)[0])
    tensors = (x, bias, lora_A, lora_B)
    if grads and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return cast(Tensor, _LoraLinear.apply(*inputs))  # type: ignore[no-untyped-call]
    return _forward_op(*inputs)[0]


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return ``x W^T + bias + scaling (x A^T) B^T``.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 with backend="reference").
        weight: frozen: (N, K) in x's dtype, or a 4-bit `QuantizedWeight` of shape (N, K).
        bias: (N,), x's dtype or float32, or None.
        lora_A: (r, K), float32 or x's dtype, or None.
        lora_B: (N, r), same dtype as lora_A, or None.
        scaling: alpha / r, dimensionless.
        backend: "auto", or the name of one backend.

    Returns:
        (..., N) in x's dtype, contiguous. Gradients reach x, bias, lora_A and lora_B, once.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or a name does not fit, or the weight requires a gradient.
        NotImplementedError: no backend takes this problem; the message gives each one's reason.

    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; Dettmers et al. 2023, arXiv:2305.14314.
    """
    if isinstance(weight, QuantizedWeight):
        stored = weight.stored()
        if weight.shape[1] == 1 and weight.shape[0] % 2:
            raise ValueError(
                f"a 4-bit weight with one column must have an even number of rows, got"
                f" {tuple(weight.shape)}; keep it dense"
            )
    elif isinstance(weight, Tensor):
        stored = StoredWeight(weight, None, None, 0.0, "dense", 0)
    else:
        raise TypeError(
            f"weight must be a Tensor or a QuantizedWeight, got {type(weight).__name__}"
        )
    return linear(x, stored, bias, lora_A, lora_B, scaling, backend)
