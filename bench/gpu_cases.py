"""What bench.gpu measures: the cases, in order of importance, and the calls of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastlora
from bench.linear import Layer, peft_layer

SHAPES = {
    "8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "70B": ((8192, 8192), (28672, 8192), (8192, 28672)),
}
FEW, MANY = (1, 4, 16, 64), (128, 256, 512, 1024, 4096, 8192)
R, ALPHA, SCALING, ADAPTERS = 16, 32, 2.0, 8
L2_BYTES = 200 << 20  # copies of a weight together, several times the L2 cache of any GPU
BF16 = torch.bfloat16
Run = Callable[[], object]


class Case(NamedTuple):
    """One comparison.

    Attributes:
        what: "lora", "fp8", "loha", "lokr", "dora" or "adapters".
        n: outputs.
        k: inputs.
        m: tokens.
        step: "forward" or "forward+backward".
    """

    what: str
    n: int
    k: int
    m: int
    step: str


def all_cases() -> list[Case]:
    """Return the cases, the most telling first."""
    big, gate = (28672, 8192), (14336, 4096)
    first = [Case("lora", *shape, m, "forward") for m in FEW for shape in (big, gate)]
    second = [Case("lora", *gate, m, "forward+backward") for m in (4096, 1024)]
    eight = [
        Case("fp8", *gate, m, step)
        for step in ("forward", "forward+backward")
        for m in (4096, 1024)
    ]
    methods = [
        Case(what, *gate, m, "forward+backward")
        for what in ("loha", "lokr", "dora", "adapters")
        for m in (1024, 4096)
    ]
    every = [shape for shapes in SHAPES.values() for shape in shapes]
    third = [Case("lora", *shape, m, "forward") for m in (*FEW, *MANY) for shape in every]
    fourth = [Case("lora", *shape, m, "forward+backward") for m in MANY for shape in every]
    return list(dict.fromkeys([*first, *second, *eight, *methods, *third, *fourth]))


def roofline_ms(case: Case, device: str) -> float | None:
    """Return the least time that a case could take on a GPU that the model knows, or None.

    Bytes: the packed weight once per product, x and y. Flops: one product forward, two with the
    backward, twice as many a second in 8 bits; the adapter's are few.
    """
    from fastlora_kernels import regimes

    if device == "cpu":
        return None
    chip = regimes.CHIPS[regimes.arch_of(torch.device("cuda", torch.cuda.current_device()))]
    products = 1 if case.step == "forward" else 2
    nbytes = case.n * case.k * regimes.PACKED + 2 * case.m * (case.n + case.k)
    flops = 2 * case.m * case.n * case.k
    rate = chip.tflops * 1e12 * (2 if case.what == "fp8" else 1)
    return products * 1e3 * max(nbytes / (chip.tbytes * 1e12), flops / rate)


def build(case: Case, device: str) -> tuple[dict[str, Run], list[str]]:
    """Return the calls by name, "fastlora" among them, and the peers that are not installed."""
    make = {"lora": _lora, "fp8": _fp8, "adapters": _adapters}.get(case.what, _method)
    return make(case, device)


def _random(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(BF16)


def _trained(tensors: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(tensor.clone()) for tensor in tensors]


def _timed(layer: Layer, x: Tensor, dy: Tensor, train: bool) -> Run:
    return partial(layer.train, x, dy) if train else partial(layer.forward, x)


def _lora(case: Case, device: str) -> tuple[dict[str, Run], list[str]]:
    """The fused NF4 linear with LoRA against its peers."""
    n, k, m, train = case.n, case.k, case.m, case.step != "forward"
    copies = max(1, min(8, L2_BYTES // (n * k // 2))) if m <= FEW[-1] else 1
    weights = [_random(n, k, device=device, scale=k**-0.5) for _ in range(copies)]
    packed = [fastlora.quantize_4bit(weight) for weight in weights]
    x, dy = _random(m, k, device=device), _random(m, n, device=device)
    x.requires_grad_(train)
    a, b = _trained([_random(R, k, device=device, scale=k**-0.5), _random(n, R, device=device)])

    def separate(turn: Iterator[int], x: Tensor) -> Tensor:
        low = functional.linear(functional.linear(x, a), b)
        return functional.linear(x, packed[next(turn)].dequantize(BF16)) + SCALING * low

    def resident(turn: Iterator[int], x: Tensor) -> Tensor:
        return functional.linear(x, weights[next(turn)])

    def fused(turn: Iterator[int], x: Tensor) -> Tensor:
        return fastlora.lora_linear(x, packed[next(turn)], None, a, b, SCALING)

    layers = {
        "fastlora": Layer(partial(fused, cycle(range(copies))), [a, b]),
        "resident bf16": Layer(partial(resident, cycle(range(copies))), []),
        "dequantise + cuBLAS": Layer(partial(separate, cycle(range(copies))), [a, b]),
    }
    runs = {name: _timed(layer, x, dy, train) for name, layer in layers.items()}
    left_out = []
    if device == "cuda" and not train:
        try:
            runs["dequantise + cuBLAS, graph"] = _graph(runs["dequantise + cuBLAS"])
        except RuntimeError as error:
            left_out.append(f"CUDA graph: {str(error)[:120]}")
    try:
        layer = peft_layer(weights[0], a.detach(), b.detach(), True, train)
        runs["peft + bitsandbytes"] = _timed(layer, x, dy, train)
    except ImportError as error:
        left_out.append(f"peft + bitsandbytes: {error}")
    return runs, left_out


def _fp8_layers(case: Case, device: str) -> tuple[dict[str, Layer], Tensor]:
    """Return the linear on an NF4 weight in 8 and in 16 bits and on a resident weight, and x."""
    n, k = case.n, case.k
    weight = _random(n, k, device=device, scale=k**-0.5)
    packed, x = fastlora.quantize_4bit(weight), _random(case.m, k, device=device)
    a, b = _trained([_random(R, k, device=device, scale=k**-0.5), _random(n, R, device=device)])
    backend = "reference" if device == "cpu" else "auto"  # where it can only be emulated

    def ours(compute: str, x: Tensor) -> Tensor:
        how = {"backend": backend, "compute": compute}
        return fastlora.lora_linear(x, packed, None, a, b, SCALING, **how)  # type: ignore[arg-type]

    layers = {
        "fastlora": Layer(partial(ours, "fp8"), [a, b]),
        "fastlora in 16 bits": Layer(partial(ours, "auto"), [a, b]),
        "resident bf16": Layer(lambda x: functional.linear(x, weight), []),
    }
    return layers, x


def _fp8(case: Case, device: str) -> tuple[dict[str, Run], list[str]]:
    """The fused NF4 linear with LoRA, its base product in 8 bits, against 16 bits."""
    layers, x = _fp8_layers(case, device)
    dy, train = _random(case.m, case.n, device=device), case.step != "forward"
    x.requires_grad_(train)
    return {name: _timed(layer, x, dy, train) for name, layer in layers.items()}, []


def fp8_error(case: Case, device: str) -> float | None:
    """Return the relative rms difference of y and of dx, the larger, that 8 bits make; or None."""
    if case.what != "fp8":
        return None
    layers, x = _fp8_layers(case, device)
    dy, found = _random(case.m, case.n, device=device).float(), []
    for name in ("fastlora", "fastlora in 16 bits"):
        leaf = x.detach().requires_grad_()
        y = layers[name].run(leaf)
        found.append((y.detach().float(), torch.autograd.grad(y, leaf, dy.to(y.dtype))[0].float()))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))


def _graph(run: Run) -> Run:
    """Return a replay of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _method(case: Case, device: str) -> tuple[dict[str, Run], list[str]]:
    """LoHa, LoKr or DoRA on NF4, against PEFT's (DoRA on bitsandbytes, the others dense)."""
    from bench import engine

    kind = engine.Kind(BF16, BF16)

    x, dy = _random(case.m, case.k, device=device), _random(case.m, case.n, device=device)
    x.requires_grad_()
    makers: dict[str, Callable[[], Any]] = {
        "fastlora": partial(engine.ours, case.what, kind, case.k, case.n),
        "our lora": partial(engine.ours, "lora", kind, case.k, case.n),
        "peft": partial(engine.theirs, case.what, kind, case.k, case.n),
    }
    runs: dict[str, Run] = {}
    left_out = []
    for name, make in makers.items():
        try:
            runs[name] = partial(engine.step, make().to(device), x, [dy])
        except ImportError as error:
            left_out.append(f"{name}: {error}")
    return runs, left_out


def _adapters(case: Case, device: str) -> tuple[dict[str, Run], list[str]]:
    """Rows of eight adapters in one batch against one adapter."""
    n, k, m = case.n, case.k, case.m
    weight = fastlora.quantize_4bit(_random(n, k, device=device, scale=k**-0.5))
    x, dy = _random(m, k, device=device), _random(m, n, device=device)
    x.requires_grad_()
    a = _trained([_random(R, k, device=device, scale=k**-0.5) for _ in range(ADAPTERS)])
    b = _trained([_random(n, R, device=device) for _ in range(ADAPTERS)])
    ids = torch.arange(m, device=device) * ADAPTERS // m
    scalings = [SCALING] * ADAPTERS

    def many(x: Tensor) -> Tensor:
        return fastlora.multi_lora_linear(x, weight, None, a, b, scalings, ids)

    def one(x: Tensor) -> Tensor:
        return fastlora.lora_linear(x, weight, None, a[0], b[0], SCALING)

    layers = {
        "fastlora": Layer(many, [*a, *b]),
        "one adapter": Layer(one, [a[0], b[0]]),
    }
    return {name: _timed(layer, x, dy, True) for name, layer in layers.items()}, []
