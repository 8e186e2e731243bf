"""The C++ CPU kernels of csrc/: finds the library, checks that it fits, and calls it with tensors.

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
from torch import Tensor

from fastlora_kernels.formats import (
    FORMATS,
    StoredWeight,
    code_table,
    nested_table,
    rounding_tables,
)
from fastlora_kernels.low_rank import LowRank

ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ABI = 2
_CPU = torch.device("cpu")
_REBUILD = "run `pip install -e .` (or `pip install --force-reinstall fastlora`) again"


class _Weight(ctypes.Structure):
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


class _Lora(ctypes.Structure):
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
_w, _l = ctypes.POINTER(_Weight), ctypes.POINTER(_Lora)

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
    "fastlora_weight_dots": ([_i32, _i32, _i64, _p, _w, _p, _i32], _i32),
    "fastlora_weight_squares": ([_i32, _w, _p, _i32], _i32),
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
            f"The CPU kernels must be built, but {path} does not exist: {_REBUILD}, "
            "with a C++17 compiler present."
        )
    try:
        if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):  # torch built with another OpenMP
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"{path} cannot be loaded ({error}): {_REBUILD}.") from error


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
        raise ImportError(f"{path} has C ABI {abi}, but this fastlora needs {_ABI}: {_REBUILD}.")
    for name, (argtypes, restype) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = argtypes, restype
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    if csrc.is_dir() and (built := lib.fastlora_source_id().decode()) != source_id(csrc):
        raise ImportError(
            f"{path} was built from another source than {csrc} ({built}): {_REBUILD}."
        )
    wanted = os.environ.get("FASTLORA_CPU_ISA")
    if wanted and lib.fastlora_set_isa(wanted.encode()) != 0:
        raise ImportError(
            f"FASTLORA_CPU_ISA must name an instruction set that this CPU has, one of {ISAS}, "
            f"got {wanted!r}; unset it to use the widest."
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
            f"isa must be one of {ISAS} that this CPU has, got {name!r}; use {isa()!r}."
        )


@functools.cache
def _tables(format: str) -> tuple[int, int]:
    """Addresses of a format's code book and of the code book of nested magnitudes, kept alive."""
    return code_table(FORMATS[format], _CPU).data_ptr(), nested_table(_CPU).data_ptr()


def _describe(weight: StoredWeight, n: int, k: int) -> _Weight:
    """The C view of a stored weight. The caller keeps the tensors alive."""
    data, absmax, nested, offset, format, blocksize = weight
    if absmax is None:
        return _Weight(n, k, 0, DTYPES[data.dtype], data.data_ptr())
    code, nested_code = _tables(format)
    inner, mean = _pointer(nested), _pointer(offset)
    shift = blocksize.bit_length() - 1
    return _Weight(
        n, k, 1, 0, data.data_ptr(), code, absmax.data_ptr(), inner, nested_code, mean, shift
    )


def _contiguous(weight: StoredWeight) -> StoredWeight:
    data, absmax, nested = weight[:3]
    if (
        data.is_contiguous()
        and (absmax is None or absmax.is_contiguous())
        and (nested is None or nested.is_contiguous())
    ):
        return weight
    absmax = None if absmax is None else absmax.contiguous()
    nested = None if nested is None else nested.contiguous()
    return weight._replace(data=data.contiguous(), absmax=absmax, nested_absmax=nested)


def _low_rank(update: LowRank | None) -> tuple[_Lora, LowRank | None]:
    """The C view of an update, and the update whose tensors must outlive it."""
    if update is None:
        return _Lora(), None
    a, b, scaling, dropout, seed, spans = update
    if not (a.is_contiguous() and b.is_contiguous() and (spans is None or spans.is_contiguous())):
        a, b = a.contiguous(), b.contiguous()
        spans = None if spans is None else spans.contiguous()
        update = LowRank(a, b, scaling, dropout, seed, spans)
    pointers = (a.data_ptr(), b.data_ptr(), _pointer(spans), _pointer(seed))
    return _Lora(a.shape[0], DTYPES[a.dtype], scaling, *pointers, dropout), update


