"""Compute linears that are fed the same tensor together: query, key and value; gate and up.

A `Share` stands for such linears below one module, their parent. It is open while the parent's
call runs: the first member that is called computes every member's output, and the others take
theirs, if they are given the very same tensor, unchanged, under the same circumstances; else a
member computes alone. Nothing is kept when the parent's call has ended. A `Watch` finds out in
one call of a parent which of its linears are such.

Both hold names and look the modules up when they open, so that they can be copied and pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastlora.layers import AdapterLinear
from fastlora.ops import linear_group


def _circumstances() -> tuple[Any, ...]:
    """Return what, beside the tensors, decides what a call computes and saves."""
    casts = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # those of checkpointing
    return torch.is_grad_enabled(), *casts, hooks, _get_current_dispatch_mode()


def _untracked() -> bool:
    """Return whether changes of tensors are not counted, or a transform watches them."""
    return (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch._C._are_functorch_transforms_active()
    )


def _is_usual(member: AdapterLinear) -> bool:
    """Return whether nothing but its own forward runs when a member is called."""
    return not member._forward_pre_hooks and "forward" not in vars(member)


class _Bracket:
    """Something that is open during the calls of a parent, for the linears of these names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.current: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "current": None}

    def attach(self, parent: nn.Module) -> None:
        """Open in every call of `parent`."""
        parent.register_forward_pre_hook(self.open)
        parent.register_forward_hook(self.close, always_call=True)
        for name in self.names:
            parent.get_submodule(name).group = self  # type: ignore[assignment]

    def detach(self, parent: nn.Module) -> None:
        """Undo `attach`."""
        for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                parent._forward_hooks_always_called.pop(key, None)
        for member in self.members(parent):
            del member.group

    def members(self, parent: nn.Module) -> list[AdapterLinear]:
        """Return the linears of this parent."""
        found = [parent.get_submodule(name) for name in self.names]
        return [m for m in found if isinstance(m, AdapterLinear) and m.group is self]

    def open(self, parent: nn.Module, args: Any) -> None:
        """Begin a call of the parent."""
        self.current = None if _untracked() else self.begin(parent)

    def begin(self, parent: nn.Module) -> Any:
        """Return what is remembered during a call."""
        raise NotImplementedError

    def close(self, parent: nn.Module, args: Any, output: Any) -> None:
        """End a call of the parent, also when it failed."""
        self.current = None

    def take(self, member: AdapterLinear, x: Tensor) -> Tensor | None:
        """Return a member's output for x, or None."""
        current = self.current
        return None if current is None or _untracked() else current.take(member, x)


class _Shared:
    """What the members of a `Share` have in one call of their parent."""

    def __init__(self, members: list[AdapterLinear]) -> None:
        self.members, self.circumstances = members, _circumstances()
        self.x: Tensor | None = None
        self.version = 0
        self.outputs: dict[int, Tensor] = {}

    def take(self, member: AdapterLinear, x: Tensor) -> Tensor | None:
        if x.is_inference() or _circumstances() != self.circumstances:
            return None
        if self.x is None and any(m is member for m in self.members):
            self.x, self.version = x, x._version
            self._compute(x)
        elif x is not self.x or x._version != self.version:
            return None
        return self.outputs.pop(id(member), None)

    def _compute(self, x: Tensor) -> None:
        """Compute the outputs of all members, in their own order."""
        bases = [member.base() for member in self.members]
        calls = [m.call(x, base) for m, base in zip(self.members, bases, strict=True)]
        same = [i for i, call in enumerate(calls) if call.x is x]
        weights, biases = [bases[i].weight for i in same], [calls[i].bias for i in same]
        updates, backend = [calls[i].update for i in same], bases[0].backend
        sums = dict(zip(same, linear_group(x, weights, biases, updates, backend), strict=True))
        for i, (member, call) in enumerate(zip(self.members, calls, strict=True)):
            finish = call.finish
            if i not in sums:
                y = call.run(bases[i])
            else:
                y = sums[i] if finish is None else finish(sums[i])
            self.outputs[id(member)] = y


class Share(_Bracket):
    """Linears below one module that are computed together when they are fed the same tensor."""

    def begin(self, parent: nn.Module) -> _Shared | None:
        """Return what the members have in one call; None: every one computes alone."""
        members = [m for m in self.members(parent) if _is_usual(m)]
        return _Shared(members) if len(members) > 1 else None


class _Seen:
    """What the members of a `Watch` were given in one call of their parent."""

    def __init__(self) -> None:
        self.inputs: dict[int, list[tuple[Tensor, Any]]] = {}

    def take(self, member: AdapterLinear, x: Tensor) -> None:
        key = None if x.is_inference() else x._version, _circumstances()
        self.inputs.setdefault(id(member), []).append((x, key))


