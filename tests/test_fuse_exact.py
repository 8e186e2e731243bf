"""fuse_groups: no group ever changes a result, whatever a call is like."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig, fuse_groups, patch_model, sharing
from tests.fuse_cases import (
    IDS,
    Forward,
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


ORDERS: dict[str, Forward] = {
    "backwards": lambda m, x: torch.cat([m.v(x), m.k(x), m.q(x)], -1),
    "one left out": lambda m, x: torch.cat([m.q(x), m.v(x)], -1),
    "another tensor": lambda m, x: torch.cat([m.q(x), m.k(x + 1), m.v(x)], -1),
    "another one first": lambda m, x: torch.cat([m.q(x + 1), m.k(x), m.v(x)], -1),
    "an equal tensor": lambda m, x: torch.cat([m.q(x), m.k(x.clone()), m.v(x)], -1),
    "without its graph": lambda m, x: torch.cat([m.q(x), m.k(x.detach()), m.v(x)], -1),
    "one of them twice": lambda m, x: torch.cat([m.q(x), m.q(x) + m.v(x)], -1),
    "without a graph": lambda m, x: torch.cat([m.q(x), quietly(m.k, x), m.v(x)], -1),
    "in inference mode": lambda m, x: torch.cat([m.q(x), inferred(m.k, x), m.v(x)], -1),
    "with autocast": lambda m, x: torch.cat([m.q(x), cast(m.k, x).float(), m.v(x)], -1),
    "one checkpointed": lambda m, x: torch.cat([m.q(x), kept(m.k, x), m.v(x)], -1),
    "the first checkpointed": lambda m, x: torch.cat([kept(m.q, x), m.k(x), m.v(x)], -1),
    "all checkpointed": lambda m, x: checkpoint(joined, m, x, use_reentrant=False),
}


def quietly(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = m(x)
        return y


def inferred(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y: Tensor = m(x)
    return y.clone()


def cast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y: Tensor = m(x)
        return y


def kept(m: Any, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(m, x, use_reentrant=False)
    return y


@pytest.mark.parametrize("name", ORDERS)
def test_a_call_unlike_the_first_one(name: str, backend: str) -> None:
    """The groups are those of `joined`; then the parent calls its linears in another way."""
    expected = results(model_of(ORDERS[name], backend=backend))
    model = fused(joined, backend=backend)
    model.parts[0].run = ORDERS[name]
    for _ in range(2):
        assert_same(results(model), expected)
    assert all(m.group.current is None for m in (model.parts[0].q, model.parts[0].k))


@pytest.mark.parametrize("name", ["another tensor", "an equal tensor", "without its graph"])
def test_only_the_very_same_tensor_makes_a_group(name: str) -> None:
    layers = fused(ORDERS[name]).parts[0]
    assert layers.k.group is None and layers.q.group is layers.v.group is not None
    assert layers.q.group.names == ("q", "v")


def test_no_group_where_nothing_is_shared() -> None:
    layers = fused(lambda m, x: torch.cat([m.q(x), m.k(x + 1), m.v(x + 2)], -1)).parts[0]
    assert layers.q.group is None and not layers._forward_hooks
    assert not layers._forward_hooks_always_called and not layers._forward_pre_hooks


def changed(m: Any, x: Tensor) -> Tensor:
    """Write into the input between two calls."""
    x = x + 0
    y = m.q(x).detach()
    x += 1
    return torch.cat([y, m.k(x), m.v(x)], -1)


def test_an_input_that_begins_to_need_a_gradient() -> None:
    seen: list[Tensor] = []

    def begin(m: Any, x: Tensor) -> Tensor:
        seen.append(x.detach())
        y = m.q(seen[0])
        seen[0].requires_grad_()
        return torch.cat([y, m.k(seen[0]), m.v(seen[0])], -1)

    model = fused(joined)
    model.parts[0].run = begin
    model(X).sum().backward()
    assert seen[0].grad is not None
    expected = sum(layer.merged_weight().sum(0) for layer in (model.parts[0].k, model.parts[0].v))
    torch.testing.assert_close(seen[0].grad, expected.expand(5, 16), rtol=1e-4, atol=1e-4)


def test_an_input_that_is_written_to() -> None:
    expected = model_of(changed)(X)
    model = fused(joined)
    model.parts[0].run = changed
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    with torch.inference_mode():
        assert torch.equal(model(X), expected)

    def write(m: Any, x: Tensor) -> Tensor:
        y = m.q(x)
        return torch.cat([y, m.k(x.add_(1)), m.v(x)], -1)

    alone = model_of(write)
    model.parts[0].run = write
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(X.clone()), alone(X.clone()))
    given = X.clone()
    with torch.inference_mode():
        assert torch.equal(model(given), alone(X.clone())), "an ordinary tensor, written to"
    other = fused(changed).parts[0]
    assert other.q.group is None and other.k.group.names == ("k", "v")


def test_parameters_that_change_between_calls() -> None:
    model = fused(joined).eval()
    with torch.no_grad():
        for _ in range(2):
            model.get_parameter("parts.0.v.lora_B").mul_(2)
            plain = fastlora.merge(copy.deepcopy(model))
            torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, widths: list[int]) -> None:
    expected = results(model_of(joined, parts=2))

    def run(self: Any, x: Tensor) -> Tensor:
        return torch.cat([checkpoint(p, x, use_reentrant=reentrant) for p in self.parts], -1)

    model: Any = fuse_groups(model_of(joined, parts=2))
    model.forward = run.__get__(model)
    for _ in range(2):
        assert_same(results(model), expected)
    assert len(widths) >= 4 and set(widths) == {3}


def test_groups_wait_for_a_checkpointed_backward(widths: list[int]) -> None:
    """Two calls before the first backward pass: both are computed again as they were."""
    plain, model = model_of(joined), fuse_groups(model_of(joined))
    parameters = [list(m.parameters()) for m in (plain, model)]
    for step in range(3):
        for m in (plain, model):
            m.zero_grad()
            outputs = [checkpoint(m, X + i, use_reentrant=False) for i in (0, 1)]
            for y in outputs:
                y.square().sum().backward()
        for one, other in zip(*parameters, strict=True):
            theirs, mine = one.grad, other.grad
            assert theirs is mine is None or torch.equal(theirs, mine)
        assert widths == [3] * 4 * step


def test_llama_trains_under_checkpointing() -> None:
    grads: list[list[Tensor]] = []
    for groups, reentrant in ((False, None), (True, True), (True, False)):
        model: Any = llama()
        patch_model(model, LoraConfig(r=2), quantize="nf4", backend="reference").train()
        fill_adapters(model)
        if groups:
            fuse_groups(model)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        for _ in range(3):
            model.zero_grad()
            model(IDS, labels=IDS).loss.backward()
        member = model.model.layers[0].self_attn.q_proj
        assert isinstance(member.group, sharing.Share) == groups
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in grads[1:]:
        for mine, theirs in zip(other, grads[0], strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("watching", [True, False])
def test_copies_and_pickles(watching: bool, widths: list[int]) -> None:
    model: Any = fuse_groups(model_of(joined))
    expected = model_of(joined)(X)
    if not watching:
        model(X)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        widths.clear()
        if watching:
            copied(X)
        copied.parts[0].q.lora_B.data.zero_()
        assert not torch.allclose(copied(X), expected)
        assert widths == [3]
        assert copied.parts[0].q.group is not model.parts[0].q.group
    assert torch.equal(model(X), expected)
    one = copy.deepcopy(model.parts[0].q)
    assert torch.equal(one(X), model.parts[0].q(X))


def test_a_member_alone_and_with_hooks(widths: list[int]) -> None:
    model = fused(joined)
    layers, expected = model.parts[0], model_of(joined)(X)
    assert torch.equal(layers.q(X), expected[:, :8]) and widths == []
    handle = layers.k.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    y = model(X)
    assert torch.equal(y[:, :8], expected[:, :8]) and torch.equal(y[:, 12:], expected[:, 12:])
    assert not torch.allclose(y[:, 8:12], expected[:, 8:12]) and widths == [2]
    handle.remove()
    assert torch.equal(model(X), expected) and widths == [2, 3]
    layers.k.forward = lambda x: x[:, :4]
    assert torch.equal(model(X)[:, 8:12], X[:, :4]) and widths == [2, 3, 2]


def test_a_copy_in_the_middle_of_a_call() -> None:
    copies: list[Any] = []

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.q(x)
        copies.append(copy.deepcopy(m))
        return torch.cat([y, m.k(x), m.v(x)], -1)

    model = fused(joined)
    model.parts[0].run = run
    model(X).sum().backward()
    assert copies[0].q.group.current is None


def test_a_failing_call_leaves_nothing() -> None:
    model: Any = fuse_groups(model_of(joined))
    layers = model.parts[0]

    def fail(m: Any, x: Tensor) -> Tensor:
        m.q(x)
        raise KeyError("stop")

    for _ in range(2):
        layers.run = fail
        with pytest.raises(KeyError):
            model(X)
        assert layers.q.group.current is None
        layers.run = joined
        assert torch.equal(model(X), model_of(joined)(X))
    assert layers.q.group.names == ("q", "k", "v")
