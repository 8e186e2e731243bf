"""Peak memory of a call, from the kernel's own counters (Linux)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from torch import Tensor


def peak(run: Callable[[], object], outputs: int) -> int:
    """Peak bytes of the process during `run` beyond what it had before and what it returns.

    Args:
        run: returns the tensors that count as outputs, or a tuple of them.
        outputs: bytes of outputs that it makes but doesn't return.
    """
    ctypes.CDLL(None).malloc_trim(0)  # so that no freed memory is used again unseen
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    before = _status("VmRSS")
    result = run()
    returned = result if isinstance(result, (tuple, list)) else (result,)
    outputs += sum(t.numel() * t.element_size() for t in returned if isinstance(t, Tensor))
    return _status("VmHWM") - before - outputs


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