def _rows(x: Tensor) -> Tensor:
    """A matrix whose rows are contiguous."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(status: int, name: str) -> None:
    if status != 0:
        raise RuntimeError(f"{name} refused its arguments (status {status}): please report this.")


def lora_linear(
    x: Tensor,
    weight: StoredWeight,
    n: int,
    bias: Tensor | None,
    update: LowRank | None,
) -> tuple[Tensor, Tensor]:
    """``y = x W^T + bias + scaling s B^T`` and ``s = mask_spans(drop(x) A^T)``.

    Args:
        x: (M, K) float32 or bfloat16.
        weight: (N, K): 4-bit, or dense in x's dtype.
        n: rows of the weight.
        bias: (N,) any float, or None.
        update: the low-rank term, float32 or in x's dtype, or None.

    Returns:
        y (M, N) in x's dtype; s (M, R) float32, or (0,) without an update.
    """
    x, weight = _rows(x), _contiguous(weight)
    m, k = x.shape
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    lora, alive = _low_rank(update)
    y = x.new_empty(m, n)
    s = x.new_empty((m, lora.r) if alive is not None else (0,), dtype=torch.float32)
    status = library().fastlora_lora_linear(
        DTYPES[x.dtype],
        m,
        x.data_ptr(),
        x.stride(0),
        ctypes.byref(_describe(weight, n, k)),
        _pointer(bias),
        ctypes.byref(lora),
        s.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    _check(status, "fastlora_lora_linear")
    return y, s


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    k: int,
    update: LowRank | None,
    need_dx: bool,
    need_dlora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lora_linear` for the output gradient dy (M, N).

    Args:
        dy: (M, N) float32 or bfloat16.
        x: (M, K) and s: (M, R) of the forward pass, needed for the adapter's gradients.
        s: see x.
        weight: as in the forward pass.
        k: columns of the weight.
        update: as in the forward pass.
        need_dx: compute dx.
        need_dlora: compute dA and dB.

    Returns:
        dx (M, K) in dy's dtype, dA (R, K) and dB (N, R) in the update's dtype; without elements
        where not needed.
    """
    dy, weight = _rows(dy), _contiguous(weight)
    m, n = dy.shape
    x = None if x is None or not need_dlora else _rows(x)
    s = None if s is None else s.contiguous()
    lora, alive = _low_rank(update)
    dx = dy.new_empty((m, k) if need_dx else (0,))
    da = db = dy.new_empty(0)
    if need_dlora and alive is not None:
        da, db = torch.empty_like(alive.A), torch.empty_like(alive.B)
    status = library().fastlora_lora_linear_backward(
        DTYPES[dy.dtype],
        m,
        dy.data_ptr(),
        dy.stride(0),
        _pointer(x),
        0 if x is None else x.stride(0),
        _pointer(s),
        ctypes.byref(_describe(weight, n, k)),
        ctypes.byref(lora),
        dx.data_ptr() if need_dx else None,
        da.data_ptr() if need_dlora else None,
        db.data_ptr() if need_dlora else None,
        torch.get_num_threads(),
    )
    _check(status, "fastlora_lora_linear_backward")
    return dx, da, db


def weight_dots(a: Tensor, weight: StoredWeight, n: int, dtype: torch.dtype) -> Tensor:
    """``a W^T``, with W decoded to `dtype` and sums in float32.

    Args:
        a: (R, K) float32 or `dtype`.
        weight: (N, K): 4-bit, or dense of `dtype`.
        n: rows of the weight.
        dtype: float32 or bfloat16.

    Returns:
        (R, N) float32.
    """
    a, weight = a.contiguous(), _contiguous(weight)
    r, k = a.shape
    out = a.new_empty((r, n), dtype=torch.float32)
    view, threads = ctypes.byref(_describe(weight, n, k)), torch.get_num_threads()
    status = library().fastlora_weight_dots(
        DTYPES[dtype], DTYPES[a.dtype], r, a.data_ptr(), view, out.data_ptr(), threads
    )
    _check(status, "fastlora_weight_dots")
    return out


