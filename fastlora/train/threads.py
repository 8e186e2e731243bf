"""How many threads to compute with: more is slower where other programs use the cores."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

REPEATS = 2


def fastest_threads(work: Callable[[], object]) -> int:
    """Set and return the number of threads with which `work` takes the least time.

    Tried are PyTorch's own number and its halves down to 1, `REPEATS` times each after a warm-up.
    Threads of OpenMP wait for each other many times a step, so that one busy core can make two
    threads several times slower than one.
    """
    choices = [torch.get_num_threads()]
    while choices[-1] > 1:
        choices.append(choices[-1] // 2)
    times: dict[int, float] = {}
    for threads in choices:
        torch.set_num_threads(threads)
        work()
        times[threads] = min(_seconds(work) for _ in range(REPEATS))
    best = min(choices, key=times.__getitem__)
    torch.set_num_threads(best)
    return best


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
