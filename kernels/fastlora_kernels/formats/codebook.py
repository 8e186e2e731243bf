"""What a 4-bit format is: sixteen float32 values and how a number is rounded to one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Codebook:
    """A 4-bit format: the value of each nibble, relative to the largest magnitude of its block.

    Attributes:
        name: the name that checkpoints use, such as ``"nf4"``.
        code: the 16 values, indexed by nibble, each exactly representable in float32.
    """

    name: str
    code: tuple[float, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The 16 nibbles from the smallest value to the largest; equal values keep their order."""
        return tuple(sorted(range(16), key=self.code.__getitem__))


def kept_table(build: Callable[P, T]) -> Callable[P, T]:
    """Return `build` made to build each table once, as plain tensors.

    A transform or a mode that is at work when a table is first needed must not get hold of it.
    """

    @wraps(build)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        with (
            torch._C._DisableFuncTorch(),
            _disable_current_modes(),
            torch.inference_mode(False),
        ):
            return build(*args, **kwargs)

    return cast(Callable[P, T], cache(plain))


@kept_table
def code_table(book: Codebook, device: torch.device) -> Tensor:
    """The values of a format.

    Args:
        book: the format.
        device: where the table lives.

    Returns:
        (16,) float32, indexed by nibble.
    """
    return torch.tensor(book.code, dtype=torch.float32, device=device)


@kept_table
def pair_table(book: Codebook, device: torch.device) -> Tensor:
    """The two values of each packed byte, high nibble first.

    Args:
        book: the format.
        device: where the table lives.

    Returns:
        (256, 2) float32.
    """
    code = code_table(book, device)
    return torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)


@kept_table
def rounding_tables(book: Codebook, device: torch.device) -> tuple[Tensor, Tensor]:
    """How a scaled value becomes a nibble: ``order[number of thresholds below the value]``.

    The thresholds are the float32 midpoints between neighbouring values; a value that equals one
    takes the smaller neighbour.

    Args:
        book: the format.
        device: where the tables live.

    Returns:
        Thresholds (15,) float32, ascending, and order (16,) uint8.
    """
    order = torch.tensor(book.order, dtype=torch.uint8, device=device)
    values = code_table(book, device)[order.long()]
    return (values[:-1] + values[1:]) / 2, order