def weight_squares(weight: StoredWeight, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Sum of squares of each row of a weight (n, k) decoded to `dtype`: (n,) float32."""
    weight = _contiguous(weight)
    out = torch.empty(n, dtype=torch.float32)
    view, threads = ctypes.byref(_describe(weight, n, k)), torch.get_num_threads()
    status = library().fastlora_weight_squares(DTYPES[dtype], view, out.data_ptr(), threads)
    _check(status, "fastlora_weight_squares")
    return out


def scale_columns(z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``z * scale + bias`` in float32, rounded once.

    Args:
        z: (M, N) float32 or bfloat16.
        scale: (N,) float32.
        bias: (N,) any float, or None.

    Returns:
        (M, N) in z's dtype.
    """
    z, scale = z.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    m, n = z.shape
    y = torch.empty_like(z)
    pointers = (z.data_ptr(), scale.data_ptr(), _pointer(bias), y.data_ptr())
    status = library().fastlora_scale_columns(
        DTYPES[z.dtype], m, n, *pointers, torch.get_num_threads()
    )
    _check(status, "fastlora_scale_columns")
    return y


def scale_columns_backward(
    dy: Tensor, z: Tensor | None, scale: Tensor, need_dz: bool, need_dscale: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `scale_columns`: dz (M, N) in dy's dtype and dscale (N,) float32.

    What is not needed comes back without elements; z is needed for `need_dscale`.
    """
    dy, scale = _rows(dy), scale.contiguous()
    z = None if z is None or not need_dscale else z.contiguous()
    m, n = dy.shape
    dz = dy.new_empty((m, n) if need_dz else (0,))
    dscale = scale.new_empty(n if need_dscale else 0)
    if m == 0:
        return dz, dscale.zero_()
    status = library().fastlora_scale_columns_backward(
        DTYPES[dy.dtype],
        m,
        n,
        dy.data_ptr(),
        dy.stride(0),
        _pointer(z),
        scale.data_ptr(),
        dz.data_ptr() if need_dz else None,
        dscale.data_ptr() if need_dscale else None,
        torch.get_num_threads(),
    )
    _check(status, "fastlora_scale_columns_backward")
    return dz, dscale


def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise 4-bit quantisation, bit-equal to bitsandbytes.

    Args:
        weight: any shape, float32, bfloat16 or float16, on CPU.
        quant_type: a name in `fastlora_kernels.formats.FORMATS`.
        blocksize: values per magnitude.

    Returns:
        packed ((numel + 1) // 2, 1) uint8 and absmax (ceil(numel / blocksize),) float32.
    """
    weight = weight.contiguous()
    n = weight.numel()
    thresholds, order = rounding_tables(FORMATS[quant_type], _CPU)
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32)
    status = library().fastlora_quantize_4bit(
        DTYPES[weight.dtype],
        n,
        weight.data_ptr(),
        thresholds.data_ptr(),
        order.data_ptr(),
        blocksize,
        packed.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    _check(status, "fastlora_quantize_4bit")
    return packed, absmax


def dequantize_4bit(weight: StoredWeight, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix of a 4-bit weight on CPU.

    Args:
        weight: 4-bit.
        n: rows.
        k: columns.
        dtype: float32, bfloat16 or float16.

    Returns:
        (n, k) ``dtype``.
    """
    weight = _contiguous(weight)
    out = torch.empty(n, k, dtype=dtype)
    view = ctypes.byref(_describe(weight, n, k))
    status = library().fastlora_dequantize_4bit(
        DTYPES[dtype], view, out.data_ptr(), torch.get_num_threads()
    )
    _check(status, "fastlora_dequantize_4bit")
    return out
