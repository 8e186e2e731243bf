from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastlora
from fastlora import LoraConfig
from fastlora.weight_reads import Read, weight_reads


class Reader(nn.Module):
    """Reads the values of one weight, facts of two, and calls two more."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.fact, self.checked, self.called, self.inside = (
            nn.Linear(8, 8) for _ in range(5)
        )
        self.inner: Any = nn.Sequential(nn.Linear(8, 8))
        self.inner.deep = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.fact.weight.dtype)
        if isinstance(self.checked.weight, Tensor) and self.checked.weight.device.type == "meta":
            return x
        return self.late(self.called(self.inside(self.fact(self.checked(x)))))

    def late(self, x: Tensor) -> Tensor:
        y: Tensor = functional.linear(x, self.values.weight) @ self.inner.deep.weight
        return y

    def unused(self) -> Tensor:
        return self.never.weight


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reader, self.head = Reader(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.reader(x)) + self.reader.inside.weight.sum()
        return y


def test_what_is_read_is_found() -> None:
    found = weight_reads(Outer())
    assert found == {
        "reader.values": Read("Reader", True),
        "reader.fact": Read("Reader", False),
        "reader.checked": Read("Reader", False),
        "reader.inner.deep": Read("Reader", True),
        "reader.inside": Read("Outer", True),
    }


def test_pytorchs_own_modules_are_seen_to() -> None:
    assert weight_reads(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1)) == {}


def test_such_weights_stay_dense_and_the_report_says_so() -> None:
    model = Outer()
    x = torch.randn(3, 8)
    with pytest.warns(UserWarning, match="reads the weight of 'reader.values' itself, and 2 more"):
        fastlora.patch_model(model, LoraConfig(r=2, target_modules="all-linear"), quantize="nf4")
    model(x).sum().backward()
    rows = {row["module"]: row for row in fastlora.report(model)["modules"]}
    formats = {name: row["format"] for name, row in rows.items()}
    assert formats["reader.called"] == formats["head"] == "nf4"
    assert formats["reader.fact"] == formats["reader.values"] == "dense"
    assert rows["reader.fact"]["notes"] == "kept dense: Reader reads its weight"
    assert rows["reader.inside"]["notes"].endswith("Outer reads its weight past the adapter")


@pytest.mark.parametrize("config", [None, LoraConfig(r=2, target_modules=["called"])])
def test_what_gets_no_adapter_is_skipped(config: Any) -> None:
    model = fastlora.patch_model(Outer(), config, quantize="nf4")
    model(torch.randn(3, 8))
    skipped = fastlora.report(model)["skipped"]
    if config is None:
        assert skipped["reader.values"] == "Reader reads its weight"
        assert skipped["reader.inside"] == "Outer reads its weight"
    assert type(model.reader.values) is nn.Linear
