"""Every adapter method on one 4-bit linear: fastlora against PEFT and against its own LoRA.

python -m bench.engine             # the table, appended to bench/results/engine-cpu.jsonl
python -m bench.engine --memory    # peak memory beyond that of LoRA instead of time
python -m bench.engine --dtype float32  # for a CPU without instructions for bfloat16

Forward + backward, gradients of x and of every parameter; all variants of a row are interleaved in
one process. The modules are what a user gets: `patch_model` and `get_peft_model`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlora
from bench import common, memory

SHAPES = {"1B q/o": (2048, 2048), "1B gate/up": (8192, 2048)}
GROUPS = {
    "1B q/k/v": (2048, (2048, 512, 512)),
    "3 x 2048": (2048, (2048, 2048, 2048)),
    "1B gate+up": (2048, (8192, 8192)),
}
TOKENS = (256, 1024)
R, ALPHA, FACTOR, ADAPTERS = 16, 32, 8, 8
# method -> (at least this many times faster than PEFT, at most this many times our LoRA)
TARGETS = {"loha": (5.0, 1.15), "lokr": (4.0, 1.3), "dora": (3.0, 1.25)}
Run = Callable[[], object]


class Kind(NamedTuple):
    """The dtypes of activations and dense weights, and of adapters."""

    dtype: torch.dtype
    adapter: torch.dtype


class One(nn.Module):
    """A module with linears of one input, `proj0`, `proj1`, ..."""

    def __init__(self, dtype: torch.dtype, k: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        for i, n in enumerate(sizes):
            self.add_module(f"proj{i}", nn.Linear(k, n, bias=False, dtype=dtype))

    def forward(self, x: Tensor) -> list[Tensor]:
        """The output of every linear."""
        return [layer(x) for layer in self.children()]


def made(dtype: torch.dtype, k: int, *sizes: int) -> Any:
    """The module with the same weights every time."""
    torch.manual_seed(0)
    return One(dtype, k, sizes)


def config(library: Any, method: str) -> Any:
    """The config of a method, fastlora's or PEFT's: they have the same names."""
    fields: dict[str, Any] = {"target_modules": r"proj\d"}
    if method in ("lora", "dora"):
        fields |= {"r": R, "lora_alpha": ALPHA, "use_dora": method == "dora"}
        return library.LoraConfig(**fields)
    fields |= {"r": R // 2, "alpha": ALPHA // 2}
    if method == "loha":
        return library.LoHaConfig(**fields)
    return library.LoKrConfig(**fields, decompose_factor=FACTOR)


def ours(method: str, kind: Kind, k: int, *sizes: int) -> Any:
    """The module with an adapter on NF4 weights, its parameters small random numbers."""
    plain = made(kind.dtype, k, *sizes)
    model = fastlora.patch_model(plain, config(fastlora, method), quantize="nf4")
    return set_parameters(model, kind.adapter)


def theirs(method: str, kind: Kind, k: int, n: int) -> Any:
    """PEFT's on dense weights, and for DoRA on bitsandbytes NF4, double-quantised."""
    import peft

    model = made(kind.dtype, k, n)
    if method == "dora":
        import bitsandbytes as bnb

        weight = model.proj0.weight.detach()
        base = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=kind.dtype, quant_type="nf4")
        base.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        model.proj0 = base.to("cpu")
    wrapped = peft.get_peft_model(model, config(peft, method), autocast_adapter_dtype=False)
    return set_parameters(wrapped, kind.adapter)


def set_parameters(model: Any, dtype: torch.dtype) -> Any:
    """Give every trained parameter but magnitudes the same small random values, by its size."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(parameter.numel())
            values = torch.randn(parameter.numel(), generator=generator).view(parameter.shape)
            if "magnitude" not in name:
                parameter.data = (values * parameter.shape[-1] ** -0.5).to(dtype)
            else:
                parameter.data = parameter.data.to(dtype)
    return model.train()


def step(model: Any, x: Tensor, dys: list[Tensor]) -> object:
    """One forward + backward; the gradients of x and the parameters."""
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return torch.autograd.grad(model(x), wanted, dys)


def inputs(dtype: torch.dtype, m: int, k: int, *sizes: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, k, generator=generator).to(dtype).requires_grad_()
    return x, [torch.randn(m, n, generator=generator).to(dtype) for n in sizes]


def agree(left: Tensor, right: Tensor) -> None:
    """A wrong result is not worth timing: raise unless both are the same but for rounding."""
    worst = 0.05 * right.float().abs().max().item()  # PEFT's base may be dense
    torch.testing.assert_close(left.float(), right.float(), atol=4 * worst, rtol=0.1)


def method_runs(name: str, m: int, kind: Kind) -> dict[str, Run]:
    """Our LoRA and every other method, ours and PEFT's, on one layer."""
    n, k = SHAPES[name]
    x, dys = inputs(kind.dtype, m, k, n)
    runs: dict[str, Run] = {"lora": partial(step, ours("lora", kind, k, n), x, dys)}
    for method in TARGETS:
        mine, other = ours(method, kind, k, n), theirs(method, kind, k, n)
        with torch.no_grad():
            agree(mine(x)[0], other(x)[0])
        runs[method] = partial(step, mine, x, dys)
        runs[f"peft {method}"] = partial(step, other, x, dys)
    return runs


def group_runs(name: str, m: int, kind: Kind) -> dict[str, Run]:
    """Layers that are fed the same x, one by one and as a group."""
    k, sizes = GROUPS[name]
    x, dys = inputs(kind.dtype, m, k, *sizes)
    alone, fused = ours("lora", kind, k, *sizes), ours("lora", kind, k, *sizes)
    fastlora.fuse_groups(fused)
    fused(x)  # finds the group
    for left, right in zip(alone(x), fused(x), strict=True):
        assert torch.equal(left, right)
    return {"one by one": partial(step, alone, x, dys), "group": partial(step, fused, x, dys)}


