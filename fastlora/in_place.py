"""Accelerate in place the layers that another library put into a model.

A plug-in of `fastlora.integrations` knows the layers of one library. It is imported only when a
model holds such a layer. A layer keeps its parameters, buffers and names: its class becomes a
subclass of what it was, with another `forward`, so that everything else about it stays.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from fastlora_kernels.formats import StoredWeight
from torch import Tensor, nn

from fastlora.adapters import Cache
from fastlora.dispatch import Problem, pick

if TYPE_CHECKING:
    from typing_extensions import Self

PLUGINS = {
    "peft": "fastlora.integrations.peft_layers",
    "bitsandbytes": "fastlora.integrations.bnb_layers",
}
STATE = "fastlora_state"
HOOKS = "parts of it have hooks or a forward of their own"
META = "its weight is on the meta device: offloaded, or not loaded yet"
LATER = "added after patch_model; call unpatch and patch_model again"


@dataclass
class State:
    """What an accelerated layer has besides what it had."""

    backend: str
    cache: Cache
    compute: str = "auto"


class Swap(NamedTuple):
    """What becomes of a layer: its new class, and what the report says of it."""

    cls: type[Accelerated]
    notes: str


@dataclass
class InPlace:
    """What was done to a model, kept on it as `model._fastlora`.

    Attributes:
        notes: what was done to a layer beyond its class, by name.
        backend: "auto" or the name of a backend.
        nbytes: bytes of the model's tensors before.
        compute: how products with 4-bit weights are computed.
    """

    notes: dict[str, str]
    backend: str
    nbytes: int
    compute: str = "auto"


class Accelerated(nn.Module):
    """Mixed into a layer's class, before it.

    Attributes:
        plain: the class that the layer had.
    """

    plain: ClassVar[type[nn.Module]]
    fastlora_state: State

    def prepare(self) -> None:
        """Lay the weight out as kernels read it, after the swap."""

    def release(self) -> None:
        """Undo what `prepare` did, as far as others see it, before the class is restored."""

    def problem(self) -> Problem:
        """Return a training batch of this layer."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return the report's columns of this layer: method, r, scaling, format, shape, bytes."""
        raise NotImplementedError

    def left(self) -> str | None:
        """Return that its library computes a training batch itself, and why; None: kernels do."""
        return None

    def remarks(self) -> list[str]:
        """Return what else the report says of this layer."""
        return []

    def hidden(self) -> int:
        """Return how many values a packed weight of this layer holds beyond its bytes."""
        return 0

    def packed(self) -> StoredWeight | None:
        """Return the 4-bit weight that this layer multiplies with; None where it is dense."""
        return None

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as every module does, and forget what was remembered."""
        self.fastlora_state.cache.drop()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.fastlora_state.cache.drop()
        return cast("Self", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]


def plan(model: nn.Module, backend: str, compute: str) -> tuple[dict[str, Swap], dict[str, str]]:
    """Return the layers that can be accelerated, and the reason for each one that cannot.

    Raises:
        ValueError: a layer's tensors are on several devices.
        ImportError: a library's version is not supported.
    """
    swaps: dict[str, Swap] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        found = _plan(name, module, backend, compute)
        if isinstance(found, Swap):
            swaps[name] = found
        elif found is not None:
            skipped[name] = found
    return swaps, skipped


def _plan(name: str, module: nn.Module, backend: str, compute: str) -> Swap | str | None:
    if isinstance(module, Accelerated):  # without a record: taken out of a patched model
        if compute != "auto" and module.packed() is not None:
            pick(replace(module.problem(), compute=compute), backend)
        return Swap(type(module), "")
    library = type(module).__module__.partition(".")[0]
    if library not in PLUGINS:
        return None
    plugin = importlib.import_module(PLUGINS[library])
    found: Swap | str | None = plugin.plan(name, module, backend, compute)
    return found


def left_out(model: nn.Module, record: InPlace) -> dict[str, str]:
    """Return the layers of these libraries that are not accelerated now, with the reason."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Accelerated):
            continue
        try:
            plan = _plan(name, module, record.backend, record.compute)
        except (ValueError, NotImplementedError) as error:
            plan = str(error)
        if plan is not None:
            found[name] = plan if isinstance(plan, str) else LATER
    return found


def is_watched(module: nn.Module) -> bool:
    """Return whether calling a module does more than its class says, so that it must be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def refusal(problem: Problem, backend: str) -> str | None:
    """Return why no backend runs a layer, or None."""
    try:
        pick(problem, backend)
    except NotImplementedError as error:
        return str(error)
    return None


def one_device(name: str, tensors: list[Tensor]) -> torch.device:
    """Return the device of a layer's tensors.

    Raises:
        ValueError: they are on several.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        listed = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"the tensors of {name!r} must be on one device, got {listed}; move the layer to one"
        )
    return devices.pop()


def accelerate(model: nn.Module, backend: str, nbytes: int, compute: str = "auto") -> InPlace:
    """Swap the classes of all layers that can be accelerated; all or none.

    Raises:
        NotImplementedError: `compute` is "fp8", and no backend multiplies a 4-bit weight so.
        ValueError: there is none, or a layer's tensors are on several devices.
        ImportError: a library's version is not supported.
    """
    swaps, skipped = plan(model, backend, compute)
    if not swaps:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:5])
        raise ValueError(
            "patch_model without config and quantize needs a model with layers of PEFT or"
            " bitsandbytes that it can accelerate, "
            + (f"but has none ({reasons}); " if skipped else "got one without any; ")
            + "pass a config or quantize"
        )
    for name, swap in swaps.items():
        module = cast(Any, model.get_submodule(name) if name else model)
        setattr(module, STATE, State(backend, Cache(), compute))
        module.__class__ = swap.cls
        module.prepare()
    for plugin in PLUGINS.values():
        guard = getattr(sys.modules.get(plugin), "guard", None)
        if guard is not None:
            guard(model)
    notes = {name: swap.notes for name, swap in swaps.items() if swap.notes}
    return InPlace(notes, backend, nbytes, compute)


def found_record(model: nn.Module, nbytes: int) -> InPlace | None:
    """Return a record of accelerated layers that have none: parts of a model that was patched."""
    for module in model.modules():
        if isinstance(module, Accelerated):
            state = module.fastlora_state
            return InPlace({}, state.backend, nbytes, state.compute)
    return None


def restore(model: nn.Module) -> None:
    """Give every accelerated layer the class that it had, and take the guards' hooks away."""
    for module in list(model.modules()):
        for key, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "__module__", None) in PLUGINS.values():
                del module._forward_pre_hooks[key]
        if isinstance(module, Accelerated):
            plain = module.plain
            module.release()
            delattr(module, STATE)
            module.__class__ = plain  # type: ignore[assignment]
