"""Measure which kernel is fastest for how many tokens on this GPU, and store the table."""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from fastlora_kernels import regimes, tuned
from fastlora_kernels.low_rank import LowRank
from fastlora_kernels.regimes import DIRECTIONS, TOKENS, Plan
from torch import Tensor

from fastlora.quant import quantize_4bit

SHAPES = ((4096, 4096), (14336, 4096))  # (N, K): the layers of an 8B Llama
RANK = 16
REPEATS = 20
Measure = Callable[[Callable[[], object]], float]


class Choice(NamedTuple):
    """The fastest plan for up to so many tokens.

    Attributes:
        direction: "forward" or "backward".
        tokens: upper bound.
        plan: the fastest.
        default: what the model would have chosen.
        speedup: time of the default over that of the fastest.
    """

    direction: str
    tokens: int
    plan: Plan
    default: Plan
    speedup: float


def cuda_milliseconds(run: Callable[[], object]) -> float:
    """Return the median time of a call on the GPU, by its own clock; caches are warm."""
    run(), run()
    times = []
    for _ in range(REPEATS):
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times))


def problems(device: torch.device, direction: str, m: int) -> Iterator[Callable[[], object]]:
    """Yield calls of the fused linear in one direction, on NF4 weights and random tokens."""
    from fastlora_kernels import lora_linear

    for n, k in SHAPES:
        weight = quantize_4bit(_random(n, k, device) * k**-0.5).stored()
        update = LowRank(_random(RANK, k, device) * k**-0.5, _random(n, RANK, device), 1.0)
        x = _random(m, k if direction == "forward" else n, device)
        if direction == "forward":
            yield partial(lora_linear.lora_linear, x, weight, None, update)
        else:
            args = (x, None, None, weight, update, True, False)
            yield partial(lora_linear.lora_linear_backward, *args)


def _random(rows: int, columns: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(rows + columns)
    values = torch.randn(rows, columns, generator=generator, device=device)
    return values.to(torch.bfloat16)


def tune(device: torch.device, measure: Measure = cuda_milliseconds) -> list[Choice]:
    """Return the fastest plan of every row of the tables, by the geometric mean over `SHAPES`."""
    arch = regimes.arch_of(device)
    arch = "sm_90" if arch == regimes.INTERPRETER else arch
    choices = []
    for direction in DIRECTIONS:
        for m in TOKENS:
            plans = [plan for plan, _ in regimes.candidates(arch, direction, m)]
            runs = list(problems(device, direction, m))
            means = {}
            for plan in plans:
                with regimes.force(plan):
                    means[plan] = math.prod(measure(run) for run in runs) ** (1 / len(runs))
            default = regimes.row(regimes.default_table(arch, direction), m)
            best = min(means, key=lambda plan: means[plan])
            speedup = means.get(default, means[best]) / means[best]
            choices.append(Choice(direction, m, best, default, speedup))
    return choices


def store(device: torch.device, choices: list[Choice]) -> str:
    """Write the table for this GPU into the user's cache; return the file's path."""
    tables: dict[str, tuple[tuned.Row, ...]] = {}
    for direction in DIRECTIONS:
        own = [c for c in choices if c.direction == direction]
        while own and own[-1].plan.kind == "dense":
            own.pop()  # what lies above the last row
        tables[direction] = tuple(
            (c.tokens, c.plan.kind, None if c.plan.tile is None else tuple(c.plan.tile))
            for c in own
        )
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    path = regimes.tuned_path(device)
    tuned.save(path, tuned.Measured(now, tables))
    return str(path)


def in_force(device: torch.device) -> str:
    """Return a sentence that says which table a device uses."""
    found = regimes.measured(device)
    if found is None:
        return f"the table of {regimes.arch_of(device)} by the roofline model; not measured"
    return f"the table measured on {found.date}"
