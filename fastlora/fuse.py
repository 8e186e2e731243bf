"""Compute linears that are fed the same tensor together: query, key and value; gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from torch import nn

from fastlora.layers import AdapterLinear
from fastlora.sharing import Bracket, Share, Watch, kind_of


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
        children.setdefault(_caller(model, name.split(".")[:-1]), []).append(name)
    for parent, names in children.items():
        if len(names) > 1:
            Watch(_below(parent, names)).attach(model.get_submodule(parent))
    return model


def _caller(model: nn.Module, path: Sequence[str]) -> str:
    """Return the name of the module at `path`, or of the nearest one around it with a forward."""
    for length in range(len(path), 0, -1):
        name = ".".join(path[:length])
        if type(model.get_submodule(name)).forward is not nn.Module.forward:
            return name
    return ""


def _below(parent: str, names: Sequence[str]) -> list[str]:
    return [name[len(parent) + 1 :] if parent else name for name in names]


def _checked(linears: dict[str, AdapterLinear], groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the groups, after checking them."""
    if isinstance(groups, str) or not isinstance(groups, Sequence) or not all(map(_names, groups)):
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
        kinds = {kind_of(linears[name]) for name in group}
        if len(group) < 2 or len(kinds) > 1:
            raise ValueError(
                "a group must be two or more linears with the same in_features, backend and device,"
                f" got {list(group)} with {sorted(map(str, kinds))}; put them into groups that fit"
            )
    return [list(group) for group in groups]


def _names(group: object) -> bool:
    if isinstance(group, str) or not isinstance(group, Sequence):
        return False
    return all(isinstance(name, str) for name in group)


def _attach_named(model: nn.Module, groups: list[list[str]]) -> None:
    for group in groups:
        paths = [name.split(".")[:-1] for name in group]
        same = (len(set(parts)) == 1 for parts in zip(*paths, strict=False))
        parent = _caller(model, paths[0][: len(list(takewhile(bool, same)))])
        Share(_below(parent, group)).attach(model.get_submodule(parent))


def unfuse(model: nn.Module) -> None:
    """Undo `fuse_groups`; nothing happens where it was not called."""
    for parent in model.modules():
        hooks = list(parent._forward_hooks.values())
        for bracket in {id(b): b for h in hooks if (b := getattr(h, "__self__", None))}.values():
            if isinstance(bracket, Bracket):
                bracket.detach(parent)


def partners(name: str, member: AdapterLinear) -> list[str]:
    """Return the last parts of the names of the linears that a patched one is computed with."""
    if not isinstance(member.group, Share):
        return []
    return [other for other in member.group.names if not f".{name}".endswith(f".{other}")]
