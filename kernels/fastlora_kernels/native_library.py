"""The C library of csrc/: where it is, whether it fits, its structs and functions.

A missing library, or one built from another source, is an ImportError that says what to run; there
is no slower path behind it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from importlib.resources import files
from pathlib import Path

import torch

ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ABI = 5
_REBUILD = "run `pip install -e .` (or `pip install --force-reinstall fastlora`) again"


class Weight(ctypes.Structure):
    """fastlora_weight of csrc/fastlora.h."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("code", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_code", ctypes.c_void_p),
        ("nested_offset", ctypes.c_void_p),
        ("block_shift", ctypes.c_int32),
    ]


class Lora(ctypes.Structure):
    """fastlora_lora of csrc/fastlora.h."""

    _fields_ = [
        ("r", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("scaling", ctypes.c_float),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("seed", ctypes.c_void_p),
        ("dropout", ctypes.c_double),
    ]


_p, _i32, _i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_w, _l = ctypes.POINTER(Weight), ctypes.POINTER(Lora)

# name -> (argument types, result type); the one place that mirrors csrc/fastlora.h.
_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "fastlora_abi_version": ([], _i32),
    "fastlora_source_id": ([], ctypes.c_char_p),
    "fastlora_isa": ([], ctypes.c_char_p),
    "fastlora_set_isa": ([ctypes.c_char_p], _i32),
    "fastlora_lora_linear": ([_i32, _i64, _p, _i64, _w, _p, _l, _p, _p, _i32], _i32),
    "fastlora_lora_linear_backward": (
        [_i32, _i64, _p, _i64, _p, _i64, _p, _w, _l, _p, _p, _p, _i32],
        _i32,
    ),
    "fastlora_lora_group": ([_i32, _i64, _p, _i64, _i32, _w, _p, _l, _p, _p, _i32], _i32),
    "fastlora_lora_group_backward": (
        [_i32, _i64, _i32, _p, _p, _p, _i64, _p, _w, _l, _p, _p, _p, _i32],
        _i32,
    ),
    "fastlora_lora_experts": (
        [_i32, _i64, _p, _i64, _i64, _p, _w, _p, _l, _p, _p, _i32],
        _i32,
    ),
    "fastlora_lora_experts_backward": (
        [_i32, _i64, _p, _i64, _p, _i64, _p, _i64, _p, _w, _l, _p, _p, _p, _i32],
        _i32,
    ),
    "fastlora_weight_dots": ([_i32, _i32, _i64, _p, _w, _p, _i32], _i32),
    "fastlora_weight_squares": ([_i32, _w, _p, _i32], _i32),
    "fastlora_scaled_linear": (
        [_i32, _i64, _p, _i64, _w, _l, _p, _p, _p, _p, _p, _p, _p, _i32],
        _i32,
    ),
    "fastlora_row_norms": ([_i32, _i64, _i64, _p, _p, _p, _p, ctypes.c_float, _p, _i32], _i32),
    "fastlora_products": ([_i32, _i32, _p, _p, _p, _p, _i32], _i32),
    "fastlora_products_backward": ([_i32, _i32, _p, _p, _p, _p, _p, _p, _i32], _i32),
    "fastlora_add_kron": ([_i32, _i64, _p, _i64, _p, _p, _p, _p, _p, _i32], _i32),
    "fastlora_add_kron_backward": (
        [_i32, _i64, _p, _i64, _p, _i64, _p, _p, _p, _p, _p, _p, _i32],
        _i32,
    ),
    "fastlora_scale_columns": ([_i32, _i64, _i64, _p, _p, _p, _p, _i32], _i32),
    "fastlora_scale_columns_backward": (
        [_i32, _i64, _i64, _p, _i64, _p, _p, _p, _p, _i32],
        _i32,
    ),
    "fastlora_quantize_4bit": ([_i32, _i64, _p, _p, _p, _i64, _p, _p, _i32], _i32),
    "fastlora_dequantize_4bit": ([_i32, _w, _p, _i32], _i32),
}


def _library_path() -> Path:
    given = os.environ.get("FASTLORA_CPU_LIBRARY")
    return Path(given) if given else Path(str(files("fastlora_kernels") / "libfastlora_cpu.so"))


def source_id(csrc: Path) -> str:
    """The hash of a source folder, as csrc/CMakeLists.txt compiles it into the library."""
    sources = sorted([*csrc.glob("*.cpp"), *csrc.glob("*.h")], key=lambda path: path.name)
    lines = [f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in sources]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _load(path: Path) -> ctypes.CDLL:
    if not path.is_file():
        raise ImportError(
            f"the CPU kernels must be built, but {path} does not exist: {_REBUILD}, "
            "with a C++17 compiler present"
        )
    try:
        if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):  # torch built with another OpenMP
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"{path} cannot be loaded ({error}): {_REBUILD}") from error


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, its functions typed.

    Raises:
        ImportError: it is missing, cannot be loaded, or was built from another source.
    """
    path = _library_path()
    lib = _load(path)
    abi = lib.fastlora_abi_version() if hasattr(lib, "fastlora_abi_version") else None
    if abi != _ABI:
        raise ImportError(f"{path} has C ABI {abi}, but this fastlora needs {_ABI}: {_REBUILD}")
    for name, (argtypes, restype) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = argtypes, restype
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    if csrc.is_dir() and (built := lib.fastlora_source_id().decode()) != source_id(csrc):
        raise ImportError(f"{path} was built from another source than {csrc} ({built}): {_REBUILD}")
    wanted = os.environ.get("FASTLORA_CPU_ISA")
    if wanted and lib.fastlora_set_isa(wanted.encode()) != 0:
        raise ImportError(
            f"FASTLORA_CPU_ISA must name an instruction set that this CPU has, one of {ISAS}, "
            f"got {wanted!r}; unset it to use the widest"
        )
    return lib


def isa() -> str:
    """The instruction set in use, one of `ISAS`."""
    name: bytes = library().fastlora_isa()
    return name.decode()


def set_isa(name: str) -> None:
    """Use an instruction set for all later calls in this process.

    Raises:
        ValueError: the name is unknown or this CPU lacks it.
    """
    if library().fastlora_set_isa(name.encode()) != 0:
        raise ValueError(
            f"isa must be one of {ISAS} that this CPU has, got {name!r}; use {isa()!r}"
        )
