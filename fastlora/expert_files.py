"""Adapters of fused experts in PEFT's files: nested layers, and factors of all experts in one.

PEFT wraps a module once per adapted parameter, in the order of the module's parameters; the last
one lies outermost. lora_A is (E r, K), expert by expert; lora_B is (N, r E), the expert changing
fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from fastlora.adapters import AdapterSpec
from fastlora.expert_plan import ExpertsPlan


class Entry(NamedTuple):
    """One tensor of an adapter file.

    Attributes:
        key: its key, without PEFT's prefix.
        module: name of the experts module.
        parameter: name of the live parameter on it.
        part: "lora_A" or "lora_B".
        spec: the adapter that it belongs to.
    """

    key: str
    module: str
    parameter: str
    part: str
    spec: AdapterSpec


def entries(experts: dict[str, ExpertsPlan]) -> Iterator[Entry]:
    """Yield every tensor of the adapters of fused experts."""
    for module, plan in experts.items():
        inner = len(plan.adapted) - 1
        for depth, (name, spec) in enumerate(plan.adapted.items()):
            path = module + ".base_layer" * (inner - depth)
            for part in spec.shapes:
                yield Entry(f"{path}.{part}.weight", module, f"{name}_{part}", part, spec)


def file_shape(entry: Entry) -> tuple[int, int]:
    """Return the shape that a tensor has in the file."""
    e, rows, columns = entry.spec.shapes[entry.part]
    return (e * rows, columns) if entry.part == "lora_A" else (rows, columns * e)


def to_file(entry: Entry, live: Tensor) -> Tensor:
    """Return a live parameter, A (E, r, K) or B (E, N, r), as it is in the file."""
    own = live if entry.part == "lora_A" else live.permute(1, 2, 0)
    return own.reshape(file_shape(entry))


def from_file(entry: Entry, stored: Tensor) -> Tensor:
    """Return a tensor of the file as the live parameter has it."""
    e, rows, columns = entry.spec.shapes[entry.part]
    if entry.part == "lora_A":
        return stored.view(e, rows, columns)
    return stored.view(rows, columns, e).permute(2, 0, 1)
