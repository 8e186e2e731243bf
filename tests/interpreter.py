"""Triton's interpreter, made trustworthy for bfloat16 and e4m3: for tests only.

The interpreter (triton 3.4 to 3.9) keeps bfloat16 as raw 16-bit patterns and lets numpy compute on
those, so that products, sums and comparisons are silently wrong, and it truncates float32 to
bfloat16 instead of rounding. `install` makes every such operation decode to float32, compute, and
round to nearest even, as a GPU does. Its conversion to e4m3 rounds ties up and loses the carry of a
rounded mantissa; here it rounds to nearest even and stops at 448, as the instruction of a GPU does.
Instructions that a kernel writes by hand, which the interpreter refuses, run in the model of
`tests.ptx`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def on_gpu() -> bool:
    """Return whether this test run is for a real device: FASTLORA_TEST_GPU=1."""
    return os.environ.get("FASTLORA_TEST_GPU") == "1"


REPS = 3 if on_gpu() else 0
"""How often a test asks a kernel for the same bits again, beside once over poisoned memory."""


def prepare() -> None:
    """Define fastlora's kernels, and Triton's own functions, as interpreted ones.

    Triton decides when a function is defined whether it will be compiled or interpreted, so this
    must run before anything else imports triton. Afterwards TRITON_INTERPRET is as it was: what is
    defined later, and every subprocess, is compiled.

    Raises:
        RuntimeError: triton was imported before.
    """
    if on_gpu() or find_spec("triton") is None or "fastlora_kernels.lora_linear" in sys.modules:
        return
    if "triton" in sys.modules:
        raise RuntimeError(
            "tests.interpreter.prepare() must run before triton is imported, but it was imported"
            " already; call it first in conftest.py"
        )
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import_module("triton.experimental.gluon")  # triton imports it at the first launch
        import_module("fastlora_kernels.lora_linear")
        import_module("fastlora_kernels.columns")
        import_module("fastlora_kernels.experts_linear")
        import_module("fastlora_kernels.fp8_linear")
        install()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]


def decode(bits: Array) -> Array:
    """Return the float32 values of bfloat16 bit patterns (uint16)."""
    wide: Array = (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)
    return wide


def encode(values: Any) -> Array:
    """Return bfloat16 bit patterns (uint16) of float32 values, rounded to nearest even."""
    floats = np.ascontiguousarray(np.asarray(values, dtype=np.float32))
    bits = floats.view(np.uint32)
    rounded = (bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16
    quiet_nan = (bits >> 16) | np.uint32(0x40)
    result: Array = np.where(np.isnan(floats), quiet_nan, rounded).astype(np.uint16)
    return result


def encode_e4m3(values: Any) -> Array:
    """Return e4m3 bit patterns (uint8) of float32 values: to nearest even, 448 at most."""
    size = np.abs(np.asarray(values, dtype=np.float64))
    nan = np.isnan(size)
    size = np.where(nan, 0.0, np.minimum(size, 1024.0))
    exponent = np.frexp(np.maximum(size, 2.0**-6))[1] - 1  # below 2**-6 the step stays the same
    steps = np.rint(np.ldexp(size, 3 - exponent)).astype(np.int32)  # of 2**(exponent - 3), up to 16
    bits = np.minimum(steps + 8 * (exponent + 6), 0x7E)  # a carry goes into the exponent
    result: Array = np.where(nan, 0x7F, bits | np.where(np.signbit(values), 0x80, 0))
    return result.astype(np.uint8)


def install() -> None:
    """Make the interpreter compute bfloat16 as a GPU does; a second call changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "fastlora_bf16", False):
        return
    _patch_arithmetic(builder, interpreter.TensorHandle, tl)
    _patch_casts(builder, interpreter.TensorHandle, tl)
    _patch_reductions(interpreter.ReduceOps, interpreter.TensorHandle, tl)
    _patch_inline_asm(builder, interpreter.TensorHandle, tl)
    builder.fastlora_bf16 = True


