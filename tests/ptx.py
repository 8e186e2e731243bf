"""A numpy model of the few PTX instructions that the kernels write by hand, for the interpreter."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
U32 = np.uint32


def run(text: str, inputs: list[Array], outputs: int) -> list[Array]:
    """Execute PTX element by element.

    Args:
        text: the code; ``$0`` .. are the outputs, then come the inputs.
        inputs: arrays of 32-bit elements, all of one shape.
        outputs: how many there are.

    Returns:
        The outputs, uint32.

    Raises:
        NotImplementedError: the code has an instruction that this model lacks.
    """
    registers: dict[str, Array] = {}
    shape = np.broadcast_shapes(*(value.shape for value in inputs))
    for i, value in enumerate(inputs):
        registers[f"${outputs + i}"] = np.ascontiguousarray(value).view(U32)
    for statement in re.split(r"[;{}]", text):
        words = statement.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        operands = [_value(word, registers, shape) for word in words[2:]]
        registers[words[1]] = _execute(words[0], operands)
    return [registers[f"${i}"] for i in range(outputs)]


def _value(word: str, registers: dict[str, Array], shape: tuple[int, ...]) -> Array:
    return registers[word] if word in registers else np.full(shape, int(word, 0), U32)


def _execute(name: str, operands: list[Array]) -> Array:
    if name == "mov.b32":
        return operands[0]
    if name == "and.b32":
        return operands[0] & operands[1]
    if name == "shr.u32":
        return operands[0] >> operands[1]
    if name == "lop3.b32":
        return _lop3(*operands)
    if name == "prmt.b32":
        return _prmt(*operands)
    if name == "cvt.rn.bf16x2.f32":
        both: Array = (_bf16(operands[0]) << U32(16)) | _bf16(operands[1])
        return both
    if name == "cvt.rn.f16x2.f32":
        pair: Array = (_f16(operands[0]) << U32(16)) | _f16(operands[1])
        return pair
    if name == "cvt.rn.satfinite.e4m3x2.f32":
        couple: Array = (_e4m3(operands[0]) << U32(8)) | _e4m3(operands[1])
        return couple
    if name == "cvt.u32.u16":
        return operands[0]
    raise NotImplementedError(f"the model of PTX needs {name!r}; add it to tests/ptx.py")


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Bit by bit, the entry of `table` at the index that the bits of a, b and c make."""
    out = np.zeros_like(a)
    for index in range(8):
        bits = [
            operand if index & place else ~operand for operand, place in ((a, 4), (b, 2), (c, 1))
        ]
        out |= np.where((table >> U32(index)) & U32(1), bits[0] & bits[1] & bits[2], U32(0))
    return out


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes of (b, a), each chosen by a nibble; its high bit repeats the byte's sign."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> U32(4 * i)) & U32(15)
        byte = ((both >> (8 * (nibble & U32(7))).astype(np.uint64)) & np.uint64(255)).astype(U32)
        sign = np.where(byte & U32(128), U32(255), U32(0))
        out |= np.where(nibble & U32(8), sign, byte) << U32(8 * i)
    return out


def _bf16(bits: Array) -> Array:
    from tests.interpreter import encode

    return encode(bits.view(np.float32)).astype(U32)


def _f16(bits: Array) -> Array:
    with np.errstate(over="ignore"):
        return bits.view(np.float32).astype(np.float16).view(np.uint16).astype(U32)


def _e4m3(bits: Array) -> Array:
    from tests.interpreter import encode_e4m3

    return encode_e4m3(bits.view(np.float32)).astype(U32)