def batch_runs(name: str, m: int, kind: Kind) -> dict[str, Run]:
    """One adapter for all rows, and eight adapters for an eighth of the rows each."""
    n, k = SHAPES[name]
    x, dys = inputs(kind.dtype, m, k, n)
    torch.manual_seed(2)
    weight = fastlora.quantize_4bit(made(kind.dtype, k, n).proj0.weight.detach())
    down = [nn.Parameter((torch.randn(R, k) * k**-0.5).to(kind.adapter)) for _ in range(ADAPTERS)]
    up = [nn.Parameter(torch.randn(n, R).to(kind.adapter)) for _ in range(ADAPTERS)]
    scaling = [ALPHA / R] * ADAPTERS
    ids = torch.arange(m) * ADAPTERS // m

    def one() -> object:
        y = fastlora.lora_linear(x, weight, None, down[0], up[0], scaling[0])
        return torch.autograd.grad(y, [x, down[0], up[0]], dys)

    def many(ids: Tensor) -> object:
        y = fastlora.multi_lora_linear(x, weight, None, down, up, scaling, ids)
        return torch.autograd.grad(y, [x, *down, *up], dys)

    mixed = ids[torch.randperm(m)]
    return {
        "one adapter": one,
        "8 adapters": partial(many, ids),
        "8 adapters, unsorted rows": partial(many, mixed),
    }


def dtypes(args: argparse.Namespace) -> Kind:
    """The dtypes that the options ask for."""
    return Kind(getattr(torch, args.dtype), getattr(torch, args.adapter_dtype or args.dtype))


def measure(kind: str, name: str, m: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of results of one shape and number of tokens."""
    make = {"method": method_runs, "group": group_runs, "batch": batch_runs}[kind]
    runs = make(name, m, dtypes(args))
    times = common.interleaved(runs, args.seconds, "cpu")
    row = {"kind": kind, "shape": name, "M": m}
    rows = [{**row, "variant": v, **common.summary(series)} for v, series in times.items()]
    for line in ratios(rows):
        print(line, flush=True)
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """What the targets are about, a line each."""
    ms = {row["variant"]: row["ms_p50"] for row in rows}
    where = f"{rows[0]['shape']:<11}{rows[0]['M']:>5}  "
    if "lora" in ms:
        return [
            f"{where}{v}: {ms[v]:.2f} ms, {ms[f'peft {v}'] / ms[v]:.2f}x faster than PEFT's (target"
            f" {faster}), {ms[v] / ms['lora']:.2f}x our LoRA's {ms['lora']:.2f} (target {slower})"
            for v, (faster, slower) in TARGETS.items()
            if v in ms
        ]
    first, *others = ms
    lines = []
    for v in others:
        ratio, target = (ms[first] / ms[v], 1.1) if v == "group" else (ms[v] / ms[first], 1.1)
        lines.append(
            f"{where}{v}: {ms[v]:.2f} ms against {ms[first]:.2f} for {first}: {ratio:.2f}"
            f" (target {target})"
        )
    return lines


def one_memory(name: str, m: int, method: str, kind: Kind) -> int:
    """Peak bytes of one forward + backward of a method beyond its inputs and outputs."""
    n, k = SHAPES[name]
    model, warm = ours(method, kind, k, n), ours(method, kind, 64, 64)
    step(warm, *inputs(kind.dtype, 1, 64, 64))
    x, dys = inputs(kind.dtype, m, k, n)
    return memory.peak(partial(step, model, x, dys), m * n * kind.dtype.itemsize)


def memory_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of every method, each in a process of its own, against 8 (N + K) r^2 numbers."""
    rows = []
    for name in args.shapes:
        n, k = SHAPES[name]
        sizes = {}
        for method in ("lora", *TARGETS):
            command = [sys.executable, "-m", "bench.engine", "--one-memory", name, method]
            command += ["--dtype", args.dtype, "--adapter-dtype", args.adapter_dtype or args.dtype]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            sizes[method] = int(json.loads(out.splitlines()[-1]))
            rows.append({"kind": "memory", "shape": name, "M": 1024, "variant": method})
            rows[-1]["bytes"] = sizes[method]
        bound = 8 * (n + k) * (R // 2) ** 2 * 4
        more = {v: f"{(sizes[v] - sizes['lora']) / 2**20:+.2f}" for v in TARGETS}
        print(f"{name:<11} beyond LoRA, MiB: {more}, bound {bound / 2**20:.1f}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--groups", nargs="*", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--adapter-dtype", choices=("bfloat16", "float32"), help="as --dtype")
    parser.add_argument("--seconds", type=float, default=3.0, help="per row of the table")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--one-memory", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--no-write", action="store_true", help="leave bench/results alone")
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", module="peft|bitsandbytes")
    if args.one_memory:
        name, method = args.one_memory
        print(one_memory(name, 1024, method, dtypes(args)))
        return 0
    facts = common.facts("cpu")
    print(json.dumps(facts))
    if args.memory:
        rows, kind = memory_rows(args), "engine-memory"
    else:
        kind = "engine"
        wanted = [("method", s, m) for s in args.shapes for m in args.tokens]
        wanted += [("group", g, m) for g in args.groups for m in args.tokens]
        wanted += [("batch", s, max(args.tokens)) for s in args.shapes]
        rows = [row for item in wanted for row in measure(*item, args)]
    if not args.no_write:
        names = {"dtype": args.dtype, "adapter_dtype": args.adapter_dtype or args.dtype}
        extra = {"bench": kind, **names, **facts}
        print(f"appended to {common.append(f'{kind}-cpu', [{**extra, **r} for r in rows])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
