"""Where kernel tests run.

Triton: in the interpreter, or on a GPU (FASTLORA_TEST_GPU=1). C++: with each instruction set.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fastlora_kernels import native

from tests import interpreter

# The kernels of one process are all interpreted or all compiled.
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if interpreter.on_gpu() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The device of this run: "cpu", in the interpreter, or "cuda"."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("FASTLORA_TEST_GPU=1 needs a CUDA device, found none; unset it")
    return str(request.param)


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the C++ kernels that this CPU has."""
    before, name = native.isa(), str(request.param)
    try:
        native.set_isa(name)
    except ValueError:
        pytest.skip(f"this CPU has no {name}")
    yield name
    native.set_isa(before)
