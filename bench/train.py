"""Whole training steps: the same script with and without `fastlora.patch_model`.

python -m bench.train                   # the CPU table, appended to bench/results/train-cpu.jsonl
python -m bench.train --device cuda     # Llama-3.2-1B, 8B and 70B shapes, to train-gpu.jsonl
python -m bench.train --dtype float32   # for a CPU without instructions for bfloat16
python -m bench.train --case 110M-lora  # the cases whose names start so; --no-write: no file

Both variants of a case are in one process, their steps in turn (AdamW, random tokens, adapters as
PEFT makes them: float32). Peak memory is that of a process of its own per variant.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import fastlora
from bench import common, models, usage

Run = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """One comparison: `other` is the script as it was, `ours` the same with fastlora.

    Attributes:
        name: what it is called.
        model: a name in `models.SHAPES`.
        method: the adapter's.
        other: how its linears are stored.
        ours: "line": the same with `patch_model` after PEFT; "nf4": fastlora's own 4-bit LoRA.
        target: at least so many times the tokens per second; None: measured, not aimed at.
        batch: sequences.
        length: tokens of each.
        checkpointing: recompute activations in the backward pass.
        dtype: of activations and dense weights.
    """

    name: str
    model: str
    method: str
    other: str
    ours: str = "line"
    target: float | None = None
    batch: int = 4
    length: int = 256
    checkpointing: bool = False
    dtype: str = "bfloat16"


CPU = (
    Case("110M-lora-bnb", "110M", "lora", "bnb", target=1.25),
    Case("110M-lora-dense", "110M", "lora", "dense", target=1.25),
    Case("110M-dora-bnb", "110M", "dora", "bnb", target=1.6),
    Case("110M-loha-dense", "110M", "loha", "dense", target=3.0),
    Case("110M-lokr-dense", "110M", "lokr", "dense", target=3.0),
    Case("110M-nf4-dense", "110M", "lora", "dense", "nf4", target=1.2),
    Case("1B-lora-bnb", "1B", "lora", "bnb", target=1.4),
)
CUDA = tuple(
    Case(f"{model}-{length}{'-ckpt' * ckpt}", model, "lora", "bnb", "line", None, 1, length, ckpt)
    for model in ("Llama-3.2-1B", "Llama-3-8B")
    for length in (2048, 8192)
    for ckpt in (False, True)
)
TINY = Case("tiny", "tiny", "lora", "dense", batch=2, length=16)


def prepared(case: Case, variant: str, device: str) -> Any:
    """The model of one variant, "other" or "ours", ready to train."""
    own = case.ours == "nf4" and variant == "ours"
    model = models.build(
        case.model, "nf4" if own else case.other, device, getattr(torch, case.dtype)
    )
    if own:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    else:
        model = models.adapted(model, case.method)
        if variant == "ours":
            fastlora.patch_model(model)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def stepper(model: Any, case: Case, device: str) -> Run:
    """A function that runs one training step and returns the loss."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = models.SHAPES[case.model].vocabulary
    tokens = torch.randint(vocabulary, (case.batch, case.length), generator=generator).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure(case: Case, device: str, seconds: float) -> dict[str, Any]:
    """Tokens per second of both variants, interleaved, and what they store."""
    built = {variant: prepared(case, variant, device) for variant in ("other", "ours")}
    steps = {variant: stepper(model, case, device) for variant, model in built.items()}
    first = {variant: step() for variant, step in steps.items()}
    if case.ours == "line" and abs(first["ours"] - first["other"]) > 0.02 * first["other"]:
        raise RuntimeError(f"{case.name}: the losses differ, {first}; nothing was timed")
    times = common.interleaved(steps, seconds, device)
    tokens = case.batch * case.length
    row: dict[str, Any] = asdict(case)
    for variant in built:
        figures = common.summary(times[variant])
        row |= {f"{variant}_{key}": value for key, value in figures.items()}
        row[f"{variant}_tokens_s"] = round(1e3 * tokens / figures["ms_p50"], 1)
        row[f"{variant}_linear_bytes"] = models.linear_bytes(built[variant])
    row["times"] = round(row["other_ms_p50"] / row["ours_ms_p50"], 3)
    row["steps"] = len(times["ours"])
    return row


