"""Run what needs a GPU, in one command and in a given time: the kernel contract, then benchmarks.

python -m bench.gpu                 # eight minutes, to bench/results/gpu.jsonl
python -m bench.gpu --minutes 2     # the most important cases only; --no-tests, --no-write

Forward and forward + backward of the fused NF4 linear at Llama-3 8B and 70B shapes against cuBLAS
on a resident bfloat16 weight, against dequantisation, cuBLAS and separate adapter products, eager
and as a CUDA graph, and against PEFT on bitsandbytes; LoHa, LoKr and DoRA against PEFT; eight
adapters in one batch against one; the base product in fp8 against 16 bits, with its error. Every
case is written as soon as it is measured; what did not fit into the time is named at the end. Exit
status: 2 without CUDA, 1 when a kernel test fails.

For few tokens the weights of several copies take turns, so that none is in the L2 cache already.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench import common, gpu_cases

ROOT = Path(__file__).parents[1]
Run = Callable[[], object]


def run_tests() -> int:
    """Return the exit status of the tests marked gpu, with kernels compiled for the device."""
    environment = {**os.environ, "FASTLORA_TEST_GPU": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def milliseconds(runs: Mapping[str, Run], seconds: float, device: str) -> dict[str, float]:
    """Return the median time of each call: interleaved, by the GPU's clock where there is one."""
    if device == "cpu":
        found = common.interleaved(runs, seconds, device)
        return {name: statistics.median(times) for name, times in found.items()}
    for run in (*runs.values(), *runs.values()):
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < 7 or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            run()
            after.record()
            after.synchronize()
            times[name].append(before.elapsed_time(after))
        if len(next(iter(times.values()))) >= 200:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def measure(case: gpu_cases.Case, device: str, seconds: float) -> dict[str, Any]:
    """One row: the time of every variant, our ratio to each and our share of the roofline."""
    runs, left_out = gpu_cases.build(case, device)
    times = milliseconds(runs, seconds, device)
    own = times["fastlora"]
    row: dict[str, Any] = {**case._asdict(), "ms": {n: round(t, 5) for n, t in times.items()}}
    row["times"] = {n: round(t / own, 3) for n, t in times.items() if n != "fastlora"}
    row["left_out"], row["error"] = left_out, gpu_cases.fp8_error(case, device)
    bound = gpu_cases.roofline_ms(case, device)
    row["roofline"] = None if bound is None else round(bound / own, 3)
    return row


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    share = "" if row["roofline"] is None else f" {row['roofline']:6.1%} of the roofline"
    ratios = ", ".join(f"{name} {times:.2f}x" for name, times in row["times"].items())
    where = f"{row['what']:9} {row['n']:>5}x{row['k']:<5} M={row['m']:<5} {row['step']:17}"
    error = "" if row["error"] is None else f"; relative error {row['error']:.2%}"
    print(f"{where} {row['ms']['fastlora']:9.4f} ms{share}; against {ratios}{error}", flush=True)


def run_cases(
    cases: list[gpu_cases.Case], device: str, deadline: float, write: bool
) -> list[gpu_cases.Case]:
    """Measure in order until the deadline; return what is left."""
    facts = common.facts(device)
    for i, case in enumerate(cases):
        now = time.monotonic()
        if now >= deadline:
            return cases[i:]
        share = (deadline - now) / (len(cases) - i)
        try:
            row = measure(case, device, min(1.0, 0.5 * share))
        except Exception as error:  # the other cases are worth having all the same
            print(f"{case}: left out: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        show(row)
        if write:
            common.append("gpu", [{**facts, **row}])
        if device == "cuda":
            torch.cuda.empty_cache()
    return []


def main(argv: list[str] | None = None) -> int:
    """Run tests and benchmarks; return the exit status."""
    parser = argparse.ArgumentParser(description="the kernel contract and benchmarks on a GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--no-tests", action="store_true", help="benchmarks only")
    parser.add_argument("--no-write", action="store_true", help="leave bench/results alone")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu needs a CUDA device, found none; run it on a machine with a GPU")
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    if not options.no_tests and run_tests():
        print("the kernel tests failed on this GPU, so nothing was timed; see above")
        return 1
    left = run_cases(gpu_cases.all_cases(), "cuda", deadline, not options.no_write)
    if left:
        print(f"not measured, the time was over: {len(left)} cases")
        for case in left:
            print(f"  {case.what} {case.n}x{case.k} M={case.m} {case.step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