def _is_bf16(handle: Any, tl: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _patch_arithmetic(builder: Any, handle: Any, tl: Any) -> None:
    binary, unary, dot = builder.binary_op, builder.unary_op, builder.create_dot
    ternary, fma = builder.ternary_op, builder.create_fma

    def widen(value: Any) -> Any:
        return handle(decode(value.data), tl.float32) if _is_bf16(value, tl) else value

    def narrow(result: Array) -> Any:
        return handle(result if result.dtype == np.bool_ else encode(result), tl.bfloat16)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Array]) -> Any:
        if _is_bf16(lhs, tl) and _is_bf16(rhs, tl):
            return narrow(op(decode(lhs.data), decode(rhs.data)))
        return binary(self, lhs, rhs, op)

    def unary_op(self: Any, value: Any, op: Callable[..., Array]) -> Any:
        return narrow(op(decode(value.data))) if _is_bf16(value, tl) else unary(self, value, op)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Callable[..., Array]) -> Any:
        if not _is_bf16(c, tl):
            return ternary(self, a, b, c, op)
        return narrow(ternary(self, widen(a), widen(b), widen(c), op).data)

    def create_fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        if not _is_bf16(c, tl):
            return fma(self, a, b, c)
        product = decode(a.data).astype(np.float64) * decode(b.data)
        return narrow((product + decode(c.data)).astype(np.float32))

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        result = dot(self, widen(a), widen(b), widen(acc), *rest)
        return narrow(result.data) if _is_bf16(acc, tl) else result

    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.create_fma, builder.create_dot = create_fma, create_dot


def _patch_casts(builder: Any, handle: Any, tl: Any) -> None:
    cast, fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, value: Any, dtype: Any) -> Any:
        source, target = value.dtype.scalar, dtype.scalar
        if source == target:
            return cast(self, value, dtype)
        if target == tl.bfloat16:
            return handle(encode(value.data), tl.bfloat16)
        if source == tl.bfloat16:
            wide = handle(decode(value.data), tl.float32)
            return wide if target == tl.float32 else cast(self, wide, dtype)
        return cast(self, value, dtype)

    def create_fp_to_fp(self: Any, value: Any, dtype: Any, rounding: Any) -> Any:
        if dtype.scalar == tl.float8e4nv:
            wide = cast_impl(self, value, tl.float32)
            return handle(encode_e4m3(wide.data), tl.float8e4nv)
        if tl.bfloat16 in (value.dtype.scalar, dtype.scalar):
            return cast_impl(self, value, dtype)
        return fp_to_fp(self, value, dtype, rounding)

    def get_bf16(self: Any, value: float) -> Any:
        return handle(encode([value]), tl.bfloat16)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.get_bf16 = get_bf16


def _patch_reductions(reduce_ops: Any, handle: Any, tl: Any) -> None:
    """Sums and maxima work on the raw data of their input: give them float32."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def reduce(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            if value.dtype.scalar != tl.bfloat16:
                return original(self, value, *args, **kwargs)
            shape = value.type.shape if value.type.is_block() else ()
            kind = tl.block_type(tl.float32, shape) if shape else tl.float32
            wide = tl.core.tensor(handle(decode(value.handle.data), tl.float32), kind)
            return original(self, wide, *args, **kwargs)

        return reduce

    for name in ("sum", "min_max"):
        setattr(reduce_ops, name, wrap(getattr(reduce_ops, name)))


def _patch_inline_asm(builder: Any, handle: Any, tl: Any) -> None:
    """Run hand-written instructions on 32-bit elements, one element at a time."""
    from tests import ptx

    class Call:
        def __init__(self, results: list[Any]) -> None:
            self.results = results

        def get_result(self, i: int) -> Any:
            return self.results[i]

    def create_inline_asm(
        self: Any,
        text: str,
        constraints: str,
        values: Sequence[Any],
        types: Sequence[Any],
        pure: bool,
        pack: int,
    ) -> Call:
        assert pack == 1 and all(kind.scalar == tl.int32 for kind in types)
        results = ptx.run(text, [value.data for value in values], len(types))
        return Call([handle(bits.view(np.int32), tl.int32) for bits in results])

    builder.create_inline_asm = create_inline_asm
