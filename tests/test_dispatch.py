"""The dispatcher: priorities, refusals with every reason, names."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import fastlora
from fastlora import dispatch
from fastlora.dispatch import Problem

PROBLEM = Problem("lora_linear", "cpu", torch.float32, "nf4", 64, 4, 8, 8, 2, torch.float32)


def fake(priority: int, reason: str | None, **attributes: Any) -> ModuleType:
    module: Any = ModuleType("fake")
    module.PRIORITY = priority
    module.why_not = lambda problem: reason
    module.lora_linear = lambda *args: args
    for name, value in attributes.items():
        setattr(module, name, value)
    result: ModuleType = module
    return result


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(**modules: ModuleType | str) -> None:
        monkeypatch.setattr(dispatch, "backend_names", lambda: tuple(modules))
        monkeypatch.setattr(dispatch, "_load", modules.__getitem__)

    return install


def test_highest_priority_that_accepts(use: Any) -> None:
    slow, fast, picky = fake(0, None), fake(20, None), fake(30, "is picky")
    use(slow=slow, fast=fast, picky=picky)
    assert dispatch.pick(PROBLEM) is fast
    assert dispatch.pick(PROBLEM, "slow") is slow
    assert dispatch.explain(PROBLEM) == {"picky": "is picky", "fast": None, "slow": None}
    assert list(dispatch.explain(PROBLEM)) == ["picky", "fast", "slow"]


def test_refusal_lists_every_reason(use: Any) -> None:
    other = fake(5, None)
    del other.lora_linear
    use(a=fake(1, "reason one"), b=other, c="the package c is not installed")
    with pytest.raises(NotImplementedError) as error:
        dispatch.pick(PROBLEM)
    text = str(error.value)
    assert text.startswith("no backend runs Problem(op='lora_linear', device='cpu'")
    for reason in (
        "a: reason one",
        "b: does not implement lora_linear",
        "c: the package c is not installed",
    ):
        assert reason in text


def test_named_backend_stands_alone(use: Any) -> None:
    use(a=fake(1, "reason one"), b=fake(0, None), c="the package c is not installed")
    with pytest.raises(NotImplementedError, match=r"a: reason one$"):
        dispatch.pick(PROBLEM, "a")
    with pytest.raises(NotImplementedError, match="c: the package c is not installed"):
        dispatch.pick(PROBLEM, "c")


def test_auto_devices(use: Any) -> None:
    simulated, plain = fake(9, None, AUTO_DEVICES=("cuda",)), fake(0, None)
    use(simulated=simulated, plain=plain)
    assert dispatch.pick(PROBLEM) is plain
    assert dispatch.pick(PROBLEM, "simulated") is simulated
    reason = dispatch.explain(PROBLEM)["simulated"]
    assert reason is not None and "only when asked for by name" in reason


def test_import_error_of_a_backend_is_not_swallowed(use: Any) -> None:
    def missing(problem: Problem) -> str | None:
        raise ImportError("the native library is missing")

    use(broken=fake(20, None, why_not=missing), plain=fake(0, None))
    with pytest.raises(ImportError, match="the native library is missing"):
        dispatch.pick(PROBLEM)
    assert dispatch.pick(PROBLEM, "plain").PRIORITY == 0


def test_real_backends_are_found() -> None:
    assert {"native", "reference", "triton"} <= set(dispatch.backend_names())
    assert dispatch.pick(PROBLEM, "reference").__name__ == "fastlora.backends.reference"


def test_real_refusals_name_each_reason() -> None:
    half = Problem("lora_linear", "cuda", torch.float16, "nf4", 64, 4, 8, 8, 2, torch.float32)
    with pytest.raises(NotImplementedError, match="native: runs on cpu only"):
        dispatch.pick(half, "native")
    with pytest.raises(NotImplementedError, match=r"triton: .*(GPU|triton)"):
        dispatch.pick(PROBLEM, "triton")


def test_backend_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of \['auto', .*got 'gpu'"):
        fastlora.lora_linear(torch.zeros(1, 8), torch.zeros(8, 8), backend="gpu")


def test_choice_is_remembered() -> None:
    kind = ("cpu", torch.float32, "dense", 0, 4, 8, 8, 0, None, "reference")
    dispatch.choose.cache_clear()
    first = dispatch.choose("lora_linear", *kind)
    assert dispatch.choose("lora_linear", *kind) is first
    assert dispatch.choose.cache_info().hits == 1
