"""The kernel variants that `fastlora_kernels.aot` compiles: what the launchers launch.

Each launcher runs on CPU tensors, taken for those of an architecture, with its kernels replaced by
recorders, so that a case has the very arguments and options of a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora_kernels import (
    columns,
    dequantize,
    experts_linear,
    fp8_linear,
    fused,
    lora_linear,
    low_rank_products,
    regimes,
)
from fastlora_kernels.experts import ExpertsUpdate
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from fastlora_kernels.low_rank_products import Masks

N, K, RANK, MANY = 1024, 2048, 16, 256
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MATRIX = ("linear_fwd", "bwd_dx", "first", "finish", "gradient", "both")
FP8_ARCHS = ("sm_89", "sm_90", "sm_100", "sm_120")  # with matrix units for e4m3
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One kernel with the arguments of one launch.

    Attributes:
        kernel: the kernel.
        variant: what distinguishes it from the kernel's other cases.
        arguments: of the launch.
        options: constants and compiler options of the launch.
        wants_matrix: it must have matrix instructions.
        no_fma: it must not fuse a product and a sum.
    """

    kernel: Any
    variant: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    wants_matrix: bool
    no_fma: bool

    @property
    def weights(self) -> int:
        """Weights that a program decodes in one turn of its main loop; 0 for none."""
        options = self.options
        if "DECODE" not in options:
            return 0
        if "BLOCK_O" in options:
            return int(options["BLOCK_O"] * options["BLOCK_I"])
        return int(options["ROWS"] * options.get("COLS", 1 << options["LOG_BLOCK"]))


