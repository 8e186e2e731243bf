"""4-bit weights against bitsandbytes: bytes, floats, files, live objects, and each error."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from fastlora_kernels.formats import BLOCKSIZES, FORMATS, decoded_absmax, dequantize, nested_table
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlora import QuantConfig, QuantizedWeight, quantize_4bit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (1, 3), (3, 17), (17, 129), (64, 64), (1000, 3), (5, 4100), (7,), (2, 3, 16))
needs_same_table = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="bitsandbytes' table differs here"
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    as_int = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(as_int), b.view(as_int))


def bnb_quantize(weight: Tensor, config: QuantConfig, **kwargs: Any) -> tuple[Tensor, Any]:
    packed, state = bnb_functional.quantize_4bit(
        weight,
        blocksize=config.blocksize,
        quant_type=config.quant_type,
        compress_statistics=config.double_quant,
        **kwargs,
    )
    return packed, state


def bnb_dequantize(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """As one row, which every kernel of bitsandbytes reads right; see test_formats.py."""
    one = copy.copy(state)
    one.shape, one.dtype = torch.Size((1, state.shape.numel())), dtype
    with torch.compiler.set_stance("force_eager"):
        out: Tensor = bnb_functional.dequantize_4bit(packed, one)
    return out.reshape(state.shape)


def quantize(weight: Tensor, config: QuantConfig) -> QuantizedWeight:
    return quantize_4bit(weight, config.quant_type, config.blocksize, config.double_quant)


@pytest.fixture(params=itertools.product(sorted(FORMATS), (False, True)), ids=str)
def scheme(request: pytest.FixtureRequest) -> tuple[str, bool]:
    pair: tuple[str, bool] = request.param
    return pair


def a_weight(**kwargs: Any) -> QuantizedWeight:
    return quantize_4bit(torch.randn(96, 64, dtype=torch.bfloat16), **kwargs)


# -- bytes and floats ------------------------------------------------------------------------------


@needs_same_table
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_bitsandbytes(scheme: tuple[str, bool], blocksize: int, dtype: torch.dtype) -> None:
    config = QuantConfig(scheme[0], blocksize, scheme[1])
    for shape in SHAPES:
        weight = torch.randn(shape).to(dtype)
        packed, state = bnb_quantize(weight, config)
        ours = quantize(weight, config)
        assert torch.equal(ours.packed, packed), shape
        assert same_bits(ours.absmax, state.absmax), shape
        assert (ours.shape, ours.dtype) == (shape, dtype)
        if config.double_quant:
            assert ours.nested_absmax is not None
            assert same_bits(ours.nested_absmax, state.state2.absmax), shape
            assert ours.nested_offset is not None
            assert same_bits(ours.nested_offset, state.offset), shape
        for out_dtype in DTYPES if blocksize == 64 else (dtype,):
            out = ours.dequantize(out_dtype)
            assert (out.shape, out.dtype) == (shape, out_dtype)
            assert torch.equal(out, bnb_dequantize(packed, state, out_dtype)), (shape, out_dtype)
        assert torch.equal(ours.dequantize(), ours.dequantize(dtype))


def test_layout_of_the_weight_does_not_matter(scheme: tuple[str, bool]) -> None:
    weight = torch.randn(48, 80)
    strided = torch.empty(80, 48).t().copy_(weight).requires_grad_()
    ours, wanted = (quantize_4bit(w, scheme[0], 64, scheme[1]) for w in (strided, weight))
    assert torch.equal(ours.packed, wanted.packed)
    assert torch.equal(ours.absmax, wanted.absmax)
    assert not ours.dequantize().requires_grad


def test_large_weights_equal_bitsandbytes() -> None:
    weight = torch.randn(700, 1024, dtype=torch.bfloat16)
    packed, state = bnb_quantize(weight, QuantConfig(double_quant=False))
    ours = quantize_4bit(weight, double_quant=False)
    assert torch.equal(ours.packed, packed)
    assert same_bits(ours.absmax, state.absmax)
    assert same_bits(ours.dequantize(), bnb_functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize(("n", "k", "shape"), ((6, 64, (6, 32)), (5, 7, (18, 1))))
def test_stored_shares_memory_and_dequantises(
    scheme: tuple[str, bool], n: int, k: int, shape: tuple[int, int]
) -> None:
    ours = quantize_4bit(torch.randn(n, k), scheme[0], 32, scheme[1])
    stored = ours.stored()
    assert tuple(stored.data.shape) == shape
    assert stored.data.data_ptr() == ours.packed.data_ptr()
    assert (stored.format, stored.blocksize) == (scheme[0], 32)
    assert torch.equal(dequantize(stored, n, k, torch.float32), ours.dequantize())


def test_sizes_and_devices() -> None:
    ours = a_weight()
    assert ours.numel == 96 * 64
    assert ours.nbytes == 96 * 32 + 96 + 4 + 4
    assert a_weight(double_quant=False).nbytes == 96 * 32 + 96 * 4
    moved = ours.to("meta")
    assert {moved.packed.device.type, moved.absmax.device.type} == {"meta"}
    assert moved.nested_absmax is not None and moved.nested_absmax.device.type == "meta"
    assert moved.nested_offset is not None and moved.nested_offset.device.type == "meta"
    assert ours.to("cpu").packed.data_ptr() == ours.packed.data_ptr()


# -- files -----------------------------------------------------------------------------------------


@needs_same_table
@pytest.mark.parametrize("shape", ((64, 96), (3, 5)))
def test_state_dict_equals_bitsandbytes(scheme: tuple[str, bool], shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).half()
    packed, state = bnb_quantize(weight, QuantConfig(scheme[0], 64, scheme[1]))
    wanted = {"": packed} | {f".{k}": v for k, v in state.as_dict(packed=True).items()}
    ours = quantize_4bit(weight, scheme[0], 64, scheme[1]).state_dict("a.b")
    assert set(ours) == {f"a.b{name}" for name in wanted}
    for name, tensor in wanted.items():
        assert same_bits(ours[f"a.b{name}"], tensor), name


@needs_same_table
def test_equals_what_transformers_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    for quant_type, double_quant in (("nf4", True), ("fp4", False)):
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double_quant,
        )
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        theirs.save_pretrained(tmp_path / quant_type)
        saved = load_file(tmp_path / quant_type / "model.safetensors")
        for name, module in model.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                prefix = f"model.layers.{name}.weight"
                ours = quantize_4bit(module.weight, quant_type, 64, double_quant).state_dict(prefix)
                assert set(ours) == {key for key in saved if key.startswith(prefix)}
                assert all(same_bits(tensor, saved[key]) for key, tensor in ours.items())
                read = QuantizedWeight.from_state_dict(saved, prefix)
                assert torch.equal(read.dequantize(), quantize_4bit_like(read, module.weight))


def quantize_4bit_like(read: QuantizedWeight, weight: Tensor) -> Tensor:
    return quantize_4bit(weight, read.quant_type, read.blocksize, read.double_quant).dequantize()


def test_state_dict_round_trip(scheme: tuple[str, bool], tmp_path: Path) -> None:
    ours = a_weight(quant_type=scheme[0], blocksize=128, double_quant=scheme[1])
    other = {"up.weight_scale": torch.ones(1), "up.bias": torch.ones(96)}
    save_file(ours.state_dict("up.weight") | other, tmp_path / "w.safetensors")
    read = QuantizedWeight.from_state_dict(load_file(tmp_path / "w.safetensors"), "up.weight")
    assert same_fields(read, ours)


def same_fields(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    pairs = ((getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
    return all(same_bits(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("storage", (torch.bfloat16, torch.float16, torch.float32))
def test_reads_other_storage_types(storage: torch.dtype) -> None:
    weight = torch.randn(96, 64, dtype=torch.bfloat16)
    packed, state = bnb_quantize(weight, QuantConfig(), quant_storage=storage)
    assert packed.dtype == storage
    ours = quantize_4bit(weight)
    tensors = ours.state_dict() | {"weight": packed}
    assert same_fields(QuantizedWeight.from_state_dict(tensors), ours)
    live = QuantizedWeight.from_bnb((packed, state))
    assert live.packed.data_ptr() == packed.data_ptr()
    assert torch.equal(live.packed, ours.packed)


def test_magnitudes_coded_with_another_machines_table_stay_exact() -> None:
    ours = a_weight()
    table = nested_table(torch.device("cpu")).clone()
    table[1:-1] = torch.nextafter(table[1:-1], table[1:-1] + 1)
    read = QuantizedWeight.from_state_dict(ours.state_dict() | {"weight.nested_quant_map": table})
    assert not read.double_quant
    assert ours.nested_absmax is not None and ours.nested_offset is not None
    wanted = table[ours.absmax.int()] * ours.nested_absmax + ours.nested_offset
    assert same_bits(read.absmax, wanted)
    assert not torch.equal(read.absmax, decoded_absmax(ours.stored()))


# -- live objects ----------------------------------------------------------------------------------


def test_from_bnb_shares_memory(scheme: tuple[str, bool]) -> None:
    weight = torch.randn(64, 128)
    layer = bnb.nn.Linear4bit(
        128, 64, bias=False, quant_type=scheme[0], compress_statistics=scheme[1]
    )
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), quant_type=scheme[0], compress_statistics=scheme[1]
    )
    param = layer.to("cpu").weight
    ours = QuantizedWeight.from_bnb(param)
    assert type(ours.packed) is Tensor
    assert ours.packed.data_ptr() == param.data_ptr()
    assert ours.absmax.data_ptr() == param.quant_state.absmax.data_ptr()
    assert torch.equal(ours.dequantize(), bnb_functional.dequantize_4bit(param, param.quant_state))
    pair = QuantizedWeight.from_bnb((param.data, param.quant_state))
    assert same_fields(pair, ours)


def test_to_bnb_shares_memory(scheme: tuple[str, bool]) -> None:
    ours = a_weight(quant_type=scheme[0], double_quant=scheme[1])
    param = ours.to_bnb()
    assert isinstance(param, bnb.nn.Params4bit)
    assert not param.requires_grad
    assert param.data_ptr() == ours.packed.data_ptr()
    assert param.quant_state.absmax.data_ptr() == ours.absmax.data_ptr()
    assert same_fields(QuantizedWeight.from_bnb(param), ours)
    assert torch.equal(bnb_functional.dequantize_4bit(param, param.quant_state), ours.dequantize())
    same = param.to("cpu")
    assert torch.equal(same, param)  # already quantised: moving it does not quantise again


def test_a_bitsandbytes_layer_runs_and_saves_our_weight() -> None:
    ours = a_weight(double_quant=False)
    layer = bnb.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.float32)
    layer.weight = ours.to_bnb()
    x = torch.randn(5, 64)
    wanted = x @ ours.dequantize(torch.float32).t()
    assert torch.allclose(layer.train()(x), wanted, rtol=1e-4, atol=1e-4)
    saved = layer.state_dict()
    assert all(same_bits(saved[name], tensor) for name, tensor in ours.state_dict().items())


def test_a_weight_repacked_for_cpu_is_put_back_in_order(scheme: tuple[str, bool]) -> None:
    ours = quantize_4bit(torch.randn(64, 192).bfloat16(), scheme[0], 64, scheme[1])
    source = copy.deepcopy(ours.to_bnb())
    repacked, state = bnb_functional._convert_weight_packed_for_cpu(source.data, source.quant_state)
    before = repacked.clone()
    assert not torch.equal(repacked.view(-1), ours.packed.view(-1))
    read = QuantizedWeight.from_bnb((repacked, state))
    assert torch.equal(read.packed, ours.packed)
    assert torch.equal(read.absmax, decoded_absmax(ours.stored()).bfloat16().float())
    assert (read.dtype, read.shape, read.double_quant) == (ours.dtype, ours.shape, False)
    assert torch.equal(repacked, before)
    assert state.packing_format_for_cpu  # theirs is as it was
