"""What the fused linear refuses, and in what words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

import fastlora
from fastlora import ops
from tests.ops_cases import make

PLAIN = (0.5, 0.0, None, None)  # scaling; no dropout, no spans
NOTHING = (None, None, None, 0.0, 0.0, None, None)  # neither bias nor update
CASE = make(4, 6, 8, 2, torch.float32, "nf4")
GOOD: dict[str, Any] = {
    "x": CASE.x, "weight": CASE.weight, "bias": CASE.bias,
    "lora_A": CASE.lora_A, "lora_B": CASE.lora_B, "scaling": 1.0, "dropout": 0.5,
    "seed": torch.tensor([1]), "spans": torch.tensor([[0, 2]] * 4).int(), "backend": "reference",
}  # fmt: skip
DENSE = StoredWeight(torch.zeros(6, 8), None, None, None, "dense", 0)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension, got a scalar"),
    ({"x": CASE.x[:, :4]}, ValueError, r"for an input of K = 4 columns must be .*\(6, 4\)"),
    ({"x": CASE.x.int()}, TypeError, "x must be float32, bfloat16 or float16, got torch.int32"),
    ({"x": CASE.x.half(), "weight": DENSE, "bias": None}, TypeError, "must have one dtype"),
    ({"weight": DENSE._replace(data=torch.zeros(6, 9))}, ValueError, r"got \(6, 9\)"),
    ({"weight": DENSE._replace(format="nf3")}, ValueError, "format must be one of"),
    ({"weight": DENSE._replace(format="nf4")}, TypeError, "must be packed uint8 with its absmax"),
    ({"weight": CASE.weight._replace(blocksize=48)}, ValueError, "blocksize must be one of"),
    ({"weight": CASE.weight._replace(blocksize=32)}, ValueError, "absmax must have 2 values"),
    ({"weight": CASE.weight._replace(nested_absmax=None)}, TypeError, "absmax must be float32"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
    ({"bias": torch.zeros(6).half()}, TypeError, "bias must be float32 or torch.float32"),
    ({"lora_A": torch.zeros(2, 9)}, ValueError, r"lora_A must have shape \(r, 8\)"),
    ({"lora_A": torch.zeros(0, 8), "lora_B": torch.zeros(6, 0)}, ValueError, "r at least 1"),
    ({"lora_B": CASE.lora_B.half()}, TypeError, "must both be float32 or torch.float32 like x"),
    ({"lora_A": CASE.lora_A.to("meta")}, ValueError, "all operands must be on one device"),
    ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
    ({"seed": torch.tensor([1.0])}, TypeError, "seed must be one int64, got torch.float32"),
    ({"seed": torch.tensor([1, 2])}, TypeError, r"seed must be one int64, got torch.int64 \(2,\)"),
    ({"spans": torch.zeros(4, 2)}, TypeError, "spans must be int32 of shape"),
    ({"spans": torch.zeros(3, 2).int()}, ValueError, "spans must have one row for each row"),
    ({"weight": CASE.weight._replace(nested_offset=None)}, TypeError, "come together, got only"),
    ({"weight": CASE.weight._replace(nested_offset=torch.zeros(2))}, TypeError, "one float32"),
    ({"weight": CASE.weight._replace(compute="8bit")}, ValueError, "compute must be one of"),
    ({"weight": DENSE._replace(compute="fp8")}, ValueError, "takes a 4-bit weight, got a dense"),
    ({"backend": "cuda"}, ValueError, r"backend must be one of \['auto',"),
    ({"backend": 3}, TypeError, "backend must be a str, got int"),
]


def linear(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, backend: str, **low: Any
) -> Tensor:
    A, B = low.pop("lora_A"), low.pop("lora_B")
    return ops.linear(x, weight, bias, LowRank(A, B, **low), backend)


@pytest.mark.parametrize(("change", "kind", "sentence"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_operands(change: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    args = GOOD | change
    with pytest.raises(kind, match=sentence):
        linear(**args)


@pytest.mark.parametrize(
    ("change", "kind", "sentence"), BAD[1:24], ids=[b[2][:40] for b in BAD[1:24]]
)
def test_bad_operands_say_the_same_when_fake(
    change: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    args = GOOD | change
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: Any) -> Any:
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        weight = StoredWeight(*map(fake, args.pop("weight")))
        operands = {name: fake(value) for name, value in args.items()}
        with pytest.raises(kind, match=sentence):
            linear(weight=weight, **operands)


def test_weight_gradient_is_refused() -> None:
    weight = torch.zeros(6, 8, requires_grad=True)
    sentence = "the weight of a fastlora linear must be frozen"
    with pytest.raises(ValueError, match=sentence):
        fastlora.lora_linear(CASE.x, weight, backend="reference")
    with pytest.raises(ValueError, match=sentence):
        op = torch.ops.fastlora.lora_linear.default
        op(CASE.x, weight, None, None, None, "dense", 0, "auto", *NOTHING, "reference")
    with torch.no_grad():
        assert fastlora.lora_linear(CASE.x, weight, backend="reference").shape == (4, 6)


@pytest.mark.parametrize("through_op", [False, True])
def test_second_derivative_is_refused(through_op: bool) -> None:
    x = CASE.x.clone().requires_grad_()
    flat = (CASE.bias, CASE.lora_A, CASE.lora_B, *PLAIN, "reference")
    update = LowRank(CASE.lora_A, CASE.lora_B, 0.5)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        if through_op:
            y = torch.ops.fastlora.lora_linear(x, *CASE.weight, *flat)[0]
        else:
            y = ops.linear(x, CASE.weight, CASE.bias, update, "reference")
        (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        dx.sum().backward()


def test_backward_op_checks_its_operands() -> None:
    op = torch.ops.fastlora.lora_linear_backward
    tail = (*CASE.weight, CASE.lora_A, CASE.lora_B, *PLAIN)
    with pytest.raises(ValueError, match=r"dy must have shape \(\.\.\., 6\)"):
        op(CASE.dy[:, :5], CASE.x, None, *tail, True, False, "reference")
    with pytest.raises(TypeError, match="dA and dB need x, s and the adapter"):
        op(CASE.dy, CASE.x, None, *tail, True, True, "reference")
    with pytest.raises(ValueError, match="x and dy must have the same rows"):
        op(CASE.dy, CASE.x[:2], torch.zeros(2, 2), *tail, True, True, "reference")