class _Recorder:
    """Takes a kernel's place in a launcher and keeps its arguments instead of running it."""

    def __init__(self, kernel: Any, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def record(*arguments: Any, **options: Any) -> None:
            self.launches.append((self.kernel, arguments, options))

        return record


class _NoProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leaves torch's own matmuls out: no kernel of ours, and in 16 bits on many CPUs very slow."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.mm.default:
            left, right = args
            return left.new_empty(left.shape[0], right.shape[1])
        return func(*args, **(kwargs or {}))


_MODULES = (columns, dequantize, experts_linear, fp8_linear, fused, low_rank_products)


@contextmanager
def _recording() -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    saved = [
        (module, name, value)
        for module in _MODULES
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    ]
    for module, name, kernel in saved:
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in saved:
            setattr(module, name, kernel)


def _cases(variant: str, run: Callable[[], object], matrix: bool = True) -> Iterator[Case]:
    """Yield the launches of `run`, each kernel once; `matrix`: where it has a use for them."""
    with _recording() as launches, _NoProducts():  # type: ignore[no-untyped-call]
        run()
    seen = set()
    for kernel, arguments, options in launches:
        name = kernel.__name__.removesuffix("_kernel")
        if name not in seen:
            seen.add(name)
            low = options.get("HAS_LOW", True)
            wants = matrix and low and name.endswith(MATRIX)
            yield Case(kernel, variant, arguments, options, wants, "dequantize" in name)


def _stored(n: int, k: int, nested: bool, blocksize: int = 64) -> StoredWeight:
    blocks = -(-n * k // blocksize)
    absmax = torch.zeros(blocks, dtype=torch.uint8 if nested else FP32)
    outer = torch.zeros(-(-blocks // 256)) if nested else None
    offset = torch.zeros(1) if nested else None
    shape = (n, k // 2) if k % 2 == 0 else ((n * k + 1) // 2, 1)
    data = torch.zeros(shape, dtype=torch.uint8)
    return StoredWeight(data, absmax, outer, offset, "nf4", blocksize)


def _short(dtype: torch.dtype) -> str:
    return str(dtype)[6:].replace("float", "f")


def _linear(
    m: int,
    dtype: torch.dtype = BF16,
    adapter: torch.dtype = BF16,
    nested: bool = True,
    ragged: bool = False,
    rank: int = RANK,
    masked: bool = False,
) -> Iterator[Case]:
    """Yield the kernels of both directions for m tokens; masked: dropout and spans."""
    n, k = (N + 1, K + 1) if ragged else (N, K)
    weight = _stored(n, k, nested)
    a, b = torch.zeros(rank, k, dtype=adapter), torch.zeros(n, rank, dtype=adapter)
    seed = torch.zeros(1, dtype=torch.int64) if masked else None
    spans = torch.zeros(m, 2, dtype=torch.int32) if masked else None
    update = LowRank(a, b, 0.5, 0.25 if masked else 0.0, seed, spans)
    x, dy = torch.zeros(m, k, dtype=dtype), torch.zeros(m, n, dtype=dtype)

    def run() -> None:
        _, s = lora_linear.lora_linear(x, weight, torch.zeros(n, dtype=dtype), update)
        lora_linear.lora_linear_backward(dy, x, s, weight, update, True, True)

    name = f"M={m} {_short(dtype)} adapter {_short(adapter)}" + (" nested" if nested else "")
    name += (" ragged" if ragged else "") + (" masked" if masked else "")
    name += f" R={rank}" if rank != RANK else ""
    yield from _cases(name, run, dtype != FP32)


def _gemv(dtype: torch.dtype, nested: bool) -> Iterator[Case]:
    x, a = torch.zeros(1, K, dtype=dtype), torch.zeros(RANK, K, dtype=dtype)
    weight, plan = _stored(N, K, nested), regimes.Plan("gemv", regimes.GEMV)

    def run() -> object:
        return fused.partial_product(plan, x, weight, N, K, dtype, a, Masks(), True)

    yield from _cases(f"{_short(dtype)}" + (" nested" if nested else ""), run, False)


def _dequantize(dtype: torch.dtype, blocksize: int) -> Iterator[Case]:
    weight = _stored(N, K, True, blocksize)
    name = f"{_short(dtype)} nested blocks of {blocksize}"
    yield from _cases(name, lambda: dequantize.dequantize(weight, N, K, dtype))


def _fp8(dtype: torch.dtype, nested: bool, k: int = K) -> Iterator[Case]:
    """Yield the kernels that write e4m3, for both directions."""
    x, weight = torch.zeros(MANY, k, dtype=dtype), _stored(N, k, nested)

    def run(transposed: bool) -> None:
        fp8_linear.quantize_rows(x)
        with fp8_linear.quantized_weight(weight, N, k, transposed):
            pass

    name = f"{_short(dtype)} K={k}" + (" nested" if nested else "")
    yield from _cases(name, partial(run, False), False)
    yield from _cases(f"{name} transposed", partial(run, True), False)


def _columns(dtype: torch.dtype) -> Iterator[Case]:
    """Yield the kernels of DoRA."""
    z, scale, weight = torch.zeros(MANY, N, dtype=dtype), torch.zeros(N), _stored(N, K, True)

    def run() -> None:
        columns.scale_columns(z, scale, torch.zeros(N, dtype=dtype))
        columns.scale_columns_backward(z, z, scale, True, True)
        columns.weight_squares(weight, N, K, dtype)

    yield from _cases(_short(dtype), run)
    a = torch.zeros(RANK, K)
    name = f"dots {_short(dtype)} a f32 nested"
    yield from _cases(name, partial(columns.weight_dots, a, weight, N, dtype), dtype != FP32)


def _experts(each: int, dtype: torch.dtype, adapter: torch.dtype, nested: bool) -> Iterator[Case]:
    """Yield the kernels of both directions for four experts with `each` rows on average."""
    one, e = _stored(N, K, nested), 4
    data, absmax, outer = (t if t is None else torch.stack([t.view(-1)] * e) for t in one[:3])
    assert data is not None
    offset = torch.zeros(e) if nested else None
    weight = StoredWeight(data, absmax, outer, offset, one.format, one.blocksize)
    a, b = torch.zeros(e, RANK, K, dtype=adapter), torch.zeros(e, N, RANK, dtype=adapter)
    update, ends = ExpertsUpdate(a, b, 0.5), torch.full((e,), e * each)
    x, dy = torch.zeros(e * each, K, dtype=dtype), torch.zeros(e * each, N, dtype=dtype)

    def run() -> None:
        bias = torch.zeros(e, N, dtype=dtype)
        _, s = experts_linear.experts_linear(x, weight, N, bias, update, ends)
        rest = (weight, K, update, ends, True, True)
        experts_linear.experts_linear_backward(dy, x, s, *rest)

    name = f"M/E={each} {_short(dtype)} adapter {_short(adapter)}" + (" nested" if nested else "")
    yield from _cases(name, run, dtype != FP32)


def _quick(arch: str) -> Iterator[Case]:
    """Yield the most demanding variant of every kernel."""
    yield from _dequantize(BF16, 64)
    yield from _linear(128, BF16, FP32)
    yield from _linear(MANY, BF16, FP32)
    yield from _linear(MANY, FP16, FP32, masked=True)
    yield from _linear(MANY, BF16, FP32, rank=64)
    yield from _gemv(BF16, True)
    yield from _columns(BF16)
    if arch in FP8_ARCHS:
        yield from _fp8(BF16, True)
    yield from _experts(128, BF16, FP32, True)


def _default(arch: str) -> Iterator[Case]:
    """Yield every tile once, and every other property at least once."""
    yield from _quick(arch)
    if arch in FP8_ARCHS:
        yield from _fp8(FP16, False, K + 16)  # a block's part in a row is 16 values
    yield from _dequantize(FP32, 4096)
    for m in (1, 16, 32, 64):
        yield from _linear(m)
    yield from _linear(16, FP16, FP32, False, masked=True)
    yield from _linear(16, BF16, BF16, True, True)
    yield from _linear(16, FP32, FP32)
    yield from _linear(1, FP32, FP32, rank=1)
    yield from _linear(MANY, FP32, FP32, rank=64)
    for each in (16, 64):
        yield from _experts(each, BF16, BF16, True)
    yield from _experts(16, FP16, FP32, False)
    yield from _experts(16, FP32, FP32, True)


def _full(arch: str) -> Iterator[Case]:
    """Yield every tile with every combination of dtypes, absmax and alignment."""
    yield from _default(arch)
    for dtype in (BF16, FP16):
        yield from _columns(dtype)
        yield from _gemv(dtype, False)
        for m in (1, 16, 32, 64, 128, MANY):
            for adapter in (dtype, FP32):
                for nested in (False, True):
                    yield from _linear(m, dtype, adapter, nested)
            yield from _linear(m, dtype, FP32, True, masked=True)
        yield from _linear(16, dtype, FP32, False, True)
    yield from _columns(FP32)


def cases(arch: str, scope: str = "default") -> list[Case]:
    """Return an architecture's variants: "quick" (the most demanding), "default" or "full"."""
    makers = {"quick": _quick, "default": _default, "full": _full}
    with regimes.assume(arch):
        found = list(makers[scope](arch))
    distinct = {(case.kernel.__name__, _key(case)): case for case in reversed(found)}
    return list(reversed(distinct.values()))


def _key(case: Case) -> tuple[Any, ...]:
    """Return what the compiler sees of a case."""
    kinds = tuple(
        (a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, Tensor) else _specialised(a)
        for a in case.arguments
    )
    return (*kinds, tuple(sorted((name, str(value)) for name, value in case.options.items())))


def _specialised(value: Any) -> Any:
    if isinstance(value, int):
        return "1" if value == 1 else value % 16 == 0
    return type(value)
