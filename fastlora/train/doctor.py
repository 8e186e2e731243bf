"""`fastlora doctor`: what this machine can run, on which backend, and why not more."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from fastlora_kernels import fp8, native_library
from rich.console import Console
from rich.table import Table

from fastlora import LoHaConfig, LoKrConfig, LoraConfig, patch_model, report
from fastlora.dispatch import Problem, explain
from fastlora.integrations.versions import SUPPORTED
from fastlora.train.memory import GIB, available_bytes
from fastlora.train.precision import WHY_SLOW, slow_on_cpu

_PACKAGES = (
    "torch",
    "triton",
    "bitsandbytes",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "scikit-learn",
    "timm",
)


def run(console: Console) -> None:
    """Print what is there, what runs where, and what is missing."""
    table = Table("what", "found", show_header=False, box=None)
    for name, found in facts():
        table.add_row(name, found)
    console.print(table)
    backends = Table("device", "weights and dtype", "computed by", "others refuse because")
    for row in routes():
        backends.add_row(*row)
    console.print(backends)
    console.print(f"a patched layer trains here: {trial()}", highlight=False)


def facts() -> list[tuple[str, str]]:
    """Return (name, value) of machine and packages."""
    found = [("Python", f"{platform.python_version()} on {platform.platform()}")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = available_bytes(torch.device("cpu")) / GIB
    found.append(("CPU", f"{cores} cores, {free:.1f} GiB of memory free"))
    slow = slow_on_cpu(torch.bfloat16)
    found.append(("CPU, bfloat16", f"no: {WHY_SLOW}; train in float32" if slow else "yes"))
    try:
        found.append(("C++ kernels", f"instruction set {native_library.isa()}"))
    except ImportError as error:
        found.append(("C++ kernels", f"none: {error}"))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free_gpu, total = torch.cuda.mem_get_info(i)
            name = torch.cuda.get_device_name(i)
            found.append(
                (f"GPU {i}", f"{name}, {free_gpu / GIB:.1f} of {total / GIB:.1f} GiB free")
            )
            found.append((f"GPU {i}, fp8", fp8.why_not_device(torch.device("cuda", i)) or "yes"))
    else:
        built = "a CUDA build sees none" if torch.version.cuda else "torch is built for the CPU"
        found.append(("GPU", f"none: {built}"))
    for name in _PACKAGES:
        found.append((name, _version(name)))
    return found


def _version(name: str) -> str:
    try:
        have = version(name)
    except PackageNotFoundError:
        return "not installed"
    if name not in SUPPORTED:
        return have
    first, end = (".".join(map(str, numbers)) for numbers in SUPPORTED[name])
    return f"{have} (supported: from {first}, below {end})"


def routes() -> list[tuple[str, str, str, str]]:
    """Return (device, weights and dtypes, backend, why not others) of a LoRA linear."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for format, size in (("dense", 0), ("nf4", 64), ("fp4", 64)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                problem = Problem(
                    "lora_linear", device, dtype, format, size, 512, 1024, 1024, 16, torch.float32
                )
                refusals = explain(problem)
                taken = next((name for name, reason in refusals.items() if reason is None), "none")
                reasons = "; ".join(f"{name}: {r}" for name, r in refusals.items() if r is not None)
                what = f"{format} {str(dtype).removeprefix('torch.')}"
                found.setdefault((device, taken, reasons), []).append(what)
    return [(d, ", ".join(kinds), taken, why) for (d, taken, why), kinds in found.items()]


def trial() -> str:
    """Return whether one step of each method works on this machine."""
    done = []
    for config in (LoraConfig(r=4), LoHaConfig(r=4), LoKrConfig(r=4)):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        patch_model(model, config, quantize="nf4")
        model(torch.randn(4, 64)).square().mean().backward()
        backends = {row["backend"] for row in report(model)["modules"]}
        done.append(
            f"{type(config).__name__.removesuffix('Config')} on nf4 by {', '.join(backends)}"
        )
    return "; ".join(done)
