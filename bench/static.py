"""What the compiler makes of every kernel, without a GPU: the instructions of its main loop.

python -m bench.static            # compile, print, and replace bench/results/static.jsonl
python -m bench.static --check    # compile, and compare with the file: status 1 when worse

Per kernel, variant and architecture: registers, spills, shared memory; of the main loop, the
instructions of a warp, those that multiply matrices and the share of issue slots they have, bytes
that a thread loads from global memory per turn, and instructions per decoded weight.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from typing import Any

from fastlora_kernels import aot, assembly
from fastlora_kernels.aot_cases import Case, cases

from bench.common import RESULTS

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
FILE = RESULTS / "static.jsonl"
GROWTH = 1.10  # of a loop, that is still taken for noise of the compiler
Row = dict[str, Any]
_COLUMNS = (
    "kernel", "variant", "arch", "registers", "spills", "shared", "loop", "matrix", "share",
    "bytes", "per_weight",
)  # fmt: skip


def measure(arch: str, scope: str) -> list[Row]:
    """Compile every case for one architecture."""
    aot.skip_missing_linker()
    return [_row(case, arch) for case in cases(arch, scope)]


def _row(case: Case, arch: str) -> Row:
    compiled = aot.compile_case(case, arch)
    name = case.kernel.__name__
    report = aot.examine(case, compiled, aot.Report(name, case.variant, arch))
    loop = assembly.main_loop(aot.machine_code(compiled))
    length, matrix = len(loop.instructions), loop.matrix
    lanes = aot.ARCHS[arch].warp * case.options.get("num_warps", 4)
    per_weight = round(length * lanes / case.weights, 2) if case.weights else None
    return {
        "kernel": name,
        "variant": case.variant,
        "tile": [case.options.get(f"BLOCK_{side}") for side in "MOI"],
        "arch": arch,
        "registers": report.registers,
        "spills": report.spills,
        "shared": report.shared,
        "loop": length,
        "matrix": matrix,
        "share": round(matrix / length, 3) if length else 0.0,
        "bytes": loop.global_bytes,
        "per_weight": per_weight,
        "problem": report.problem,
    }


def measure_all(scope: str) -> list[Row]:
    """Compile every case for every architecture, two at a time."""
    with ProcessPoolExecutor(2) as pool:
        rows = [row for found in pool.map(measure, ARCHS, repeat(scope)) for row in found]
    return sorted(rows, key=lambda row: (row["kernel"], row["variant"], row["arch"]))


def key_of(row: Row) -> tuple[str, str, str]:
    """What a row is of."""
    return row["kernel"], row["variant"], row["arch"]


def worse(new: Row, old: Row, same_compiler: bool) -> list[str]:
    """Return what got worse, a sentence each."""
    found = []
    if new["spills"] > old["spills"] and not new["arch"].startswith("gfx"):
        found.append(f"spills {new['spills']} registers, did {old['spills']}")
    if old["matrix"] and not new["matrix"]:
        found.append("has no matrix instruction in its loop any more")
    for field, words in (("loop", "instructions in its loop"), ("per_weight", "per weight")):
        before, now = old[field], new[field]
        if same_compiler and before and now and now > GROWTH * before:
            found.append(f"takes {now} {words}, took {before}")
    return [f"{' '.join(key_of(new))}: {text}" for text in found]


def compare(rows: Iterable[Row], kept: Iterable[Row], same_compiler: bool) -> list[str]:
    """Return what got worse since the file, a sentence each; new variants are not in it."""
    before = {key_of(row): row for row in kept}
    found = []
    for row in rows:
        if row["problem"]:
            found.append(f"{' '.join(key_of(row))}: {row['problem']}")
        if key_of(row) in before:
            found += worse(row, before[key_of(row)], same_compiler)
    return found


def table(rows: Iterable[Row]) -> str:
    """The rows as text."""
    cells = [_COLUMNS, *([str(row[c]) for c in _COLUMNS] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description="the main loop of every kernel, without a GPU")
    parser.add_argument("--check", action="store_true", help="compare with the file instead")
    parser.add_argument("--quick", action="store_true", help="the most demanding variants only")
    options = parser.parse_args()
    rows = measure_all("quick" if options.quick or options.check else "default")
    if not options.check:
        print(table(rows))
        FILE.write_text(
            "".join(json.dumps({"triton": triton.__version__, **r}) + "\n" for r in rows)
        )
        return 0
    kept = [json.loads(line) for line in FILE.read_text().splitlines()]
    same = {row["triton"] for row in kept} == {triton.__version__}
    if not same:
        print(f"{FILE.name} is of another triton, so only spills and matrix use are compared")
    found = compare(rows, kept, same)
    print("\n".join(found) or f"{len(rows)} kernels are no worse than in {FILE.name}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
