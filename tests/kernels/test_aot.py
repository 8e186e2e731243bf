from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fastlora_kernels import aot, aot_cases

ROOT = Path(__file__).parents[2]
EVERY_KERNEL = set(
    re.findall(
        r"^def (\w+_kernel)\(",
        "".join(path.read_text() for path in (ROOT / "kernels" / "fastlora_kernels").glob("*.py")),
        re.MULTILINE,
    )
)


def run(*options: str, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= extra
    environment["PYTHONPATH"] = f"{ROOT / 'kernels'}:{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "fastlora_kernels.aot", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    """The most demanding variant of every kernel, on every architecture."""
    done = run("--quick", "--json", str(tmp_path / "table.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads((tmp_path / "table.json").read_text())["kernels"]
    assert {r["arch"] for r in reports} == set(aot.ARCHS)
    assert {r["kernel"] for r in reports} == EVERY_KERNEL
    assert all(r["registers"] > 0 for r in reports)
    nvidia = [r for r in reports if r["arch"].startswith("sm_")]
    assert not any(r["spills"] for r in nvidia)
    assert all(r["matrix"] > 0 for r in reports if r["kernel"].startswith("lora_linear_fwd"))


def test_interpreted_kernels_are_refused() -> None:
    done = run("--quick", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET must be unset" in done.stdout


def test_every_case_has_the_arguments_of_a_launch() -> None:
    found = aot_cases.cases("sm_90", "full")
    assert {case.kernel.__name__ for case in found} == EVERY_KERNEL
    tiles = {case.options.get("BLOCK_M") for case in found if case.options.get("BLOCK_I")}
    assert tiles == {1, 16, 32, 64, 128}
    for case in found:
        assert all(
            not isinstance(a, torch.Tensor) or a.device.type == "cpu" for a in case.arguments
        )


class _Compiled:
    """What a kernel compiles to, with faults to find."""

    class metadata:
        shared = 200_000

    asm = {"amdgcn": ".vgpr_count: 12\n.vgpr_spill_count: 3\nv_fma_f32"}


class _Kernel:
    __name__ = "faulty_kernel"

    def warmup(self, *args: object, **kwargs: object) -> _Compiled:
        return _Compiled()


def test_faults_are_named() -> None:
    case = aot_cases.Case(_Kernel(), "variant", (), {}, wants_matrix=True, no_fma=True)
    problem = aot.inspect(case, "gfx942").problem
    assert "needs 200000 bytes of shared memory, has 65536" in problem
    assert "has no matrix instruction" in problem
    assert "fuses a product and a sum" in problem


def test_compile_error_is_a_problem() -> None:
    class Broken(_Kernel):
        def warmup(self, *args: object, **kwargs: object) -> _Compiled:
            raise RuntimeError("out of resources")

    case = aot_cases.Case(Broken(), "variant", (), {}, wants_matrix=True, no_fma=False)
    assert "does not compile: RuntimeError: out of resources" in aot.inspect(case, "sm_90").problem
