"""Which kernel runs for how many tokens: one table per GPU architecture, by a roofline model.

Up to a crossover the weight is decoded inside the product ("mma", tokens padded to the tile; "gemv"
for one token without matrix instructions). Above, it is dequantised once and cuBLAS multiplies
("dense"). The defaults are computed (`default_table`), not measured; ``fastlora tune`` measures the
card at hand, and what it stores (`tuned`) is used instead.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fastlora_kernels import tuned

GROUP = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_120": "sm_80"}  # archs that share tiles
TOKENS = (1, 16, 32, 64, 128, 256, 512)  # upper bounds of the table's rows
DIRECTIONS = ("forward", "backward")
LARGEST_TILE = 128
NARROWEST = 32  # columns of a tile, for one of which a row has one absmax: the smallest block size
INTERPRETER = "interpreter"
_assumed: list[str] = []
_forced: list[Plan] = []


class Tile(NamedTuple):
    """Block sizes of a partial kernel: tokens, outputs and terms of the sum per step."""

    block_m: int
    block_o: int
    block_i: int
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """A kernel family, "gemv", "mma" or "dense", and its block sizes (None for "dense")."""

    kind: str
    tile: Tile | None


Table = tuple[tuple[int, Plan], ...]  # (up to this many tokens, plan), ascending
DENSE = Plan("dense", None)


@dataclass(frozen=True)
class Chip:
    """What the roofline model knows of a GPU.

    Attributes:
        units: multiprocessors.
        ghz: their clock.
        lanes: instructions per clock and unit for the mix of a decoder. Up to sm_100, integer
            instructions, two thirds of it, run at half the rate of 128.
        tflops: dense 16-bit matrix products with float32 sums, 1e12 per second.
        tbytes: memory traffic, 1e12 per second.
        decode: how 16-bit weights are decoded, see `_decode`.
        order: order of columns forward, for a float32 absmax and for a double-quantised one.
    """

    units: int
    ghz: float
    lanes: int
    tflops: float
    tbytes: float
    decode: str
    order: tuple[str, str]


_MMA = ("mma", "mma8")
CHIPS = {
    "sm_80": Chip(108, 1.41, 93, 312, 2.0, "prmt", _MMA),  # A100 80 GB
    "sm_86": Chip(82, 1.70, 93, 71, 0.94, "prmt", _MMA),  # RTX 3090
    "sm_89": Chip(128, 2.52, 93, 165, 1.01, "prmt", _MMA),  # RTX 4090
    "sm_90": Chip(132, 1.75, 93, 790, 4.3, "prmt", ("wgmma", "wgmma")),  # H200
    "sm_100": Chip(148, 1.85, 93, 2250, 8.0, "prmt", ("natural", "natural")),  # B200
    "sm_120": Chip(170, 2.41, 128, 210, 1.79, "prmt", _MMA),  # RTX 5090
    "gfx942": Chip(304, 2.1, 64, 1307, 5.3, "gather", ("natural", "natural")),  # MI300X
}

# Tile -> machine instructions per decoded weight in its main loop (bench/results/static.jsonl). A
# row serves as many tokens as its first entry. Backward, block_o lies along K, the row of a weight.
TILES: dict[str, dict[str, dict[Tile, float]]] = {
    "sm_80": {
        "forward": {
            Tile(16, 128, 128, 4, 3): 4.9,
            Tile(32, 128, 128, 4, 3): 5.5,
            Tile(64, 64, 128, 4, 3): 9.4,
            Tile(128, 128, 64, 8, 3): 12.3,
        },
        "backward": {
            Tile(16, 128, 64, 4, 3): 6.6,
            Tile(32, 128, 64, 4, 3): 7.3,
            Tile(64, 128, 64, 8, 3): 10.4,
            Tile(128, 128, 64, 8, 3): 13.7,
        },
    },
    "sm_90": {
        "forward": {
            Tile(16, 64, 256, 4, 3): 4.7,
            Tile(32, 64, 256, 4, 3): 4.9,
            Tile(64, 128, 128, 8, 3): 6.0,
            Tile(128, 128, 128, 8, 3): 6.6,
        },
        "backward": {
            Tile(16, 256, 64, 4, 3): 6.1,
            Tile(32, 256, 64, 4, 3): 6.0,
            Tile(64, 128, 64, 4, 3): 6.3,
            Tile(128, 128, 64, 8, 3): 8.2,
        },
    },
    "sm_100": {
        "forward": {
            Tile(16, 64, 256, 4, 3): 4.9,
            Tile(32, 128, 128, 4, 3): 4.7,
            Tile(64, 128, 128, 4, 3): 4.8,
            Tile(128, 128, 128, 8, 3): 6.0,
        },
        "backward": {
            Tile(16, 128, 64, 4, 3): 6.1,
            Tile(32, 128, 64, 4, 3): 6.1,
            Tile(64, 128, 64, 4, 3): 6.2,
            Tile(128, 128, 64, 8, 3): 8.0,
        },
    },
    "gfx942": {
        "forward": {
            Tile(16, 64, 128, 4, 2): 13.5,
            Tile(32, 64, 128, 4, 2): 14.0,
            Tile(64, 64, 64, 4, 2): 15.5,
            Tile(128, 128, 64, 8, 2): 16.4,
        },
        "backward": {
            Tile(16, 64, 64, 4, 2): 16.1,
            Tile(32, 64, 64, 4, 2): 18.9,
            Tile(64, 64, 64, 4, 2): 18.7,
            Tile(128, 64, 64, 4, 2): 19.5,
        },
    },
}
GEMV = Tile(1, 16, 256, 4, 1)
GEMV_SLOTS = 8.5
FLOAT32 = Tile(16, 32, 32, 4, 2)
FLOAT32_TABLE: dict[str, Table] = {
    "forward": ((1, Plan("gemv", GEMV)), (32, Plan("mma", FLOAT32))),
    "backward": ((32, Plan("mma", FLOAT32)),),
}
RAGGED = Tile(16, 32, 32, 4, 2)  # rows that share bytes or blocks: decoded value by value
RAGGED_TABLE: Table = ((32, Plan("mma", RAGGED)),)
ISSUE, MATRIX, BLAS, MEMORY = 0.7, 0.75, 0.9, 0.85  # fractions of the peaks that code reaches
PACKED, DENSE_BYTES = 0.516, 2.0  # bytes per weight


def tiles(arch: str, direction: str) -> dict[Tile, float]:
    """Return the tiles of an architecture with their instructions per weight."""
    return TILES[GROUP.get(arch, arch)][direction]


def fused_seconds(chip: Chip, tile: Tile, slots: float, m: int, weights: int) -> float:
    """Return the time to decode inside the product, by the roofline model.

    ``max(bytes / bandwidth, passes (weights slots / issue rate + 2 weights block_m / matrix
    rate))`` with ``passes = ceil(m / block_m)``: the same warps decode and multiply, so their times
    add.

    Args:
        chip: the GPU.
        tile: block sizes.
        slots: machine instructions per decoded weight.
        m: tokens.
        weights: N K.
    """
    passes = -(-m // tile.block_m)
    decode = weights * slots / (chip.units * chip.lanes * chip.ghz * 1e9 * ISSUE)
    matrix = 2 * weights * tile.block_m / (chip.tflops * 1e12 * MATRIX)
    return max(weights * PACKED / (chip.tbytes * 1e12 * MEMORY), passes * (decode + matrix))


def dense_seconds(chip: Chip, m: int, weights: int) -> float:
    """Return the time to dequantise and multiply, by the roofline model.

    ``(read + write) / bandwidth + max(2 m weights / matrix rate, dense bytes / bandwidth)``.
    """
    rate = chip.tbytes * 1e12 * MEMORY
    product = 2 * m * weights / (chip.tflops * 1e12 * BLAS)
    copy = weights * (PACKED + DENSE_BYTES) / rate
    return copy + max(product, weights * DENSE_BYTES / rate)


def candidates(arch: str, direction: str, m: int) -> list[tuple[Plan, float]]:
    """Return the plans for m tokens with their seconds per 1e9 weights, by the model."""
    chip, found = CHIPS[arch], [(DENSE, dense_seconds(CHIPS[arch], m, 10**9))]
    for tile, slots in tiles(arch, direction).items():
        if tile.block_m >= min(m, LARGEST_TILE) or tile.block_m == LARGEST_TILE:
            found.append((Plan("mma", tile), fused_seconds(chip, tile, slots, m, 10**9)))
    if m == 1 and direction == "forward":
        found.append((Plan("gemv", GEMV), fused_seconds(chip, GEMV, GEMV_SLOTS, 1, 10**9)))
    return found


@cache
def default_table(arch: str, direction: str) -> Table:
    """Return the table that the model gives for 16-bit tokens; above its last row: "dense"."""
    rows = []
    for m in TOKENS:
        plan = min(candidates(arch, direction, m), key=lambda found: found[1])[0]
        if plan.kind == "dense":
            break
        rows.append((m, plan))
    return tuple(rows)


@cache
def _query(device: torch.device) -> str:
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted((int(name[3:]), name) for name in CHIPS if name.startswith("sm_"))
    older = [name for number, name in known if number <= 10 * major + minor]
    return older[-1] if older else "sm_80"


def arch_of(device: torch.device) -> str:
    """Return the architecture whose table a device uses; "interpreter" for CPU tensors.

    An architecture that has no table uses that of the newest older one.
    """
    return _assumed[-1] if _assumed else _query(device)


@contextmanager
def assume(arch: str) -> Iterator[None]:
    """Take every device for one of this architecture, to compile for it or to test its way."""
    _assumed.append(arch)
    try:
        yield
    finally:
        _assumed.pop()


def decoder(device: torch.device, dtype: torch.dtype) -> str:
    """Return how whole words of a weight are decoded to `dtype` on a device: see `_decode`."""
    arch = arch_of(device)
    if dtype == torch.float32 or arch == INTERPRETER:
        return "gather"
    return CHIPS[arch].decode


def order(device: torch.device, decode: str, nested: bool) -> str:
    """Return the order of columns in which the forward kernel multiplies: see `permute_k`."""
    return CHIPS[arch_of(device)].order[nested] if decode == "prmt" else "natural"


def ragged(k: int) -> bool:
    """Return whether tiles of a weight with k columns straddle bytes or blocks."""
    return k % NARROWEST != 0


@contextmanager
def force(plan: Plan) -> Iterator[None]:
    """Use one plan for every number of 16-bit tokens, to measure it."""
    _forced.append(plan)
    try:
        yield
    finally:
        _forced.pop()


@cache
def measured(device: torch.device) -> tuned.Measured | None:
    """Return what ``fastlora tune`` stored for a GPU; None: nothing."""
    if device.type != "cuda":
        return None
    return tuned.load(tuned_path(device))


def tuned_path(device: torch.device) -> Path:
    """Return the file in which the table of a GPU is stored."""
    import triton

    name = torch.cuda.get_device_name(device)
    return tuned.path_of(name, _query(device), triton.__version__)


@cache
def _measured_table(device: torch.device, direction: str) -> Table | None:
    found = measured(device)
    if found is None:
        return None
    return tuple(
        (tokens, Plan(kind, None if tile is None else Tile(*tile)))
        for tokens, kind, tile in found.tables[direction]
    )


def table(device: torch.device, direction: str) -> Table:
    """Return the table of a device for 16-bit tokens: the measured one, or the model's."""
    arch = arch_of(device)
    found = None if _assumed else _measured_table(device, direction)
    if found is not None:
        return found
    return default_table("sm_90" if arch == INTERPRETER else arch, direction)


def row(rows: Table, m: int) -> Plan:
    """Return the plan for m tokens."""
    at = bisect_left(rows, m, key=lambda entry: entry[0])
    return rows[at][1] if at < len(rows) else DENSE


def plan(device: torch.device, dtype: torch.dtype, m: int, direction: str, k: int) -> Plan:
    """Return what runs for m tokens.

    Args:
        device: of the tokens.
        dtype: of the tokens.
        m: tokens.
        direction: "forward" or "backward".
        k: columns of the weight.
    """
    if ragged(k):
        return row(RAGGED_TABLE, m)
    if dtype == torch.float32:
        return row(FLOAT32_TABLE[direction], m)
    return _forced[-1] if _forced else row(table(device, direction), m)


def fused_plan(device: torch.device, dtype: torch.dtype, m: int, k: int) -> Plan:
    """Return the forward "mma" plan for m tokens, at most the largest tile, whatever it costs."""
    if ragged(k):
        return Plan("mma", RAGGED)
    if dtype == torch.float32:
        return Plan("mma", FLOAT32)
    arch = arch_of(device)
    found = tiles("sm_90" if arch == INTERPRETER else arch, "forward")
    return Plan("mma", next(tile for tile in found if tile.block_m >= min(m, LARGEST_TILE)))