class Watch(_Bracket):
    """Finds out in one call of the parent which of its linears are fed the same tensor."""

    def begin(self, parent: nn.Module) -> _Seen:
        """Return what is written down during the call."""
        return _Seen()

    def close(self, parent: nn.Module, args: Any, output: Any) -> None:
        """Form groups of what was seen, and stop watching; a call that failed does not count."""
        seen, self.current = self.current, None
        if seen is None or not seen.inputs or output is None:
            return
        names = {id(parent.get_submodule(name)): name for name in self.names}
        self.detach(parent)
        groups: dict[Any, list[str]] = {}
        for member, inputs in seen.inputs.items():
            (x, key), *more = inputs
            if all(other is x and again == key for other, again in more):
                kind = _kind(parent.get_submodule(names[member]))
                groups.setdefault((id(x), key, kind), []).append(names[member])
        for group in groups.values():
            if len(group) > 1:
                Share(group).attach(parent)


def _kind(member: nn.Module) -> tuple[Any, ...]:
    """Return what the linears of a group must have in common."""
    assert isinstance(member, AdapterLinear)
    return member.in_features, member.backend, member.weight.device


def fuse_groups(model: nn.Module, groups: Sequence[Sequence[str]] | None = None) -> nn.Module:
    """Return the same model, in which linears that are fed the same tensor share their work.

    Without `groups`, every module with two or more patched linears of its own is watched in its
    next call, and those of them that were given the very same tensor form a group: query, key
    and value; gate and up. From then on the first of a group that is called computes all of it.
    A linear that is given another tensor, or one that was changed in between, computes alone, so
    results do not depend on groups or on the order of calls. `unpatch` and `merge` undo it.

    Args:
        model: a patched model.
        groups: names of the linears of each group, to leave nothing to be found out.

    Raises:
        ValueError: the model has no patched linears or has groups already; a name is unknown, is
            in two groups or alone in one; or the linears of a group do not fit together.
        TypeError: `groups` is no list of lists of names, or a name is not that of a patched linear.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, AdapterLinear)}
    if not linears:
        raise ValueError(
            "fuse_groups takes a model with patched linears, but it has none; call patch_model"
            " first"
        )
    if any(member.group is not None for member in linears.values()):
        raise ValueError(
            "fuse_groups takes a model without groups, but it has some already; call it once"
        )
    if groups is not None:
        _attach_named(model, _checked(linears, groups))
        return model
    children: dict[str, list[str]] = {}
    for name in linears:
        parent, _, last = name.rpartition(".")
        children.setdefault(parent, []).append(last)
    for parent, names in children.items():
        if len(names) > 1:
            Watch(names).attach(model.get_submodule(parent))
    return model


def _checked(linears: dict[str, AdapterLinear], groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the groups, after checking them."""
    if isinstance(groups, str) or any(isinstance(g, str) or not _names(g) for g in groups):
        raise TypeError(
            f"groups must be a list of lists of names, got {groups!r}; put each group into a list"
        )
    every = [name for group in groups for name in group]
    for name in every:
        if name not in linears:
            raise ValueError(
                f"groups must name patched linears, but {name!r} is none; choose from"
                f" {sorted(linears)[:20]}"
            )
        if every.count(name) > 1:
            raise ValueError(
                f"a linear must be in one group, but {name!r} is named twice; drop one"
            )
    for group in groups:
        kinds = {_kind(linears[name]) for name in group}
        if len(group) < 2 or len(kinds) > 1:
            raise ValueError(
                "a group must be two or more linears with the same in_features, backend and device,"
                f" got {list(group)} with {sorted(map(str, kinds))}; put them into groups that fit"
            )
    return [list(group) for group in groups]


def _names(group: object) -> bool:
    return isinstance(group, Sequence) and all(isinstance(name, str) for name in group)


def _attach_named(model: nn.Module, groups: list[list[str]]) -> None:
    for group in groups:
        paths = [name.split(".")[:-1] for name in group]
        same = (len(set(parts)) == 1 for parts in zip(*paths, strict=False))
        prefix = ".".join(paths[0][: len(list(takewhile(bool, same)))])
        start = len(prefix) + 1 if prefix else 0
        Share([name[start:] for name in group]).attach(model.get_submodule(prefix))


def unfuse(model: nn.Module) -> None:
    """Undo `fuse_groups`; nothing happens where it was not called."""
    for parent in model.modules():
        hooks = list(parent._forward_hooks.values())
        for bracket in {id(b): b for h in hooks if (b := getattr(h, "__self__", None))}.values():
            if isinstance(bracket, _Bracket):
                bracket.detach(parent)


def partners(name: str, member: AdapterLinear) -> list[str]:
    """Return the last parts of the names of the linears that a patched one is computed with."""
    if not isinstance(member.group, Share):
        return []
    return [other for other in member.group.names if not f".{name}".endswith(f".{other}")]
