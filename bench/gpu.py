"""Run what needs a GPU: the kernel contract on the device, then the benchmark of the linear layer.

``python -m bench.gpu [option of bench.linear ...]``: exit status 2 without CUDA, 1 when a test
fails (nothing is timed then), else that of the benchmark, which appends its lines to bench/results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def run_tests() -> int:
    """Return the exit status of the tests marked gpu, with kernels compiled for the device."""
    environment = {**os.environ, "FASTLORA_TEST_GPU": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run tests and benchmark; return the exit status."""
    if not torch.cuda.is_available():
        print("bench.gpu needs a CUDA device, found none; run it on a machine with a GPU")
        return 2
    if run_tests():
        print("the kernel tests failed on this GPU, so nothing was timed; see above")
        return 1
    from bench import linear

    options = list(sys.argv[1:] if argv is None else argv)
    status: int = linear.main(["--device", "cuda", *options])
    return status


if __name__ == "__main__":
    sys.exit(main())
