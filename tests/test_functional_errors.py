"""What the public functions refuse, each in one clear sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora

N, K = 6, 8
COMMON: dict[str, Any] = {"x": torch.zeros(4, K), "weight": torch.zeros(N, K), "bias": None}
LORA = {"lora_A": torch.zeros(2, K), "lora_B": torch.zeros(N, 2)}
HADA = {"w1_a": torch.zeros(N, 2), "w1_b": torch.zeros(2, K),
        "w2_a": torch.zeros(N, 3), "w2_b": torch.zeros(3, K)}  # fmt: skip
KRON: dict[str, Any] = {"w1": torch.zeros(2, 4), "w2": (torch.zeros(3, 1), torch.zeros(1, 2))}
MULTI: dict[str, Any] = {
    "lora_A": [torch.zeros(2, K), torch.zeros(1, K)],
    "lora_B": [torch.zeros(N, 2), torch.zeros(N, 1)],
    "scaling": [1.0, 2.0],
    "adapter_ids": torch.tensor([0, 1, -1, 0]),
}
GOOD: dict[str, dict[str, Any]] = {
    "lora_linear": LORA,
    "dora_linear": {**LORA, "magnitude": torch.ones(N)},
    "hada_linear": HADA,
    "kron_linear": KRON,
    "multi_lora_linear": MULTI,
}
Bad = tuple[str, dict[str, Any], type[Exception], str]
EVERYWHERE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight": [1.0]}, TypeError, "weight must be a Tensor or a QuantizedWeight, got list"),
    ({"weight": torch.zeros(K)}, ValueError, r"weight must have shape \(N, K\), got \(8,\)"),
    ({"x": torch.zeros(4, K).half()}, TypeError, "must have one dtype"),
    ({"x": torch.zeros(4, K - 1)}, ValueError, "K = 7 like the input"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(6,\)"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
]
DROPOUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
    ({"dropout": -0.1}, ValueError, "dropout must be at least 0 and below 1, got -0.1"),
    ({"dropout": 0.5, "seed": torch.zeros(2).long()}, TypeError, "seed must be one int64"),
]
BAD: list[Bad] = [
    *((name, *entry) for name in GOOD for entry in EVERYWHERE),
    *((n, *entry) for n in ("lora_linear", "hada_linear", "kron_linear") for entry in DROPOUT),
    ("kron_linear", {"w2": torch.zeros(3, 2), "dropout": 2.0}, ValueError, "below 1, got 2.0"),
    ("lora_linear", {"lora_B": None}, TypeError, "lora_A and lora_B come together"),
    ("dora_linear", {"lora_A": None, "lora_B": None}, TypeError, "needs lora_A and lora_B"),
    ("dora_linear", {"magnitude": torch.ones(5)}, ValueError, r"magnitude must have shape \(6,\)"),
    ("dora_linear", {"magnitude": torch.ones(6).int()}, TypeError, "magnitude must be floating"),
    ("dora_linear", {"norms": torch.ones(1)}, ValueError, r"norms must have shape \(6,\), got"),
    ("hada_linear", {"w1_b": torch.zeros(3, K)}, ValueError, r"w1_b must have shape \(2, 8\)"),
    ("hada_linear", {"w2_a": torch.zeros(5, 3)}, ValueError, r"w2_a must have shape \(6, 3\)"),
    ("hada_linear", {"w2_a": torch.zeros(N, 3).half()}, TypeError, "w1_a, w1_b, w2_a, w2_b must"),
    ("hada_linear", {"w2_b": HADA["w2_b"].to("meta")}, ValueError, "one device, got w2_b on meta"),
    ("kron_linear", {"w1": torch.zeros(2, 3)}, ValueError, r"the weight's \(6, 8\), got \(2, 3\)"),
    ("kron_linear", {"w1": 3}, TypeError, "w1 must be a Tensor or a pair of Tensors, got int"),
    (
        "kron_linear",
        {"w1": torch.zeros(2)},
        ValueError,
        r"w1 must have two dimensions, got .*\(2,\)",
    ),
    ("hada_linear", {"w2_a": torch.tensor(1.0)}, ValueError, "w2_a must have two dimensions"),
    ("multi_lora_linear", {"lora_A": [torch.zeros(2)] * 2}, ValueError, "two dimensions"),
    (
        "kron_linear",
        {"w2": (torch.zeros(3, 2), torch.zeros(1, 2))},
        ValueError,
        r"w2\[0\] must have shape \(3, 1\), got \(3, 2\)",
    ),
    ("kron_linear", {"w1": torch.zeros(2, 4).half()}, TypeError, r"w1, w2\[0\], w2\[1\] must all"),
    ("multi_lora_linear", {"scaling": [1.0]}, ValueError, "one entry per adapter, .*2, 2 and 1"),
    (
        "multi_lora_linear",
        {"lora_A": [], "lora_B": [], "scaling": []},
        ValueError,
        "at least one, got 0, 0 and 0",
    ),
    (
        "multi_lora_linear",
        {"lora_B": [torch.zeros(N, 2), torch.zeros(N, 2)]},
        ValueError,
        r"lora_B\[1\] must have shape \(6, 1\)",
    ),
    ("multi_lora_linear", {"adapter_ids": torch.zeros(4)}, TypeError, "int32 or int64"),
    (
        "multi_lora_linear",
        {"adapter_ids": torch.zeros(3).long()},
        ValueError,
        r"the first dimensions of x's \(4,\), got \(3,\)",
    ),
    (
        "multi_lora_linear",
        {"adapter_ids": torch.tensor([0, 1, 2, 0])},
        ValueError,
        "from -1, no adapter, to 1, got 0 to 2",
    ),
    (
        "multi_lora_linear",
        {"adapter_ids": torch.tensor([0, 1, -2, 0])},
        ValueError,
        "from -1, no adapter, to 1, got -2 to 1",
    ),
]


@pytest.mark.parametrize("name", GOOD)
def test_the_good_operands_are_good(name: str) -> None:
    y: Tensor = getattr(fastlora, name)(**COMMON, **GOOD[name])
    assert y.shape == (4, N)


@pytest.mark.parametrize(
    ("name", "change", "kind", "sentence"), BAD, ids=[f"{b[0]}: {b[3][:30]}" for b in BAD]
)
def test_bad_operands(
    name: str, change: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        getattr(fastlora, name)(**(COMMON | GOOD[name] | change))


@pytest.mark.parametrize("name", GOOD)
def test_a_weight_that_wants_a_gradient_is_refused(name: str) -> None:
    weight = torch.zeros(N, K, requires_grad=True)
    with pytest.raises(ValueError, match="the weight of a fastlora linear must be frozen"):
        getattr(fastlora, name)(**(COMMON | GOOD[name] | {"weight": weight}))


def test_a_packed_weight_of_one_column_is_refused() -> None:
    column = fastlora.quantize_4bit(torch.ones(3, 1))
    with pytest.raises(ValueError, match="one column must have an even number of rows"):
        fastlora.lora_linear(torch.ones(2, 1), column)


@pytest.mark.parametrize("name", GOOD)
def test_the_second_derivative_is_refused(name: str) -> None:
    x = torch.zeros(4, K, requires_grad=True)
    y = getattr(fastlora, name)(**(COMMON | GOOD[name] | {"x": x}))
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(y.sin().sum(), x, create_graph=True)
