"""fuse_groups: what it finds, and that results stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig, fuse_groups, patch_model
from tests.fuse_cases import (
    CONFIGS,
    IDS,
    Three,
    X,
    assert_same,
    fused,
    joined,
    model_of,
    results,
    watch_sizes,
)
from tests.models import fill_adapters, llama


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the groups that are computed, as they come."""
    return watch_sizes(monkeypatch)


@pytest.mark.parametrize("name", CONFIGS)
def test_results_are_the_same(name: str, widths: list[int], backend: str) -> None:
    plain = model_of(joined, CONFIGS[name], 2, backend)
    expected = results(plain)
    model: Any = fuse_groups(model_of(joined, CONFIGS[name], 2, backend))
    in_one = name == "dora" or (name.startswith("lokr") and backend == "native")
    groups = [] if in_one else [3, 3]  # in training the whole forward is one op
    for i in range(3):
        assert_same(results(model), expected)
        assert widths == groups * i, "the first call watches, each later one computes two groups"
    model.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))
    assert widths == [*groups * 2, 3, 3]
    with torch.inference_mode():
        assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_in_a_group(dropout: float, use_dora: bool, widths: list[int]) -> None:
    config = LoraConfig(r=3, lora_dropout=dropout, use_dora=use_dora)
    model, plain = fused(joined, config), model_of(joined, config)
    torch.manual_seed(5)
    expected = results(plain)
    torch.manual_seed(5)
    for mine, theirs in zip(results(model), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert widths == ([] if use_dora else [3])


def test_llama_groups_are_found(widths: list[int]) -> None:
    expected: Any = None
    for fuse_it in (False, True):
        model: Any = patch_model(llama(), LoraConfig(r=2), backend="reference")
        fill_adapters(model)
        if fuse_it:
            names = list(model.state_dict())
            assert fuse_groups(model) is model
            model(IDS)
            assert list(model.state_dict()) == names
        model(IDS, labels=IDS).loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        expected, before = grads, expected
    assert widths == [3, 2] * 2
    for mine, theirs in zip(expected, before, strict=True):
        torch.testing.assert_close(mine, theirs)
    notes = {row["module"]: row["notes"] for row in fastlora.report(model)["modules"]}
    assert notes["model.layers.0.self_attn.k_proj"] == "computed with q_proj, v_proj"
    assert notes["model.layers.1.mlp.gate_proj"] == "computed with up_proj"
    assert notes["model.layers.1.mlp.down_proj"] == ""


def test_groups_by_name(widths: list[int]) -> None:
    model = model_of(joined)
    expected = results(model)
    fuse_groups(model, [["parts.0.v", "parts.0.q"]])
    assert_same(results(model), expected)
    assert widths == [2]
    fastlora.unpatch(model, dequantize=True)
    assert not model.parts[0]._forward_hooks and not model.parts[0]._forward_pre_hooks


def test_groups_by_name_below_different_parents(widths: list[int]) -> None:
    model = model_of(joined, parts=2)
    expected = results(model)
    fuse_groups(model, [["parts.0.q", "parts.1.q"], ["parts.1.k", "parts.1.v"]])
    assert_same(results(model), expected)
    assert widths == [2, 2]


def test_compile(widths: list[int]) -> None:
    model, plain = fused(joined), model_of(joined)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), plain(X))
    watched = fuse_groups(model_of(joined))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(watched, backend="aot_eager")(X), plain(X))
    assert torch.equal(watched(X), plain(X)) and torch.equal(watched(X), plain(X))
    assert widths and set(widths) == {3}


def test_unpatch_and_merge_undo_it() -> None:
    for undo in (lambda m: fastlora.unpatch(m, dequantize=True), fastlora.merge):
        for call in (False, True):
            model: Any = fuse_groups(model_of(joined))
            if call:
                model(X)
            undo(model)
            for module in model.modules():
                assert not module._forward_hooks and not module._forward_pre_hooks
                assert not module._forward_hooks_always_called and "group" not in vars(module)
            assert model(X).shape == (5, 20)
            patch_model(model, LoraConfig(r=2), backend="reference")
            fuse_groups(model)


def test_replaced_and_moved_members() -> None:
    model = fused(joined)
    model.parts[0].k = nn.Linear(16, 4)
    assert model(X).shape == (5, 20)
    torch.testing.assert_close(model(X)[:, 8:12], model.parts[0].k(X))
    model = fused(joined).to(torch.bfloat16)
    plain = model_of(joined).to(torch.bfloat16)
    assert torch.equal(model(X.bfloat16()), plain(X.bfloat16()))


def both(*fields: Any) -> Any:
    model = model_of(joined)
    return lambda: fuse_groups(model, [list(fields)])


def unlike() -> Any:
    model = model_of(joined)
    model.parts[0].q.backend = "native"
    return lambda: fuse_groups(model, [["parts.0.q", "parts.0.k"]])


def twice() -> Any:
    model: Any = fuse_groups(model_of(joined))
    return lambda: fuse_groups(model)


NO_LIST: Any = {"q", "k"}
ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: lambda: fuse_groups(Three(joined)), ValueError, "it has none; call patch_model first"),
    (twice, ValueError, "a model without groups, but it has some already"),
    (lambda: both("parts.0.q"), ValueError, "a group must be two or more linears"),
    (lambda: both("parts.0.q", "parts.0.x"), ValueError, "but 'parts.0.x' is none; choose from"),
    (lambda: both("parts.0.q", "parts.0.q"), ValueError, "but 'parts.0.q' is named twice"),
    (unlike, ValueError, "the same in_features, backend and device, got"),
    (lambda: lambda: fuse_groups(model_of(joined), ["parts.0.q"]), TypeError, "a list of lists of"),
    (lambda: lambda: fuse_groups(model_of(joined), "q"), TypeError, "a list of lists of names"),
    (lambda: lambda: fuse_groups(model_of(joined), NO_LIST), TypeError, "a list of lists of"),
    (lambda: both(1), TypeError, "a list of lists of names"),
]


@pytest.mark.parametrize(("make", "kind", "sentence"), ERRORS, ids=[e[2][:30] for e in ERRORS])
def test_errors(make: Any, kind: type[Exception], sentence: str) -> None:
    call = make()
    with pytest.raises(kind, match=sentence):
        call()
