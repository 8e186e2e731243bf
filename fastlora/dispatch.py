"""Choose the backend that runs a problem: the first that does not refuse, or every reason.

A backend is one module in `fastlora/backends/`. It has `PRIORITY` (higher is asked first),
`why_not(problem) -> str | None` (None: it takes the problem), and one function per op it runs.
`AUTO_DEVICES` and `AUTO_COMPUTES` are optional: the device types on which, and the values of
`compute` for which, `backend="auto"` may choose it (default: all).
A name given in place of "auto" asks that backend alone.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType

import torch

from fastlora import backends

COMPUTES = ("auto", "fp8")
"""How a base product is computed: in the dtype of the activations, or with operands in 8 bits."""


@dataclass(frozen=True)
class Problem:
    """What a backend needs to know to accept or refuse.

    Attributes:
        op: name of the op, a function of the backend's: "lora_linear", "weight_dots", ...
        device: device type, "cpu" or "cuda".
        dtype: dtype of x (of the result, for an op on the weight alone).
        format: "dense", "nf4" or "fp4".
        blocksize: values per absmax; 0 when dense.
        m: rows of x (tokens).   n: out_features.   k: in_features.
        r: adapter rank, 0 without an adapter.
        adapter_dtype: dtype of lora_A and lora_B; None without an adapter.
        compute: "auto", or "fp8" for a base product with operands in 8 bits.
    """

    op: str
    device: str
    dtype: torch.dtype
    format: str
    blocksize: int
    m: int
    n: int
    k: int
    r: int
    adapter_dtype: torch.dtype | None
    compute: str = "auto"


@cache
def backend_names() -> tuple[str, ...]:
    """Return the names of the backends in `fastlora/backends/`, sorted; imports none of them."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(backends.__path__)))


@cache
def _load(name: str) -> ModuleType | str:
    """Return the backend's module, or a sentence when a package it needs is not installed."""
    try:
        return importlib.import_module(f"{backends.__name__}.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "fastlora").split(".")[0] in ("fastlora", "fastlora_kernels"):
            raise
        return f"the package {error.name} is not installed"


def _split(names: tuple[str, ...]) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Return (modules by falling priority, reason for each one that cannot be imported)."""
    loaded = {name: _load(name) for name in names}
    modules = {name: m for name, m in loaded.items() if isinstance(m, ModuleType)}
    ordered = sorted(modules.items(), key=lambda item: -int(item[1].PRIORITY))
    return dict(ordered), {name: m for name, m in loaded.items() if isinstance(m, str)}


def _refusal(module: ModuleType, problem: Problem, auto: bool) -> str | None:
    if not hasattr(module, problem.op):
        return f"does not implement {problem.op}"
    if auto and problem.device not in getattr(module, "AUTO_DEVICES", (problem.device,)):
        return f'runs on {problem.device} only when asked for by name, not with backend="auto"'
    if auto and problem.compute not in getattr(module, "AUTO_COMPUTES", (problem.compute,)):
        return f"emulates {problem.compute} compute only when asked for by name"
    reason: str | None = module.why_not(problem)
    return reason


def explain(problem: Problem) -> dict[str, str | None]:
    """Return every backend's reason to refuse `problem` (None: it accepts), highest priority first.

    Raises:
        ImportError: the native library is missing or was built from another source.
    """
    modules, absent = _split(backend_names())
    reasons = {name: _refusal(module, problem, auto=True) for name, module in modules.items()}
    return {**reasons, **absent}


def check_backend(backend: str) -> None:
    """Raise unless `backend` is "auto" or the name of a backend.

    Raises:
        TypeError: `backend` is not a str.
        ValueError: no backend has this name.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a str, got {type(backend).__name__}; use 'auto'")
    if backend != "auto" and backend not in backend_names():
        known = ["auto", *backend_names()]
        raise ValueError(f"backend must be one of {known}, got {backend!r}")


def check_compute(compute: str) -> None:
    """Raise unless `compute` is a way to compute the base product.

    Raises:
        ValueError: it is none.
    """
    if compute not in COMPUTES:
        raise ValueError(f"compute must be one of {list(COMPUTES)}, got {compute!r}; pass one")


def pick(problem: Problem, backend: str = "auto") -> ModuleType:
    """Return the backend module that runs `problem`.

    Args:
        problem: what is to be computed.
        backend: "auto" for the highest priority that accepts, or a name for that one alone.

    Raises:
        NotImplementedError: every backend asked refuses; the message gives each one's reason.
        ValueError: no backend has this name.
        ImportError: the native library is missing or was built from another source.
    """
    check_backend(backend)
    auto = backend == "auto"
    modules, reasons = _split(backend_names() if auto else (backend,))
    for name, module in modules.items():
        reason = _refusal(module, problem, auto)
        if reason is None:
            return module
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
    raise NotImplementedError(f"no backend runs {problem}: {listed}")


@lru_cache(maxsize=8192)
def choose(
    op: str,
    device: str,
    dtype: torch.dtype,
    format: str,
    blocksize: int,
    m: int,
    n: int,
    k: int,
    r: int,
    adapter_dtype: torch.dtype | None,
    backend: str,
    compute: str = "auto",
) -> ModuleType:
    """Return `pick(Problem(...), backend)`, remembered: a hit costs well under a microsecond."""
    problem = Problem(op, device, dtype, format, blocksize, m, n, k, r, adapter_dtype, compute)
    return pick(problem, backend)
