"""The correctness contract: what every kernel must hold, as functions that tests call.

`compare` and `check` assert; the rest makes inputs: layouts, canaries, poisoned memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

RMS_FACTOR = 1.25
MAX_FACTOR = 2.0


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def compare(
    name: str,
    ours: Tensor,
    unfused: Tensor,
    truth: Tensor,
    rms_factor: float = RMS_FACTOR,
    max_factor: float = MAX_FACTOR,
) -> None:
    """Assert that `ours` is as near to `truth` (float64) as the unfused torch result is.

    NaN and infinities must lie where `unfused` has them.
    """
    assert ours.shape == unfused.shape == truth.shape, (name, ours.shape, truth.shape)
    assert ours.dtype == unfused.dtype, (name, ours.dtype, unfused.dtype)
    finite = torch.isfinite(unfused)
    assert torch.equal(torch.isfinite(ours), finite), f"{name}: not finite in other places"
    assert torch.equal(torch.isnan(ours), torch.isnan(unfused)), f"{name}: NaN in other places"
    if not finite.any():
        return
    exact = truth[finite]
    mine, theirs = ours[finite].double() - exact, unfused[finite].double() - exact
    half_ulp = torch.finfo(ours.dtype).eps * exact.abs().max().item() / 2
    chance = 2 * half_ulp / math.sqrt(mine.numel())
    figures = f"{name}: rms {rms(mine):.3e} against {rms(theirs):.3e} and {chance:.3e}"
    # Of a handful of values the error is luck: those are held by their maximum alone.
    assert mine.numel() < 64 or rms(mine) <= rms_factor * rms(theirs) + chance, figures
    worst, allowed = mine.abs().max().item(), theirs.abs().max().item()
    figures = f"{name}: max {worst:.3e} against {allowed:.3e} and half an ulp {half_ulp:.3e}"
    assert worst <= max_factor * allowed + half_ulp, figures


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill every `torch.empty` with NaN or the largest integer, so that a gap shows."""
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        deterministic.fill_uninitialized_memory = filled


class Canary:
    """A tensor between guard bytes; `check` finds any byte written outside it."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> None:
        self.pad = 4096
        self.bytes = torch.Size(shape).numel() * dtype.itemsize
        size = self.bytes + 2 * self.pad
        self.buffer = torch.full((size,), 0xA5, dtype=torch.uint8, device=device)
        inside = self.buffer[self.pad : self.pad + self.bytes]
        self.tensor = inside.view(dtype).view(tuple(shape))

    def check(self, name: str = "") -> None:
        guards = torch.cat([self.buffer[: self.pad], self.buffer[self.pad + self.bytes :]])
        bad = (guards != 0xA5).nonzero()
        assert bad.numel() == 0, f"{name}: {bad.numel()} guard bytes written, first {bad[0].item()}"


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the values of a 2-D tensor under every layout that a caller can hand over.

    The gaps between the values hold NaN; "offset" breaks 16-byte alignment; "expanded" repeats
    the first row with stride 0, so its values are other ones.
    """
    yield "contiguous", t.contiguous()
    yield "transposed", t.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "sliced", torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
    yield "padded rows", torch.cat([t, torch.full_like(t, float("nan"))], -1)[..., : t.shape[-1]]
    yield "offset", torch.cat([t.new_full((1,), float("nan")), t.reshape(-1)])[1:].view(t.shape)
    yield "expanded", t[:1].expand_as(t)


Op = Callable[..., tuple[Tensor, ...]]


def check(
    name: str,
    op: Op,
    unfused: Op,
    inputs: Sequence[Any],
    truth: Op | None = None,
    reps: int = 3,
    rms_factor: float = RMS_FACTOR,
    max_factor: float = MAX_FACTOR,
) -> None:
    """Assert accuracy, determinism, untouched inputs and indifference to fresh memory.

    Args:
        name: for messages.
        op: our function; returns a tuple of tensors.
        unfused: the plain torch path in the working dtype, same arguments and results.
        inputs: tensors and other arguments.
        truth: the same in float64, called with every floating tensor as float64; default `unfused`.
        reps: how often the same bits must come back.
        rms_factor: allowed ratio of root-mean-square errors.
        max_factor: allowed ratio of the largest errors.
    """
    floats = [t.double() if _is_float(t) else t for t in inputs]
    exact = (truth or unfused)(*floats)
    before = [t.clone() if isinstance(t, Tensor) else t for t in inputs]
    results = op(*inputs)
    for i, (ours, plain, right) in enumerate(zip(results, unfused(*inputs), exact, strict=True)):
        compare(f"{name}[{i}]", ours, plain, right, rms_factor, max_factor)
    for _ in range(reps):
        assert all(map(same_bits, op(*inputs), results)), f"{name}: two runs differ"
    with poisoned():
        assert all(map(same_bits, op(*inputs), results)), f"{name}: reads fresh memory"
    for old, new in zip(before, inputs, strict=True):
        assert not isinstance(old, Tensor) or same_bits(old, new), f"{name}: changed an input"


def check_layouts(
    name: str, op: Op, inputs: Sequence[Any], which: Sequence[int], exact: bool = True
) -> None:
    """Assert that `inputs[i]` for i in `which` gives the same bits in every layout.

    With `exact` False only the same values up to rounding: BLAS sums in another order, and some
    round 16-bit sums on the way.
    """
    for i in which:
        for layout, view in layouts(inputs[i]):
            one, other = list(inputs), list(inputs)
            one[i], other[i] = view, view.contiguous().clone()
            for a, b in zip(op(*one), op(*other), strict=True):
                near = max(1e-4, 2 * torch.finfo(a.dtype).eps)
                equal = same_bits(a, b) if exact else torch.allclose(a, b, rtol=near, atol=1e-5)
                assert equal, f"{name}: argument {i} with layout {layout!r} gives other values"


def check_not_finite(
    name: str, op: Op, unfused: Op, inputs: Sequence[Any], which: Sequence[int]
) -> None:
    """Assert that NaN and infinity in one element reach the same outputs as in plain torch."""
    for i in which:
        for bad in (float("nan"), float("inf"), float("-inf")):
            changed = list(inputs)
            changed[i] = inputs[i].clone()
            changed[i].view(-1)[0] = bad
            for ours, plain in zip(op(*changed), unfused(*changed), strict=True):
                where = f"{name}: {bad} in argument {i}"
                assert torch.equal(torch.isfinite(ours), torch.isfinite(plain)), where


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, NaN counting as equal to NaN."""
    return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a, 1e30), torch.nan_to_num(b, 1e30))


def _is_float(t: object) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()
