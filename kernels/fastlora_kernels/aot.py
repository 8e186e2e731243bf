"""Compile every Triton kernel ahead of time, without a GPU, and hold what the compiler made of it.

``python -m fastlora_kernels.aot [--arch sm_90 ...] [--quick | --full] [--json FILE]`` prints one
line per kernel, variant and architecture: registers, spills, shared memory, matrix instructions.
The exit status is 1 when one does not compile, spills on NVIDIA, needs more shared memory than a
block may have, lacks the matrix instructions that its variant is meant to use, or fuses a product
and a sum that must round apart.

Kernels are specialised by Triton's own launch path: a driver that only names an architecture takes
the place of the GPU's. NVIDIA figures come from the tools in the triton wheel, AMD's from the
assembly.

Source: CUDA C++ programming guide, table of compute capabilities (shared memory per block).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from fastlora_kernels.aot_cases import Case, cases


@dataclass(frozen=True)
class Arch:
    """A GPU architecture: how Triton names it, its shared memory and its matrix instructions."""

    backend: str
    name: int | str
    warp: int
    shared: int  # bytes per block
    matrix: str  # regular expression for matrix instructions in its assembly


MMA = r"mma\.sync"
FUSED = r"fma\.rn\.f32|v_(?:fma|fmac|mac|mad)_f32"
WGMMA, TCGEN05 = MMA + r"|wgmma\.mma_async", MMA + r"|tcgen05\.mma"
ARCHS = {
    "sm_80": Arch("cuda", 80, 32, 166912, MMA),
    "sm_86": Arch("cuda", 86, 32, 101376, MMA),
    "sm_89": Arch("cuda", 89, 32, 101376, MMA),
    "sm_90": Arch("cuda", 90, 32, 232448, WGMMA),
    "sm_100": Arch("cuda", 100, 32, 232448, TCGEN05),
    "sm_120": Arch("cuda", 120, 32, 101376, MMA),
    "gfx942": Arch("hip", "gfx942", 64, 65536, r"v_mfma"),
}


@dataclass
class Report:
    """What the compiler made of one case on one architecture."""

    kernel: str
    variant: str
    arch: str
    registers: int = 0
    spills: int = 0  # NVIDIA: loads and stores of local memory in the code; AMD: registers spilled
    shared: int = 0  # bytes
    matrix: int = 0  # matrix instructions in the code
    problem: str = ""


class _NamedDriver:
    """Stands in for a GPU driver: it says what to compile for, and can launch nothing."""

    def __init__(self, target: Any, ordinal: int):
        self.target, self.ordinal = target, ordinal

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.ordinal  # triton keeps one compiler per device ordinal

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextmanager
def _compiling_for(arch: str) -> Iterator[None]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    spec = ARCHS[arch]
    target = GPUTarget(spec.backend, spec.name, spec.warp)
    driver.set_active(_NamedDriver(target, 1000 + list(ARCHS).index(arch)))
    yield


def skip_missing_linker() -> None:
    """Leave AMD code unlinked where no lld is found: the figures are in the assembly."""
    from triton.backends.amd import compiler

    backend = compiler.HIPBackend
    try:
        backend.path_to_rocm_lld()
    except Exception:  # triton raises no narrower class
        backend.make_hsaco = staticmethod(lambda *args: b"")
        backend.hash = lambda self: str(self.target)


def _run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def machine_code(compiled: Any) -> str:
    """Return the disassembly of an NVIDIA kernel, or the assembly of an AMD one."""
    if "cubin" not in compiled.asm:
        return str(compiled.asm["amdgcn"])
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return _run(tool, "-c", file.name)


def _nvidia_figures(compiled: Any, report: Report, matrix: str) -> None:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        stack = _number(r"STACK:(\d+)", usage)
        code = _run(tools / "nvdisasm", "-c", file.name) if stack else ""
    report.registers = _number(r"REG:(\d+)", usage)
    report.spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    report.matrix = len(re.findall(matrix, compiled.asm["ptx"]))


def _amd_figures(compiled: Any, report: Report, matrix: str) -> None:
    code: str = compiled.asm["amdgcn"]
    report.registers = _number(r"\.vgpr_count:\s+(\d+)", code)
    report.spills = _number(r"\.vgpr_spill_count:\s+(\d+)", code)
    report.matrix = len(re.findall(matrix, code))


def inspect(case: Case, arch: str) -> Report:
    """Return what the compiler makes of one case on one architecture."""
    report = Report(case.kernel.__name__, case.variant, arch)
    try:
        compiled = compile_case(case, arch)
    except Exception as error:  # the compiler raises every class there is
        report.problem = f"does not compile: {type(error).__name__}: {str(error)[-200:]}"
        return report
    return examine(case, compiled, report)


def compile_case(case: Case, arch: str) -> Any:
    """Return a case's kernel as Triton compiles it for an architecture."""
    with _compiling_for(arch):
        return case.kernel.warmup(*case.arguments, grid=(1,), **case.options)


def examine(case: Case, compiled: Any, report: Report) -> Report:
    """Write into a report what became of a compiled case."""
    spec = ARCHS[report.arch]
    figures = _nvidia_figures if spec.backend == "cuda" else _amd_figures
    figures(compiled, report, spec.matrix)
    report.shared = compiled.metadata.shared
    problems = []
    if report.spills and spec.backend == "cuda":
        problems.append("spills registers")
    if report.shared > spec.shared:
        problems.append(f"needs {report.shared} bytes of shared memory, has {spec.shared}")
    if case.wants_matrix and not report.matrix:
        problems.append("has no matrix instruction")
    if case.no_fma and re.search(FUSED, _assembly(compiled)):
        problems.append("fuses a product and a sum that must round apart")
    report.problem = "; ".join(problems)
    return report


def inspect_all(arch: str, scope: str) -> list[Report]:
    """Return what the compiler makes of every case on one architecture."""
    skip_missing_linker()
    return [inspect(case, arch) for case in cases(arch, scope)]


def _assembly(compiled: Any) -> str:
    text: str = compiled.asm["ptx"] if "ptx" in compiled.asm else compiled.asm["amdgcn"]
    return text


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastlora_kernels.aot")
    parser.add_argument("--arch", nargs="+", choices=list(ARCHS), default=list(ARCHS))
    scopes = parser.add_mutually_exclusive_group()
    scopes.add_argument("--quick", action="store_true", help="the most demanding variants only")
    scopes.add_argument("--full", action="store_true", help="every combination: minutes")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 when a case has a problem, else 0."""
    args = _parse(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET must be unset to compile kernels, got 1; unset it")
        return 2
    import triton

    print(f"triton {triton.__version__}, torch {torch.__version__}")
    row = "{:28} {:34} {:7} {:>9} {:>8} {:>7} {:>7}  {}"
    print(row.format("kernel", "variant", "arch", "registers", "spills", "shared", "matrix", ""))
    scope = "quick" if args.quick else "full" if args.full else "default"
    reports = []
    with ProcessPoolExecutor(min(len(args.arch), os.cpu_count() or 1)) as pool:
        for found in pool.map(inspect_all, args.arch, repeat(scope)):
            reports += found
    for report in sorted(reports, key=lambda r: (r.kernel, r.variant)):
        print(row.format(*asdict(report).values()).rstrip())
    failed = sum(bool(report.problem) for report in reports)
    print(f"{len(reports)} compiled, {failed} with a problem")
    if args.json:
        lines = {"triton": triton.__version__, "kernels": [asdict(r) for r in reports]}
        args.json.write_text(json.dumps(lines, indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
