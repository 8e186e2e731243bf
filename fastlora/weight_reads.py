"""Find linears whose weight a module reads past their forward, whatever the model.

Such code meets packed bytes where the weight is in 4 bits, and does not see an adapter. It is found
in the bytecode of `forward`, and of the methods that it calls, of every module's class.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

from fastlora.linears import linears

FACTS = frozenset(("dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_meta"))
"""What may be read of a weight without its values."""
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_NOTHING = ("CACHE", "EXTENDED_ARG", "PRECALL", "PUSH_NULL", "NOP")


class Read(NamedTuple):
    """That a weight is read.

    Attributes:
        reader: name of the class that reads it.
        values: whether it reads more than `FACTS`.
    """

    reader: str
    values: bool

    def __str__(self) -> str:
        return f"{self.reader} reads its weight"


def weight_reads(model: nn.Module) -> dict[str, Read]:
    """Return the linears of a model whose weight another module reads, by name.

    PyTorch's own modules are left out: what they read is no linear, or `patch_model` sees to it.
    """
    names = {id(m): name for name, m in linears(model).items()}
    found: dict[str, Read] = {}
    for module in model.modules():
        kind: Any = type(module)
        for path, values in () if kind.__module__.startswith("torch.") else _class_reads(kind):
            try:
                name = names.get(id(module.get_submodule(path)))
            except AttributeError:
                continue
            if name is not None:
                values = values or (name in found and found[name].values)
                found[name] = Read(kind.__name__, values)
    return found


@cache
def _class_reads(kind: Any) -> frozenset[tuple[str, bool]]:
    """Return the paths of the children whose weight a class reads, and whether their values."""
    return frozenset(read for code in _called(kind) for read in _code_reads(code))


def _called(kind: Any) -> Iterator[CodeType]:
    """Yield the code of `forward` and of the methods of this class that it calls."""
    todo, seen = ["forward"], set(dir(nn.Module)) - {"forward"}
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        code = getattr(inspect.unwrap(getattr(kind, name)), "__code__", None)
        if code is not None:
            yield code
            todo += [other for other in code.co_names if callable(getattr(kind, other, None))]


def _code_reads(code: CodeType) -> Iterator[tuple[str, bool]]:
    """Yield each ``a.b.weight`` of a function: "a.b", and whether its values are read."""
    chain: list[str] = []
    before: list[object] = ["", ""]  # what was loaded before the chain, and what it starts from
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NOTHING]
    for step in [*steps, None]:
        if step is not None and step.opname in _ATTRIBUTES:
            chain.append(step.argval)
            continue
        if "weight" in chain[1:]:
            at = chain.index("weight", 1)
            facts = chain[at + 1 : at + 2]
            values = not FACTS.issuperset(facts) if facts else before[0] != "isinstance"
            yield ".".join(chain[:at]), values
        if step is not None:
            chain, before = [], [before[1], step.argval]
