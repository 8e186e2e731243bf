"""What the benchmarks share: interleaved timing, the facts of a run, and the results file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    variants: Mapping[str, Callable[[], object]], seconds: float, device: str
) -> dict[str, list[float]]:
    """Time variants in turn, round by round, so that drift of the machine meets all of them.

    Args:
        variants: name -> what to run.
        seconds: about how long all rounds may take together; at least 5 rounds are run.
        device: "cpu" or "cuda" (synchronised around every call).

    Returns:
        Milliseconds of every round, by name.
    """
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for run in variants.values():
        run()
        run()
    wait()
    times: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < 5 or time.perf_counter() - start < seconds:
        for name, run in variants.items():
            before = time.perf_counter()
            run()
            wait()
            times[name].append(1e3 * (time.perf_counter() - before))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Quantiles of a list of times, in ms."""
    tenths = statistics.quantiles(times, n=10)
    values = {"ms_p20": tenths[1], "ms_p50": statistics.median(times), "ms_p80": tenths[7]}
    return {name: round(value, 4) for name, value in values.items()}


def processor() -> str:
    """The CPU's model and the number of cores this process may use."""
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        name = next(
            (ln.split(":", 1)[1].strip() for ln in lines if ln.startswith("model name")), name
        )
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(RESULTS.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def facts(device: str) -> dict[str, Any]:
    """Where and with what a benchmark ran: written into every result."""
    packages: dict[str, str | None] = {}
    for name in ("torch", "triton", "bitsandbytes", "peft", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    commit = _git("describe", "--always")
    if _git("status", "--porcelain", "--", ":/", ":(exclude,top)bench/results"):
        commit += "-dirty"
    where = processor() if device == "cpu" else torch.cuda.get_device_name()
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts: dict[str, Any] = {"date": now, "commit": commit, "device": where, **packages}
    if device == "cpu":
        from fastlora_kernels import native

        facts |= {"threads": torch.get_num_threads(), "isa": native.isa()}
    return facts


def append(name: str, lines: list[dict[str, Any]]) -> Path:
    """Append results to ``bench/results/NAME.jsonl``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path
