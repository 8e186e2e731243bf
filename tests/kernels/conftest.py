"""Where the tests of Triton kernels run: in the interpreter, or on a GPU (FASTLORA_TEST_GPU=1)."""

from __future__ import annotations

import pytest
import torch

from tests import interpreter

# The kernels of one process are all interpreted or all compiled.
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if interpreter.on_gpu() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The device of this run: "cpu", in the interpreter, or "cuda"."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("FASTLORA_TEST_GPU=1 needs a CUDA device, found none; unset it")
    return str(request.param)
