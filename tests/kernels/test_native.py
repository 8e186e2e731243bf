"""The C++ kernels against the contract: each instruction set, format, dtype and odd shape."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastlora_kernels import native, native_library
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora.backends import native as backend
from fastlora.backends import reference
from fastlora.dispatch import Problem
from tests import contract
from tests.kernels.native_problems import KINDS, operands, stored

SCALING = 0.7
# m, n, k, r: one token; few; around the vector, tile and panel widths; more than one panel deep
SHAPES = [
    (1, 64, 128, 64),
    (3, 17, 129, 3),
    (8, 100, 192, 16),
    (9, 33, 64, 4),
    (16, 48, 256, 17),
    (17, 129, 1000, 5),
    (33, 300, 512, 16),
    (64, 257, 2304, 1),
    (130, 96, 4160, 64),
]


def run(module: Any, weight: StoredWeight) -> contract.Op:
    """y, dx, dA, dB of a backend for x, dy, bias, A, B."""

    def op(x: Tensor, dy: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        y, s = module.lora_linear(x, weight, bias, LowRank(a, b, SCALING))
        grads = module.lora_linear_backward(dy, x, s, weight, LowRank(a, b, SCALING), True, True)
        return y, *grads

    return op


def exactly(weight: StoredWeight, dtype: torch.dtype) -> contract.Op:
    """The same in float64 on the stored weight, the truth of the contract."""

    def op(x: Tensor, dy: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        w = reference.dequantize(weight, dy.shape[1], x.shape[1], dtype).double()
        s, t = x @ a.t(), SCALING * dy @ b
        y = x @ w.t() + bias + SCALING * s @ b.t()
        return y, dy @ w + t @ a, t.t() @ x, SCALING * dy.t() @ s

    return op


PRECISIONS = {
    "bf16-f32": (torch.bfloat16, torch.float32),
    "bf16-bf16": (torch.bfloat16, torch.bfloat16),
    "f32-f32": (torch.float32, torch.float32),
    "f16-f32": (torch.float16, torch.float32),
    "f16-f16": (torch.float16, torch.float16),
}
CASES = [
    pytest.param(kind, *dtypes, id=f"{name}-{kind}")
    for name, dtypes in PRECISIONS.items()
    for kind in ((KINDS[0], "dense") if name.startswith("f16") else KINDS)
]


@pytest.mark.parametrize(("kind", "dtype", "adapter"), CASES)
def test_contract(isa: str, kind: str, dtype: torch.dtype, adapter: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = SHAPES if kind == KINDS[0] else SHAPES[1::3]
    for shape in shapes:
        weight = stored(shape[1], shape[2], dtype, kind)
        inputs = operands(shape, dtype, adapter)
        name = f"{isa} {kind} {shape}"
        op, plain = run(backend, weight), run(reference, weight)
        contract.check(name, op, plain, inputs, truth=exactly(weight, dtype), reps=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layouts_and_places_of_nan(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for shape in ((3, 16, 128, 4), (20, 40, 96, 4)):
        weight = stored(shape[1], shape[2], dtype, "nf4-64-double")
        inputs = operands(shape, dtype, torch.float32)
        contract.check_layouts(isa, run(backend, weight), inputs, which=(0, 1, 3, 4))
        contract.check_not_finite(isa, run(backend, weight), run(reference, weight), inputs, (0, 1))


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    torch.manual_seed(2)
    before = torch.get_num_threads()
    for shape in ((1, 96, 256, 8), (13, 96, 256, 8), (100, 700, 2304, 8)):
        weight = stored(shape[1], shape[2], torch.bfloat16, "nf4-64-double")
        inputs = operands(shape, torch.bfloat16, torch.float32)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(backend, weight)(*inputs))
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(map(contract.same_bits, results[0], other))


def test_no_rows_zero_rows_and_large_values(isa: str) -> None:
    torch.manual_seed(3)
    weight = stored(24, 128, torch.bfloat16, "nf4-64-double")
    x, dy, bias, a, b = operands((0, 24, 128, 4), torch.bfloat16, torch.float32)
    y, dx, da, db = run(backend, weight)(x, dy, bias, a, b)
    assert y.shape == (0, 24) and dx.shape == (0, 128)
    assert not da.any() and not db.any()
    for m in (1, 5, 20):
        x, _, _, a, b = operands((m, 24, 128, 4), torch.bfloat16, torch.float32)
        x[0] = 0
        y, s = backend.lora_linear(x, weight, None, LowRank(a, b, SCALING))
        assert not y[0].any() and not s[0].any()
        large, _ = backend.lora_linear(x * 2.0**100, weight, None, LowRank(a, b, SCALING))
        assert torch.equal(large, y * 2.0**100)  # a power of two changes no rounding
        zero = weight._replace(data=torch.full_like(weight.data, 0x77))
        y, _ = backend.lora_linear(x, zero, None, None)
        assert not y.any()  # nibble 7 is the zero of nf4


def test_ties_round_to_even(isa: str) -> None:
    """Sums that lie exactly between two bf16 values, and just beside that, as torch rounds them."""
    ulp = 2.0**-7
    rows = [[1 + i * ulp, ulp / 2 + j * 2.0**-16] for i in range(4) for j in (-1, 0, 1)]
    w = torch.zeros(16, 128)
    w[: len(rows), :2] = torch.tensor(rows)
    weight = StoredWeight(w.bfloat16(), None, None, None, "dense", 0)
    for m in (1, 5, 20):
        x = torch.ones(m, 128, dtype=torch.bfloat16)
        y, _ = backend.lora_linear(x, weight, None, None)
        exact = x.float() @ weight.data.float().t()
        assert torch.equal(y, exact.bfloat16())
        assert torch.equal(y[0, 1::3][:4], torch.tensor([1, 1 + 2 * ulp, 1 + 2 * ulp, 1 + 4 * ulp]))


def test_nothing_is_written_outside(isa: str) -> None:
    """Outputs one row short of a panel, between guard bytes."""
    for m in (1, 7, 16, 40):
        weight = stored(50, 200, torch.bfloat16, "nf4-64-double")
        x, _, _, a, b = operands((m, 50, 200, 3), torch.bfloat16, torch.float32)
        canary = contract.Canary((m, 50), torch.bfloat16)
        _, s = backend.lora_linear(x, weight, None, LowRank(a, b, 1.0))
        out = _into(canary.tensor, x, weight, a, b)
        canary.check(f"{isa} m={m}")
        want, _ = backend.lora_linear(x, weight, None, LowRank(a, b, 1.0))
        assert contract.same_bits(out, want)
        assert s.shape == (m, 3)


def _into(out: Tensor, x: Tensor, weight: StoredWeight, a: Tensor, b: Tensor) -> Tensor:
    """Run the forward kernel with its output in memory that the caller watches."""

    class Watched(Tensor):
        def new_empty(self, *size: Any, **kwargs: Any) -> Tensor:
            shape = tuple(size[0]) if isinstance(size[0], (tuple, list)) else size
            if shape == tuple(out.shape) and not kwargs:
                return out
            return torch.empty(shape, dtype=kwargs.get("dtype", x.dtype))

    y, _ = native.lora_linear(
        x.as_subclass(Watched), weight, out.shape[1], None, LowRank(a, b, 1.0)
    )
    return y


def test_refusals() -> None:
    def problem(**changes: Any) -> Problem:
        kind: dict[str, Any] = {
            "op": "lora_linear", "device": "cpu", "dtype": torch.bfloat16, "format": "nf4",
            "blocksize": 64, "m": 1, "n": 8, "k": 8, "r": 0, "adapter_dtype": None,
        }  # fmt: skip
        return Problem(**{**kind, **changes})

    assert backend.why_not(problem()) is None
    assert "runs on cpu only, not on cuda" in str(backend.why_not(problem(device="cuda")))
    assert "not in torch.float64" in str(backend.why_not(problem(dtype=torch.float64)))
    assert "not torch.float64" in str(backend.why_not(problem(adapter_dtype=torch.float64)))
    assert backend.why_not(problem(op="dequantize", dtype=torch.float16)) is None
    with pytest.raises(ValueError, match="isa must be one of"):
        native.set_isa("sse9")


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that has not loaded the library yet."""
    loaded = native_library.library
    fresh = loaded.__wrapped__
    monkeypatch.setattr(native_library, "library", fresh)
    yield monkeypatch
    monkeypatch.setattr(native_library, "library", loaded)


