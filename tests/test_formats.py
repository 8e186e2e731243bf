"""The 4-bit formats: every byte, every tie, and bitsandbytes as the judge."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import bitsandbytes.functional as bnb
import pytest
import torch
from fastlora_kernels.formats import (
    BLOCKSIZES,
    FORMATS,
    NESTED_CODE,
    StoredWeight,
    code_table,
    decoded_absmax,
    dequantize,
    dequantize_absmax,
    dequantize_blocks,
    quantize_absmax,
    quantize_blocks,
    rounding_tables,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 3, 127, 2193, 4099)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    as_int = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(as_int), b.view(as_int))


def bnb_dequantize(packed: Tensor, state: bnb.QuantState, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' floats, read as one row.

    Its AVX-512 kernel reads the wrong magnitude in matrices whose rows are a multiple of 32 but not
    of the block size; its compiled fallback is run eagerly here, for speed.
    """
    nested = {"offset": state.offset, "state2": state.state2}
    row = torch.Size((1, math.prod(state.shape)))
    one = bnb.QuantState(
        state.absmax, row, state.code, state.blocksize, state.quant_type, dtype, **nested
    )
    with torch.compiler.set_stance("force_eager"):
        out: Tensor = bnb.dequantize_4bit(packed, one)
    return out.reshape(state.shape)


def tensors(n: int, book_name: str) -> Iterator[Tensor]:
    """Ordinary, tiny, large, zero, sparse and tied values, (n,) float32."""
    normal = torch.randn(n)
    yield normal
    yield normal * 1e-37
    yield normal.clamp(-3, 3) * 2e4
    yield torch.zeros(n)
    yield torch.where(torch.rand(n) < 0.9, -0.0, normal)
    limits, _ = rounding_tables(FORMATS[book_name], CPU)
    above, below = torch.nextafter(limits, limits + 1), torch.nextafter(limits, limits - 1)
    ties = torch.cat([torch.tensor([1.0, -1.0]), limits, above, below])
    yield ties.repeat(n // ties.numel() + 1)[:n]


@pytest.mark.parametrize("name", FORMATS)
def test_code_books_equal_bitsandbytes(name: str) -> None:
    assert same_bits(code_table(FORMATS[name], CPU), bnb.get_4bit_type(name, device="cpu"))


def test_nested_code_equals_bitsandbytes() -> None:
    theirs, ours = bnb.create_dynamic_map(), torch.tensor(NESTED_CODE)
    assert ours.shape == (256,)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert same_bits(ours, theirs)
    else:  # without fused multiply-add torch.linspace rounds twice
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_byte_decodes_exactly(name: str, dtype: torch.dtype) -> None:
    code = FORMATS[name].code
    packed = torch.arange(256, dtype=torch.uint8)
    absmax = torch.rand(16) * 3
    out = dequantize_blocks(packed, absmax, FORMATS[name], 32, 512, dtype)
    for byte in range(256):
        scale = absmax[byte // 16]
        wanted = torch.stack([code[byte >> 4] * scale, code[byte & 15] * scale]).to(dtype)
        assert same_bits(out[2 * byte : 2 * byte + 2], wanted), byte


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_blocks_equal_bitsandbytes(name: str, blocksize: int, dtype: torch.dtype) -> None:
    book = FORMATS[name]
    for n in SIZES:
        for values in tensors(n, name):
            x = values.to(dtype)
            theirs, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type=name)
            packed, absmax = quantize_blocks(x, book, blocksize)
            assert torch.equal(packed, theirs), n
            assert same_bits(absmax, state.absmax), n
            out = dequantize_blocks(packed, absmax, book, blocksize, n, dtype)
            wanted = bnb_dequantize(theirs, state, dtype)
            assert torch.allclose(out, wanted, rtol=0, atol=1.2e-38), n  # it flushes subnormals
            normal = wanted.abs() >= torch.finfo(dtype).tiny
            assert torch.equal(out[normal], wanted[normal]), n


@pytest.mark.parametrize("name", FORMATS)
def test_values_halfway_take_the_smaller_neighbour(name: str) -> None:
    book = FORMATS[name]
    values = sorted(book.code)
    for low, high in itertools.pairwise(values):
        middle = ((torch.tensor(low) + torch.tensor(high)) / 2).item()
        packed, absmax = quantize_blocks(torch.tensor([1.0, middle]), book, 32)
        assert book.code[int(packed) & 15] == low
        assert absmax.tolist() == [1.0]


def test_subnormal_values_survive() -> None:
    x = torch.tensor([3e-39, -1e-39, 0.0, 2e-40] * 16)
    packed, absmax = quantize_blocks(x, FORMATS["nf4"], 64)
    out = dequantize_blocks(packed, absmax, FORMATS["nf4"], 64, 64, torch.float32)
    code = code_table(FORMATS["nf4"], CPU)
    nibbles = torch.stack([packed[:, 0] >> 4, packed[:, 0] & 15], dim=1).view(-1)
    assert absmax.tolist() == [torch.tensor(3e-39).item()]
    assert same_bits(out, code[nibbles.int()] * absmax)
    assert (out != 0).any()


@pytest.mark.parametrize("blocks", (1, 2, 255, 256, 257, 1500))
@pytest.mark.parametrize("scale", (1e-44, 1e-38, 1.0, 1e30))
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="bitsandbytes' table differs here"
)
def test_nested_equals_bitsandbytes(blocks: int, scale: float) -> None:
    for spread in (0.0, 1e-3, 1.0):
        absmax = (2 + spread * torch.randn(blocks)).abs() * scale
        offset = absmax.mean()
        theirs, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
        codes, nested, mean = quantize_absmax(absmax)
        assert torch.equal(codes, theirs)
        assert same_bits(nested, state.absmax)
        assert mean.item() == offset.item()
        wanted = bnb.dequantize_blockwise(theirs, state) + offset
        assert same_bits(dequantize_absmax(codes, nested, mean), wanted)


