"""What the ops share: the library that holds them, and when the dispatcher may be left out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from fastlora_kernels.formats import StoredWeight
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastlora.checks import wide_dtype

LIBRARY: Any = torch.library.Library("fastlora", "FRAGMENT")  # type: ignore[no-untyped-call]
WEIGHT = (
    "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset, str format,"
    " int blocksize, str compute"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_KINDS = frozenset((Tensor, torch.nn.Parameter, type(None)))
_AS_IT_IS: AbstractContextManager[Any] = nullcontext()


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op: its schema without the name, what runs it, and what stands for it."""
    LIBRARY.define(f"{name}{schema}", tags=_TAGS)
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"fastlora::{name}", fake, lib=LIBRARY)


def differentiate(
    name: str, backward: Callable[..., Any], setup: Callable[..., Any], twice: bool = False
) -> None:
    """Register the gradient of an op; unless it can be had `twice`, the gradient's op has none."""
    torch.library.register_autograd(f"fastlora::{name}", backward, setup_context=setup, lib=LIBRARY)
    if twice:
        return

    def refuse(ctx: Any, *grads: Tensor) -> None:
        refuse_double(name)

    torch.library.register_autograd(f"fastlora::{name}_backward", refuse, lib=LIBRARY)


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of dy (..., N) over its rows: (N,) of `dtype`."""
    total = dy.reshape(-1, dy.shape[-1]).contiguous().sum(0, dtype=wide_dtype(dy.dtype))
    return total.to(dtype)


def as_output(y: Tensor) -> Tensor:
    """Return what an autograd.Function made, not as a view, so that it may be changed in place."""
    if torch.compiler.is_compiling() or not y._is_view():
        return y
    result: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return result


def refuse_double(name: str) -> None:
    """Raise that an op has no second derivative."""
    raise NotImplementedError(
        f"fastlora::{name} has no second derivative; build it from torch operations where"
        " create_graph=True is needed"
    )


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context in which a backend's own torch calls keep the dtypes they are given."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _AS_IT_IS


def activation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which x is multiplied: autocast's where that is on, else its own."""
    device = "cpu" if x.is_cpu else x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return x.dtype
    casts = x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype


def autocasts(x: Tensor) -> bool:
    """Return whether autocast casts what is multiplied with x."""
    device = "cpu" if x.is_cpu else x.device.type
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def is_cast(x: Tensor, *weights: StoredWeight) -> bool:
    """Return whether autocast casts x or one of the weights."""
    if not autocasts(x):
        return False
    dense = [weight.data.dtype for weight in weights if weight.format == "dense"]
    return any(dtype != activation_dtype(x) for dtype in (x.dtype, *dense))


def as_multiplied(x: Tensor, weight: StoredWeight) -> tuple[Tensor, StoredWeight]:
    """Return x and a stored weight as autocast has them, where that is on, else as they are."""
    dtype, data = activation_dtype(x), weight.data
    if weight.format == "dense" and data.dtype != dtype and autocasts(x):
        weight = weight._replace(data=data.to(dtype))
    return (x if x.dtype == dtype else x.to(dtype)), weight


def is_transformed() -> bool:
    """Return whether torch.func, forward-mode AD or torch.jit.trace is at work."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether no subclass, mode or compiler has to see an op on these tensors.

    Raises:
        NotImplementedError: torch.func, forward-mode AD or torch.jit.trace is at work.
    """
    if torch.compiler.is_compiling():
        return False
    if is_transformed():
        raise NotImplementedError(
            "fastlora's operations must run outside of torch.func's transforms, forward-mode AD and"
            " torch.jit.trace, which see no kernel, but one of these is at work; take gradients"
            " with torch.autograd, or unpatch the model first"
        )
    return _KINDS.issuperset(map(type, tensors)) and _get_current_dispatch_mode() is None
