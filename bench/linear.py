"""A LoRA linear alone: fastlora against dense torch, PEFT, and PEFT on bitsandbytes.

All variants are interleaved in one process.

python -m bench.linear                     # the table, appended to bench/results/linear-cpu.jsonl
python -m bench.linear --memory            # peak extra memory of forward + backward instead of time
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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastlora
from bench import common, memory

# (out_features, in_features)
SHAPES = {
    "1B q/o": (2048, 2048),
    "1B k/v": (512, 2048),
    "1B gate/up": (8192, 2048),
    "1B down": (2048, 8192),
    "8B q/o": (4096, 4096),
    "8B k/v": (1024, 4096),
    "8B gate/up": (14336, 4096),
    "8B down": (4096, 14336),
}
TOKENS = (1, 4, 16, 64, 256, 1024)
RANK, SCALING = 16, 2.0
PASSES = ("forward", "forward+backward")
VARIANTS = ("dense", "dense+lora", "peft", "peft+bnb", "fastlora dense", "fastlora nf4")


class Layer:
    """One implementation: ``run(x)`` and the parameters it trains."""

    def __init__(self, run: Callable[[Tensor], Tensor], parameters: list[nn.Parameter]) -> None:
        self.run, self.parameters = run, parameters

    def forward(self, x: Tensor) -> Tensor:
        """The output, as in inference."""
        with torch.no_grad():
            return self.run(x)

    def train(self, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """The gradients of x and the parameters."""
        y = self.run(x)
        return torch.autograd.grad(y, [x, *self.parameters], dy)


def dense(weight: Tensor) -> Layer:
    return Layer(lambda x: functional.linear(x, weight), [])


def by_hand(weight: Tensor, a: Tensor, b: Tensor) -> Layer:
    """The frozen weight plus LoRA, as one writes it in three lines."""
    a, b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def run(x: Tensor) -> Tensor:
        low = functional.linear(functional.linear(x.to(a.dtype), a), b)
        return (functional.linear(x, weight) + SCALING * low).to(x.dtype)

    return Layer(run, [a, b])


def ours(weight: Tensor | fastlora.QuantizedWeight, a: Tensor, b: Tensor) -> Layer:
    a, b = nn.Parameter(a.clone()), nn.Parameter(b.clone())
    return Layer(lambda x: fastlora.lora_linear(x, weight, None, a, b, SCALING), [a, b])


def peft_layer(weight: Tensor, a: Tensor, b: Tensor, quantize: bool, train: bool) -> Layer:
    """PEFT's LoRA on nn.Linear or on bitsandbytes' Linear4bit (nf4, double-quantised)."""
    import bitsandbytes as bnb
    import peft

    n, k = weight.shape
    if quantize:
        base: nn.Module = bnb.nn.Linear4bit(
            k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4", compress_statistics=True
        )
        data = bnb.nn.Params4bit(
            weight.cpu().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        base.weight = data
        base = base.to(weight.device)
    else:
        base = nn.Linear(k, n, bias=False, dtype=weight.dtype, device=weight.device)
        base.weight = nn.Parameter(weight, requires_grad=False)
    config = peft.LoraConfig(r=RANK, lora_alpha=int(RANK * SCALING), target_modules=["proj"])
    model = peft.get_peft_model(
        nn.ModuleDict({"proj": base}), config, autocast_adapter_dtype=False
    ).to(weight.device)
    layer = model.base_model.model["proj"]
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    down.weight, up.weight = nn.Parameter(a.clone()), nn.Parameter(b.clone())
    model.train(train)
    return Layer(layer, [down.weight, up.weight])


def build(
    n: int, k: int, dtype: torch.dtype, adapter: torch.dtype, device: str, train: bool
) -> dict[str, Callable[[], Layer]]:
    """The implementations over one random weight and one adapter, each made when called."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(n, k, generator=generator) * k**-0.5).to(dtype).to(device)
    a = (torch.randn(RANK, k, generator=generator) * k**-0.5).to(adapter).to(device)
    b = torch.randn(n, RANK, generator=generator).to(adapter).to(device)
    return {
        "dense": lambda: dense(weight),
        "dense+lora": lambda: by_hand(weight, a, b),
        "peft": lambda: peft_layer(weight, a, b, False, train),
        "peft+bnb": lambda: peft_layer(weight, a, b, True, train),
        "fastlora dense": lambda: ours(weight, a, b),
        "fastlora nf4": lambda: ours(fastlora.quantize_4bit(weight), a, b),
    }


def check(layers: dict[str, Layer], x: Tensor) -> None:
    """A wrong result is not worth timing: ours must agree with PEFT's."""
    for left, right in (("peft", "fastlora dense"), ("peft+bnb", "fastlora nf4")):
        if left in layers and right in layers:
            want, got = layers[left].forward(x).float(), layers[right].forward(x).float()
            torch.testing.assert_close(got, want, atol=0.02 * want.abs().max().item(), rtol=0.02)


