"""What linears that are fed the same tensor share during a call of their parent.

A `Share` stands for such linears below one module, their parent. It is open while the parent's
call runs: the first member that is called computes every member's output, and the others take
theirs, if they are given the very same tensor, unchanged, under the same circumstances; else a
member computes alone. Nothing is kept when the parent's call has ended. A `Watch` finds out in
one call of a parent which of its linears are such.

Both hold names and look the modules up when they open, so that they can be copied and pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return *modes, *casts, hooks, _get_current_dispatch_mode()


def _traced() -> bool:
    """Return whether calls are traced or transformed, where tensors are not what they seem."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _is_usual(member: AdapterLinear) -> bool:
    """Return whether nothing but its own forward runs when a member is called."""
    return not member._forward_pre_hooks and "forward" not in vars(member)


class Bracket:
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
        self.current = None if _traced() else self.begin(parent)

    def begin(self, parent: nn.Module) -> Any:
        """Return what is remembered during a call."""
        raise NotImplementedError

    def close(self, parent: nn.Module, args: Any, output: Any) -> None:
        """End a call of the parent, also when it failed."""
        self.current = None

    def take(self, member: AdapterLinear, x: Tensor) -> Tensor | None:
        """Return a member's output for x, or None."""
        current = self.current
        return None if current is None or _traced() else current.take(member, x)


class _Shared:
    """What the members of a `Share` have in one call of their parent."""

    def __init__(self, members: list[AdapterLinear]) -> None:
        self.members, self.circumstances = members, _circumstances()
        self.x: Tensor | None = None
        self.state: tuple[int, bool] | None = None
        self.outputs: dict[int, Tensor] = {}

    def take(self, member: AdapterLinear, x: Tensor) -> Tensor | None:
        if x.is_inference() or _circumstances() != self.circumstances:
            return None
        if self.x is None and any(m is member for m in self.members):
            self.x, self.state = x, (x._version, x.requires_grad)
            self._compute(x)
        elif x is not self.x or self.state != (x._version, x.requires_grad):
            return None
        return self.outputs.pop(id(member), None)

    def _compute(self, x: Tensor) -> None:
        """Compute the outputs of all members, in their own order."""
        bases = [member.base() for member in self.members]
        calls = [m.call(x, base) for m, base in zip(self.members, bases, strict=True)]
        same = [i for i, call in enumerate(calls) if call.x is x and call.alone is None]
        weights, biases = [bases[i].weight for i in same], [calls[i].bias for i in same]
        updates, backend = [calls[i].update for i in same], bases[0].backend
        together = linear_group(x, weights, biases, updates, backend) if same else []
        sums = dict(zip(same, together, strict=True))
        for i, (member, call) in enumerate(zip(self.members, calls, strict=True)):
            finish = call.finish
            if i not in sums:
                y = call.run(bases[i])
            else:
                y = sums[i] if finish is None else finish(sums[i])
            self.outputs[id(member)] = y


class Share(Bracket):
    """Linears below one module that are computed together when they are fed the same tensor."""

    def begin(self, parent: nn.Module) -> _Shared | None:
        """Return what the members have in one call; None: every one computes alone."""
        members = [m for m in self.members(parent) if _is_usual(m)]
        return _Shared(members) if len(members) > 1 else None


class _Seen:
    """What the members of a `Watch` were given in one call of their parent."""

    def __init__(self) -> None:
        self.circumstances = _circumstances()
        self.inputs: dict[int, list[tuple[Tensor, Any]]] = {}
        self.graph: Any = None  # the last node that a member made

    def take(self, member: AdapterLinear, x: Tensor) -> Tensor:
        version = None if x.is_inference() else x._version
        key = version, x.requires_grad, _circumstances()
        self.inputs.setdefault(id(member), []).append((x, key))
        y = member.alone(x)
        self.graph = y.grad_fn or self.graph
        return y


class Watch(Bracket):
    """Finds out in one call of the parent which of its linears are fed the same tensor.

    Where that call was under activation checkpointing, the groups wait until its backward pass is
    over, which must compute what the call did.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.groups: list[list[str]] | None = None
        self.waiting = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "groups": None, "waiting": 0}

    def open(self, parent: nn.Module, args: Any) -> None:
        """Begin a call of the parent; where groups waited for a backward pass, with them."""
        if self.groups and not self.waiting and not _traced() and not _in_backward():
            for share in self.give_way(parent, self.groups):
                share.open(parent, args)
        else:
            super().open(parent, args)

    def give_way(self, parent: nn.Module, groups: list[list[str]]) -> list[Share]:
        """Put the groups in the place of this."""
        self.detach(parent)
        shares = [Share(group) for group in groups]
        for share in shares:
            share.attach(parent)
        return shares

    def begin(self, parent: nn.Module) -> _Seen | None:
        """Return what is written down during the call; None while a call is computed again."""
        return None if _in_backward() else _Seen()

    def close(self, parent: nn.Module, args: Any, output: Any) -> None:
        """Form groups of what was seen; a call that failed does not count."""
        seen, self.current = self.current, None
        if seen is None or not seen.inputs or output is None:
            return
        self.groups = self._groups(parent, seen)
        if self.groups and _saves(seen.circumstances) and seen.graph is not None:
            self.waiting += 1
            seen.graph.register_hook(self._went_back)
        elif not self.waiting:
            self.give_way(parent, self.groups)

    def _went_back(self, *grads: Any) -> None:
        self.waiting -= 1

    def _groups(self, parent: nn.Module, seen: _Seen) -> list[list[str]]:
        """Return the names of the linears that were given the same tensor."""
        names = {id(parent.get_submodule(name)): name for name in self.names}
        groups: dict[Any, list[str]] = {}
        for member, inputs in seen.inputs.items():
            (x, key), *more = inputs
            if all(other is x and again == key for other, again in more):
                kind = kind_of(parent.get_submodule(names[member]))
                groups.setdefault((id(x), key, kind), []).append(names[member])
        return [group for group in groups.values() if len(group) > 1]


def _in_backward() -> bool:
    """Return whether this runs in a backward pass, where checkpointing computes calls again."""
    return torch._C._current_graph_task_id() != -1


def _saves(circumstances: tuple[Any, ...]) -> bool:
    """Return whether saved tensors went through hooks, as under checkpointing."""
    return circumstances[-2] is not None


def kind_of(member: nn.Module) -> tuple[Any, ...]:
    """Return what the linears of a group must have in common."""
    assert isinstance(member, AdapterLinear)
    return member.in_features, member.backend, member.weight.device
