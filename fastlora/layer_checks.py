"""Refuse what one linear can't have: a rank, a format, values, a backend that takes it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastlora.adapters import METHODS, AdapterSpec
from fastlora.checks import FLOATS
from fastlora.dispatch import Problem, pick
from fastlora.layers import AdapterLinear, QuantizedLinear
from fastlora.linears import sizes
from fastlora.quant import QuantConfig

TOO_WIDE = "its rank {} is more than the smaller side of its weight"


def too_wide(spec: AdapterSpec, module: nn.Module) -> bool:
    """Return whether the rank of an adapter is more than that of any update."""
    return METHODS[spec.method].bounded and spec.r > min(sizes(module))


def refuse_rank(name: str, module: Any, spec: AdapterSpec) -> NoReturn:
    """Raise that the rank of an adapter is more than that of any update."""
    n, k = sizes(module)
    raise ValueError(
        f"the rank of {name!r} must be at most {min(n, k)}, the smaller side of its {n} x {k}"
        f" weight, got {spec.r}; lower r or set rank_pattern"
    )


def check_layer(
    name: str,
    module: Any,
    spec: AdapterSpec | None,
    quant: QuantConfig | None,
    backend: str,
    compute: str = "auto",
    bounded: bool = True,
) -> None:
    """Raise unless this linear, with its values, can have this adapter and this format."""
    n, k = sizes(module)
    method = None if spec is None else METHODS[spec.method]
    if bounded and spec is not None and too_wide(spec, module):
        refuse_rank(name, module, spec)
    if isinstance(module, AdapterLinear):
        return
    _check_tensors(name, module)
    if quant is not None and k == 1 and n % 2:
        raise ValueError(
            f"a weight with one column must have an even number of rows to be stored in 4 bits,"
            f" but {name!r} is {n} x 1; exclude it"
        )
    if quant is not None and module.weight.dtype == torch.float64:
        raise TypeError(
            f"a weight must be float32, bfloat16 or float16 to be stored in 4 bits, but {name!r} is"
            " float64; convert the model"
        )
    format, blocksize = ("dense", 0) if quant is None else (quant.quant_type, quant.blocksize)
    compute = "auto" if quant is None else compute
    r = 0 if method is None or spec is None else method.rank(spec)
    _check_backend(module, (format, blocksize), module.weight.dtype, r, backend, compute)


def check_packed(model: nn.Module, backend: str, compute: str) -> None:
    """Raise unless a backend multiplies every 4-bit weight of a model in this way."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            kind = (module.quant.quant_type, module.quant.blocksize)
            _check_backend(module, kind, module.quant.dtype, 0, backend, compute)


def _check_backend(
    module: Any,
    kind: tuple[str, int],
    dtype: torch.dtype,
    r: int,
    backend: str,
    compute: str,
) -> None:
    """Raise unless a backend takes a training batch of this linear, on the device where it is."""
    (n, k), device = sizes(module), module.weight.device
    adapter = torch.promote_types(dtype, torch.float32) if r else None
    problem = Problem("lora_linear", device.type, dtype, *kind, 512, n, k, r, adapter, compute)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        pick(problem, backend)


def _check_tensors(name: str, module: Any) -> None:
    weight, bias = module.weight, module.bias
    if weight.is_meta:
        raise ValueError(
            f"the weight of {name!r} must hold values, but it is on the meta device; load the"
            " model first"
        )
    if bias is not None and bias.device != weight.device:
        raise ValueError(
            f"weight and bias of {name!r} must be on one device, got {weight.device} and"
            f" {bias.device}; move one of them"
        )
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in FLOATS:
        raise TypeError(
            f"the weight of {name!r} must be a plain floating tensor, got {type(weight).__name__}"
            f" of {weight.dtype}; load the model in float32, bfloat16 or float16"
        )
    ends = torch.stack(weight.detach().aminmax()) if weight.numel() else weight.new_zeros(0)
    if not bool(torch.isfinite(ends).all()):  # NaN is both ends; much faster than every element
        raise ValueError(
            f"the weight of {name!r} must be finite, but it holds NaN or infinity; repair the"
            " checkpoint"
        )
