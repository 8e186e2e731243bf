"""Each sentence that a 4-bit weight refuses with."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from torch import Tensor

from fastlora import QuantConfig, QuantizedWeight, quantize_4bit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE = "weight.quant_state.bitsandbytes__nf4"


def a_weight(**kwargs: Any) -> QuantizedWeight:
    return quantize_4bit(torch.randn(96, 64, dtype=torch.bfloat16), **kwargs)


def nan_weight() -> Tensor:
    weight = torch.randn(64, 64)
    weight[3, 4], weight[5, 6], weight[63, 63] = float("nan"), float("inf"), -float("inf")
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", (False, True))
def test_weights_that_are_not_finite_are_refused(dtype: torch.dtype, double_quant: bool) -> None:
    with pytest.raises(ValueError, match="3 of its 4096 values are NaN or infinite; repair"):
        quantize_4bit(nan_weight().to(dtype), double_quant=double_quant)


@pytest.mark.parametrize(
    ("weight", "kwargs", "error", "sentence"),
    (
        ([1.0], {}, TypeError, "weight must be a tensor, got list"),
        (
            torch.ones(4, dtype=torch.int32),
            {},
            TypeError,
            "weight must be float32, .* got torch.int32",
        ),
        (
            torch.ones(4).double(),
            {},
            TypeError,
            "weight must be float32, .* got torch.float64; convert",
        ),
        (torch.ones(()), {}, ValueError, r"at least one dimension and one value, got shape \(\)"),
        (torch.ones(0, 4), {}, ValueError, r"one value, got shape \(0, 4\)"),
        (torch.ones(4), {"quant_type": "int4"}, ValueError, "one of .'fp4', 'nf4'., got 'int4'"),
        (torch.ones(4), {"blocksize": 48}, ValueError, "blocksize must be one of .32, .* got 48"),
        (torch.ones(4), {"blocksize": True}, ValueError, "blocksize must be one of .* got True"),
        (torch.ones(4), {"double_quant": 1}, TypeError, "double_quant must be True or False"),
        (torch.full((4096,), 3e38), {}, ValueError, "reach 3e.38; pass double_quant=False"),
    ),
)
def test_quantize_refuses(weight: Any, kwargs: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        quantize_4bit(weight, **kwargs)


def test_config_refuses_what_quantize_refuses() -> None:
    with pytest.raises(ValueError, match="quant_type must be one of"):
        QuantConfig("nf3")
    with pytest.raises(ValueError, match="blocksize must be one of"):
        QuantConfig(blocksize=0)
    with pytest.raises(TypeError, match="double_quant must be True or False, got 'yes'"):
        QuantConfig(double_quant="yes")  # type: ignore[arg-type]


def test_a_weight_refuses_what_does_not_fit() -> None:
    ours = a_weight(double_quant=False)
    with pytest.raises(
        ValueError, match=r"packed of .* must be contiguous torch.uint8 \(3072, 1\)"
    ):
        replace(ours, packed=ours.packed[:-1])
    with pytest.raises(ValueError, match=r"absmax .* torch.float32 \(96,\), got torch.float64"):
        replace(ours, absmax=ours.absmax.double())
    with pytest.raises(ValueError, match=r"nested_absmax .* \(1,\), got torch.float32 \(2,\)"):
        replace(ours, absmax=ours.absmax.to(torch.uint8), nested_absmax=torch.ones(2))
    with pytest.raises(TypeError, match=r"the dtype to dequantise to must .* got torch.int8"):
        ours.dequantize(torch.int8)
    with pytest.raises(ValueError, match=r"reads a matrix, but .* shape \(2, 2, 2\)"):
        quantize_4bit(torch.ones(2, 2, 2)).stored()


def described(**changes: Any) -> Tensor:
    """The description of `a_weight()`, changed; None drops an entry."""
    entries: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [96, 64],
    }
    entries |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.5}
    kept = {key: value for key, value in (entries | changes).items() if value is not None}
    return torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)


def test_the_description_itself_is_good() -> None:
    read = QuantizedWeight.from_state_dict(a_weight().state_dict() | {STATE: described()})
    assert read.nested_offset == 2.5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    (
        ({"weight": None}, r"'weight' must have all of its tensors, got none named .'weight'."),
        ({"weight.absmax": None}, "none named .'weight.absmax'."),
        ({"weight.nested_absmax": None}, "none named .'weight.nested_absmax'."),
        ({STATE: None}, "must have one description .* got none"),
        ({"weight.quant_state.bitsandbytes__fp4": described()}, "one description .* got .'quant_"),
        ({"weight.SCB": torch.ones(1)}, "its own tensors only, got also .'SCB'."),
        ({"weight": torch.zeros(3071, 1).byte()}, r"does not fit .* \(3072, 1\), got .* \(3071, 1"),
        ({"weight": torch.zeros(3072).byte()}, r"packed bytes \(length, 1\) .* \(3072,\)"),
        ({"weight": torch.zeros(3072, 1).int()}, "packed bytes .* got torch.int32"),
        (
            {"weight.absmax": torch.ones(96)},
            "does not fit .* absmax .* torch.uint8 .*, got torch.float32",
        ),
        ({"weight.absmax": torch.ones(95).byte()}, r"does not fit .* absmax .* got .* \(95,\)"),
        ({"weight.nested_absmax": torch.ones(2)}, r"does not fit .* nested_absmax .* \(2,\)"),
        ({"weight.nested_absmax": torch.tensor([float("nan")])}, "a finite nested_absmax, got NaN"),
        ({"weight.quant_map": torch.zeros(16)}, "the 16 values of nf4 as quant_map"),
        ({"weight.quant_map": torch.zeros(15)}, "the 16 values of nf4 as quant_map"),
        ({"weight.nested_quant_map": torch.zeros(256)}, "the 256 values of the dynamic 8-bit map"),
        ({"weight.nested_quant_map": torch.zeros(3)}, "the 256 values of the dynamic 8-bit map"),
        ({STATE: torch.tensor([123, 34], dtype=torch.uint8)}, "a description in JSON, got b'{\"'"),
        ({STATE: torch.tensor([255, 34], dtype=torch.uint8)}, "a description in JSON"),
        ({STATE: torch.full((4096,), 91, dtype=torch.uint8)}, "a description in JSON"),
        ({STATE: torch.zeros(5000, dtype=torch.uint8)}, "a description of at most 4096 uint8"),
        ({STATE: torch.zeros(8)}, "a description of at most 4096 uint8, got torch.float32"),
        ({STATE: described(blocksize=None)}, "a description with exactly"),
        ({STATE: described(extra=1)}, "a description with exactly"),
        ({STATE: described(quant_type="fp4")}, "quant_type 'nf4', got 'fp4'"),
        ({STATE: described(blocksize=65)}, "a valid blocksize, got 65"),
        ({STATE: described(blocksize=64.0)}, "a valid blocksize, got 64.0"),
        ({STATE: described(dtype="int8")}, "a valid dtype, got 'int8'"),
        ({STATE: described(shape=[96, -64])}, "a valid shape, got .96, -64."),
        ({STATE: described(shape="96")}, "a valid shape, got '96'"),
        ({STATE: described(shape=[96, 66])}, r"does not fit .* shape \(96, 66\) .* got"),
        ({STATE: described(nested_blocksize=128)}, "a valid nested_blocksize, got 128"),
        ({STATE: described(nested_dtype="float16")}, "a valid nested_dtype, got 'float16'"),
        ({STATE: described(nested_offset=float("inf"))}, "a valid nested_offset, got inf"),
        ({STATE: described(nested_offset=1e300)}, "a valid nested_offset, got 1e.300"),
        ({STATE: described(nested_offset="0")}, "a valid nested_offset, got '0'"),
    ),
)
def test_damaged_files_are_refused(changes: dict[str, Tensor | None], sentence: str) -> None:
    tensors = a_weight().state_dict() | changes
    with pytest.raises(ValueError, match=sentence):
        QuantizedWeight.from_state_dict({k: v for k, v in tensors.items() if v is not None})


def test_from_bnb_refuses() -> None:
    with pytest.raises(TypeError, match=r"from_bnb takes a bitsandbytes Params4bit .* got Tensor"):
        QuantizedWeight.from_bnb(torch.ones(4, 4))
    with pytest.raises(TypeError, match=r"from_bnb takes .* got tuple"):
        QuantizedWeight.from_bnb((torch.ones(4, 4), torch.ones(1)))
    with pytest.raises(ValueError, match="must be quantised before it is converted"):
        QuantizedWeight.from_bnb(bnb.nn.Params4bit(torch.ones(4, 4)))
    packed, state = bnb_functional.quantize_4bit(torch.ones(4, 4), compress_statistics=True)
    state.state2.blocksize = 512
    with pytest.raises(ValueError, match="must come in groups of 256, got 512"):
        QuantizedWeight.from_bnb((packed, state))
    state.quant_type = "int4"
    with pytest.raises(ValueError, match=r"must have a quant_type of .* got 'int4' and 64"):
        QuantizedWeight.from_bnb((packed, state))