def peak(case: Case, variant: str, device: str) -> int:
    """Peak bytes of a process that builds one variant and trains two steps."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = stepper(prepared(case, variant, device), case, device)
    step(), step()
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def peak_apart(case: Case, variant: str, device: str) -> int | None:
    """`peak` in a process of its own; None where it ran out of memory."""
    command = [
        sys.executable,
        "-m",
        "bench.train",
        "--device",
        device,
        "--dtype",
        case.dtype,
        "--peak",
        case.name,
        variant,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr[-2000:])
        return None
    return int(done.stdout.split()[-1])


def large_step(gigabytes: float) -> dict[str, Any]:
    """One training step of the 70B shape in 4 bits under a cap of the GPU's memory."""
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 2**30 / whole))
    case = Case("Llama-3-70B", "Llama-3-70B", "lora", "dense", "nf4", None, 1, 2048, True)
    start = time.perf_counter()
    step = stepper(prepared(case, "ours", "cuda"), case, "cuda")
    made = time.perf_counter()
    loss = step()
    torch.cuda.synchronize()
    return {
        **asdict(case),
        "cap_gb": gigabytes,
        "loss": loss,
        "build_s": round(made - start, 1),
        "step_s": round(time.perf_counter() - made, 2),
        "ours_peak": int(torch.cuda.max_memory_allocated()),
    }


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    memory = [row.get(f"{v}_peak") for v in ("other", "ours")]
    text = " -> ".join("?" if m is None else f"{m / 2**20:.0f} MiB" for m in memory)
    aim = "" if row["target"] is None else f" (target {row['target']})"
    speed = f"{row['other_tokens_s']:.0f} -> {row['ours_tokens_s']:.0f} tokens/s"
    weights = row["ours_linear_bytes"] / row["other_linear_bytes"]
    print(
        f"{row['name']:18} {speed}, {row['times']:.2f}x{aim}; peak {text}; weights {weights:.2f}x"
    )


def run(cases: list[Case], device: str, seconds: float, memory: bool, write: bool) -> None:
    """Measure, print and keep every case."""
    facts = common.facts(device)
    for case in cases:
        row = measure(case, device, seconds)
        for variant in ("other", "ours") if memory else ():
            row[f"{variant}_peak"] = peak_apart(case, variant, device)
        show(row)
        if write:
            common.append(f"train-{'gpu' if device == 'cuda' else 'cpu'}", [{**facts, **row}])


def run_usage(wanted: str, device: str, dtype: str, seconds: float, write: bool) -> None:
    """Measure, print and keep what lies around the steps; names that start with `wanted`."""
    rows: list[dict[str, Any]] = []
    if "generate".startswith(wanted):
        rows += usage.generate(device, dtype, seconds)
    if "import".startswith(wanted):
        rows.append(usage.import_seconds())
    if "patch".startswith(wanted) and device == "cpu":
        rows.append(usage.patch_seconds())
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    if write and rows:
        name = f"train-{'gpu' if device == 'cuda' else 'cpu'}"
        common.append(name, [{**common.facts(device), **row} for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description="training steps with and without patch_model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--case", default="", help="only cases whose names start so")
    parser.add_argument("--seconds", type=float, default=40.0, help="timing per case")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--no-write", action="store_true", help="leave bench/results alone")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a CUDA device, found none; run it on a machine with a GPU")
        return 2
    cases = [*(CUDA if options.device == "cuda" else CPU), TINY]
    known = [replace(case, dtype=options.dtype) for case in cases]
    if options.peak:
        case = next(c for c in known if c.name == options.peak[0])
        print(peak(case, options.peak[1], options.device))
        return 0
    wanted = [
        c
        for c in known
        if c.name.startswith(options.case) and (options.case or c.name != TINY.name)
    ]
    run(wanted, options.device, options.seconds, not options.no_memory, not options.no_write)
    write = not options.no_write
    run_usage(options.case, options.device, options.dtype, options.seconds, write)
    if options.device == "cuda" and "Llama-3-70B".startswith(options.case):
        row = {**common.facts("cuda"), **large_step(48)}
        print(json.dumps(row))
        if not options.no_write:
            common.append("train-gpu", [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
