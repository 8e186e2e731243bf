"""Values computed from tensors, kept while these tensors stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastlora.ops.library import is_plain

T = TypeVar("T")


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes when a tensor's values or its place change.

    The weak reference keeps the storage's identity from being used again, not its memory.
    """
    storage: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    place = storage, tensor.data_ptr()
    return (*place, tensor.shape, tensor.stride(), tensor.dtype, tensor._version)


class Cache:
    """What one layer remembers between calls; it is not part of the model's state.

    A copy or a pickle of it is empty. PyTorch counts the writes to a tensor, but for two kinds:
    those through `.data`, which are noticed when they change its storage, or after `model.eval()`
    or `model.train()`, which empty the cache; and those of a fused optimizer, which takes a
    gradient: while a tensor has one, nothing made of it is kept.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any]] = {}

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()

    def drop(self, *names: str) -> None:
        """Forget these values; without names, all of them."""
        for name in names or tuple(self._kept):
            self._kept.pop(name, None)

    def frozen(
        self, name: str, sources: Sequence[Tensor], make: Callable[[], T], also: object = None
    ) -> T:
        """Return ``make()``, or what it returned for the same `sources` and an equal `also`."""
        if not is_plain(*sources) or any(tensor.is_inference() for tensor in sources):
            return make()
        key = [also, *(_state(tensor) for tensor in sources)]
        entry = self._kept.get(name)
        if entry is None or entry[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                entry = key, make()
            self._kept[name] = entry
        value: T = entry[1]
        return value

    def views(
        self, name: str, sources: tuple[object, ...], address: int, make: Callable[[], T]
    ) -> T:
        """Return ``make()``, or what it returned for these very objects, values of which it shares.

        Args:
            name: of the value.
            sources: what it is made of, by identity.
            address: of a source's memory, by which a change of storage is noticed.
            make: makes it.
        """
        if _get_current_dispatch_mode() is not None:
            return make()
        key = (address, *map(id, sources))
        entry = self._kept.get(name)
        if entry is None or entry[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                entry = key, (sources, make())  # which keeps the identities from being used again
            self._kept[name] = entry
        value: T = entry[1][1]
        return value

    def trained(
        self,
        name: str,
        sources: Sequence[Tensor],
        training: bool,
        make: Callable[[], T],
        also: object = None,
    ) -> T:
        """Do as `frozen` in inference alone, for tensors that training changes.

        A call in training mode, one that builds a graph, or one while a source has a gradient, with
        which an optimizer may change it uncounted, forgets the value.
        """
        if torch.compiler.is_compiling():
            return make()
        has_gradient = any(source.is_leaf and source.grad is not None for source in sources)
        if training or torch.is_grad_enabled() or has_gradient:
            self.drop(name)
            return make()
        return self.frozen(name, sources, make, also)