def dtypes(args: argparse.Namespace) -> tuple[torch.dtype, torch.dtype]:
    """That of activations and dense weights, and the adapter's."""
    return getattr(torch, args.dtype), getattr(torch, args.adapter_dtype or args.dtype)


def time_shape(name: str, tokens: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of results of one shape."""
    n, k = SHAPES[name]
    dtype, adapter = dtypes(args)
    rows = []
    for mode in args.passes:
        train = mode != "forward"
        makers = build(n, k, dtype, adapter, args.device, train)
        layers = {v: makers[v]() for v in args.variants}
        for m in tokens:
            x = torch.randn(m, k, device=args.device).to(dtype)
            dy = torch.randn(m, n, device=args.device).to(dtype)
            check(layers, x)
            x.requires_grad_(train)
            runs = {v: partial(_run, layer, x, dy, train) for v, layer in layers.items()}
            times = common.interleaved(runs, args.seconds, args.device)
            for variant, series in times.items():
                row = {"shape": name, "N": n, "K": k, "M": m, "pass": mode, "variant": variant}
                rows.append({**row, "rounds": len(series), **common.summary(series)})
            show(rows[-len(layers) :])
    return rows


def _run(layer: Layer, x: Tensor, dy: Tensor, train: bool) -> object:
    return layer.train(x, dy) if train else layer.forward(x)


def show(rows: list[dict[str, Any]]) -> None:
    """One line: medians in ms, then our ratios to the peers."""
    ms = {row["variant"]: row["ms_p50"] for row in rows}
    first = rows[0]
    cells = "".join(f"{ms.get(v, float('nan')):>10.3f}" for v in VARIANTS)
    ratios = ""
    if "fastlora nf4" in ms:
        for peer in ("dense", "dense+lora", "peft+bnb"):
            ratios += f"{ms[peer] / ms['fastlora nf4']:>9.2f}x" if peer in ms else " " * 10
    where = f"{first['shape']:<11}{first['pass']:<17}{first['M']:>5}"
    print(f"{where}{cells}  {ratios}", flush=True)


def extra_memory(name: str, m: int, variant: str, args: argparse.Namespace) -> int:
    """Peak bytes of one forward + backward beyond its inputs and outputs."""
    n, k = SHAPES[name]
    dtype, adapter = dtypes(args)
    layer = build(n, k, dtype, adapter, "cpu", True)[variant]()
    warm = build(64, 64, dtype, adapter, "cpu", True)
    tiny = torch.randn(1, 64).to(dtype).requires_grad_()
    warm[variant]().train(tiny, torch.randn(1, 64).to(dtype))  # libraries loaded, threads started
    x = torch.randn(m, k).to(dtype).requires_grad_()
    dy = torch.randn(m, n).to(dtype)
    return memory.peak(partial(layer.train, x, dy), dy.nbytes)


def memory_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak extra memory of every shape and variant, each in a process of its own."""
    rows = []
    print(
        f"{'shape':<11}{'M':>5}{'weight':>10}"
        + "".join(f"{v:>16}" for v in args.variants)
        + "   MiB"
    )
    for name in args.shapes:
        n, k = SHAPES[name]
        for m in args.tokens:
            cells = []
            for variant in args.variants:
                command = [
                    sys.executable,
                    "-m",
                    "bench.linear",
                    "--one-memory",
                    name,
                    str(m),
                    variant,
                ]
                command += ["--dtype", args.dtype]
                command += ["--adapter-dtype", args.adapter_dtype or args.dtype]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                size = int(json.loads(out.splitlines()[-1]))
                cells.append(size)
                rows.append(
                    {"shape": name, "N": n, "K": k, "M": m, "variant": variant, "bytes": size}
                )
            line = "".join(f"{size / 2**20:>16.2f}" for size in cells)
            print(f"{name:<11}{m:>5}{2 * n * k / 2**20:>10.2f}{line}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--adapter-dtype", choices=("bfloat16", "float32"), help="as --dtype")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=1.0, help="per row of the table")
    parser.add_argument("--memory", action="store_true", help="peak extra memory instead of time")
    parser.add_argument("--one-memory", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--no-write", action="store_true", help="leave bench/results alone")
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", module="peft|bitsandbytes")
    torch.manual_seed(0)
    if args.one_memory:
        name, m, variant = args.one_memory
        print(extra_memory(name, int(m), variant, args))
        return 0
    facts = common.facts(args.device)
    print(json.dumps(facts))
    if args.memory:
        rows, kind = memory_table(args), "linear-memory"
    else:
        print(
            f"{'shape':<11}{'pass':<17}{'M':>5}" + "".join(f"{v[-9:]:>10}" for v in VARIANTS),
            end="",
        )
        print("   nf4 against: dense, dense+lora, peft+bnb (median ms)")
        rows, kind = [r for s in args.shapes for r in time_shape(s, args.tokens, args)], "linear"
    if not args.no_write:
        names = {"dtype": args.dtype, "adapter_dtype": args.adapter_dtype or args.dtype}
        extra = {"bench": kind, **names, **facts}
        print(
            f"appended to {common.append(f'{kind}-{args.device}', [{**extra, **r} for r in rows])}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