def test_a_missing_library_is_an_error(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unloaded.setenv("FASTLORA_CPU_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(ImportError, match=r"must be built, but .*none\.so does not exist: run"):
        native.isa()
    (tmp_path / "text.so").write_text("not a library")
    unloaded.setenv("FASTLORA_CPU_LIBRARY", str(tmp_path / "text.so"))
    with pytest.raises(ImportError, match="cannot be loaded"):
        native.isa()


def test_a_library_from_another_source_is_an_error(
    unloaded: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    csrc = Path(native.__file__).resolve().parents[2] / "csrc"
    if not csrc.is_dir():
        pytest.skip("installed without its sources beside it")
    copy = tmp_path / "csrc"
    shutil.copytree(csrc, copy)
    assert native.source_id(copy) == native.source_id(csrc)
    (copy / "simd.inl.h").write_text("// changed")
    assert native.source_id(copy) != native.source_id(csrc)
    unloaded.setattr(native_library, "source_id", lambda folder: "0123456789abcdef")
    with pytest.raises(ImportError, match="was built from another source than"):
        native.isa()


def test_an_instruction_set_that_this_cpu_lacks_is_an_error(unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setenv("FASTLORA_CPU_ISA", "sse9")
    with pytest.raises(ImportError, match="FASTLORA_CPU_ISA must name an instruction set"):
        native.isa()