def test_absmax_decodes_with_another_table() -> None:
    codes, nested = torch.tensor([0, 255, 127], dtype=torch.uint8), torch.tensor([2.0])
    table = torch.linspace(-1, 1, 256)
    out = dequantize_absmax(codes, nested, torch.tensor(0.5), table)
    assert out.tolist() == [-1.5, 2.5, (table[127] * 2 + 0.5).item()]


blocks_of_floats = st.lists(
    st.floats(-(2.0**99), 2.0**99, width=32).filter(lambda v: v == 0 or abs(v) > 2.0**-99),
    min_size=1,
    max_size=150,
)


@settings(max_examples=60, deadline=None)
@given(values=blocks_of_floats, name=st.sampled_from(sorted(FORMATS)))
def test_error_is_at_most_half_the_widest_step(values: list[float], name: str) -> None:
    x, book = torch.tensor(values), FORMATS[name]
    packed, absmax = quantize_blocks(x, book, 32)
    out = dequantize_blocks(packed, absmax, book, 32, len(values), torch.float32)
    code = sorted(book.code)
    widest = max(high - low for low, high in itertools.pairwise(code))
    bound = absmax.repeat_interleave(32)[: len(values)].double() * (widest / 2 + 1e-6)
    assert ((out.double() - x.double()).abs() <= bound).all()


@settings(max_examples=60, deadline=None)
@given(values=blocks_of_floats, name=st.sampled_from(sorted(FORMATS)))
def test_requantising_changes_nothing(values: list[float], name: str) -> None:
    x, book, n = torch.tensor(values), FORMATS[name], len(values)
    packed, absmax = quantize_blocks(x, book, 32)
    out = dequantize_blocks(packed, absmax, book, 32, n, torch.float32)
    again, absmax_again = quantize_blocks(out, book, 32)
    assert torch.equal(absmax_again, absmax)
    assert torch.equal(dequantize_blocks(again, absmax, book, 32, n, torch.float32), out)
    if len(set(book.code)) == 16:  # one nibble per value
        assert torch.equal(again, packed)


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=80),
    odd=st.booleans(),
    blocksize=st.sampled_from(BLOCKSIZES),
    name=st.sampled_from(sorted(FORMATS)),
)
def test_any_bytes_decode(data: bytes, odd: bool, blocksize: int, name: str) -> None:
    n, code = 2 * len(data) - odd, FORMATS[name].code
    absmax = torch.rand(-(-n // blocksize))
    packed = torch.tensor(list(data), dtype=torch.uint8)
    out = dequantize_blocks(packed, absmax, FORMATS[name], blocksize, n, torch.float32)
    nibbles = [nibble for byte in data for nibble in (byte >> 4, byte & 15)][:n]
    wanted = [code[nibble] * absmax[i // blocksize] for i, nibble in enumerate(nibbles)]
    assert same_bits(out, torch.stack(wanted))


def test_long_tensors_are_quantised_in_pieces_that_fit() -> None:
    x = torch.randn((1 << 18) + 4096 + 77)
    packed, absmax = quantize_blocks(x, FORMATS["nf4"], 4096)
    pieces = [quantize_blocks(part, FORMATS["nf4"], 4096) for part in x.split(4096)]
    assert torch.equal(packed, torch.cat([piece[0] for piece in pieces]))
    assert torch.equal(absmax, torch.cat([piece[1] for piece in pieces]))
    out = dequantize_blocks(packed, absmax, FORMATS["nf4"], 4096, x.numel(), torch.float32)
    parts = [
        dequantize_blocks(p, a, FORMATS["nf4"], 4096, part.numel(), torch.float32)
        for (p, a), part in zip(pieces, x.split(4096), strict=True)
    ]
    assert torch.equal(out, torch.cat(parts))


def test_a_stored_weight_dequantises() -> None:
    dense = torch.randn(3, 5)
    stored = StoredWeight(dense, None, None, None, "dense", 0)
    assert torch.equal(dequantize(stored, 3, 5, torch.bfloat16), dense.bfloat16())
    packed, absmax = quantize_blocks(dense.view(-1), FORMATS["fp4"], 64)
    codes, nested, offset = quantize_absmax(absmax)
    stored = StoredWeight(packed, codes, nested, offset, "fp4", 64)
    flat = dequantize_blocks(packed, decoded_absmax(stored), FORMATS["fp4"], 64, 15, torch.float32)
    assert torch.equal(dequantize(stored, 3, 5, torch.float32), flat.view(3, 5))


def test_a_dense_weight_has_no_magnitudes() -> None:
    with pytest.raises(ValueError, match=r"block magnitudes need a 4-bit weight, .* 'dense'"):
        decoded_absmax(StoredWeight(torch.ones(2, 2), None, None, None, "dense", 0))
