"""Say what was patched, what was skipped and why, and what it costs."""

from __future__ import annotations

from typing import Any

import torch
from fastlora_kernels import fp8
from fastlora_kernels.formats import StoredWeight
from torch import nn

from fastlora.adapters import METHODS, magnitude
from fastlora.dispatch import Problem, pick
from fastlora.experts import AdapterExperts, hidden_values
from fastlora.fuse import partners
from fastlora.in_place import Accelerated, InPlace, left_out
from fastlora.layers import AdapterLinear, QuantizedLinear
from fastlora.other_layers import OtherLayer
from fastlora.patch import Record, any_record, tensor_bytes

BATCH = 512  # tokens of the training batch that the backend is named for
ROWS = 8  # tokens with which the error of fp8 compute is measured
DENSE = "not in fp8: its weight is dense"
EXPERTS = "not in fp8: fused experts are computed in the dtype of their input"
LOOPS = ("reference",)  # backends without one kernel for all experts
_COLUMNS = ("module", "method", "r", "scaling", "format", "backend", "shape", "bytes", "notes")


class Report(dict[str, Any]):
    """A dict with `modules`, `skipped` and `totals`; printed, a table."""

    def __str__(self) -> str:
        rows = [_COLUMNS] + [_cells(row) for row in self["modules"]]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        lines += [f"skipped {name}: {why}" for name, why in self["skipped"].items()]
        totals = self["totals"]
        share = totals["trainable_params"] / max(totals["all_params"], 1)
        lines.append(
            f"trainable {totals['trainable_params']:,} of {totals['all_params']:,} parameters"
            f" ({share:.2%}); {totals['bytes_before'] / 2**20:,.1f} MiB before,"
            f" {totals['bytes_after'] / 2**20:,.1f} MiB now"
        )
        if totals["fp8_error"] is not None:
            lines.append(f"fp8 compute: relative error at most {totals['fp8_error']:.2%}")
        return "\n".join(line.rstrip() for line in lines)


def report(model: nn.Module) -> Report:
    """Return what a patch did to a model.

    Returns:
        A `Report`: `modules`, a list of dicts with the keys module, method, r, scaling, format,
        backend (the one that runs a training batch of 512 tokens; "none": another library does),
        shape (N, K), or (E, N, K) of
        an expert parameter, bytes, fp8_error and notes; `skipped`, name -> reason; `totals`, with
        trainable_params, all_params (4-bit weights counted by value, not by byte), bytes_before,
        bytes_after and the largest fp8_error.

        An fp8_error, None without fp8 compute, is measured: the root mean square of the difference
        that 8 bits make to a layer's product with 8 normal random tokens, relative to the product;
        of at most 1024 outputs.

    Raises:
        ValueError: the model is not patched.
        ImportError: the native CPU library is missing.
    """
    record = any_record(model)
    if isinstance(record, InPlace):
        return _in_place(model, record)
    modules = [
        _row(name, module, record)
        if isinstance(module, AdapterLinear)
        else _other(name, module, record)
        for name, module in model.named_modules()
        if isinstance(module, (AdapterLinear, OtherLayer))
    ]
    experts = {n: m for n, m in model.named_modules() if isinstance(m, AdapterExperts)}
    modules += [
        _expert(name, m, key, record)
        for name, m in experts.items()
        for key in m.fastlora_experts.shapes
    ]
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    hidden = sum(m.in_features * m.out_features - m.weight.numel() for m in packed)
    hidden += sum(map(hidden_values, experts.values()))
    totals = _totals(model, hidden, record.nbytes, modules)
    return Report(modules=modules, skipped=dict(record.plan.skipped), totals=totals)


def _totals(
    model: nn.Module, hidden: int, before: int, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the totals; `hidden`: values of packed weights beyond their bytes."""
    parameters = list(model.parameters())
    errors = [row["fp8_error"] for row in rows if row["fp8_error"] is not None]
    return {
        "trainable_params": sum(p.numel() for p in parameters if p.requires_grad),
        "all_params": sum(p.numel() for p in parameters) + hidden,
        "bytes_before": before,
        "bytes_after": tensor_bytes(model),
        "fp8_error": max(errors, default=None),
    }


def _fp8(
    weight: StoredWeight | None, shape: tuple[int, int], dtype: torch.dtype, asked: str
) -> tuple[float | None, str]:
    """Return the error of a layer's product in 8 bits and a note; `asked`: the model's compute."""
    if weight is None or weight.compute != "fp8":
        return None, DENSE if asked == "fp8" else ""
    error = fp8.relative_error(weight, *shape, dtype, ROWS)
    return error, f"fp8 compute, relative error {error:.2%}"


def _in_place(model: nn.Module, record: InPlace) -> Report:
    """Return the report of a model whose layers are another library's."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, Accelerated)}
    inner = {f"{name}.base_layer" for name in found}  # part of its layer's row
    rows = [
        _accelerated(name, module, record) for name, module in found.items() if name not in inner
    ]
    hidden = sum(module.hidden() for module in found.values())
    totals = _totals(model, hidden, record.nbytes, rows)
    return Report(modules=rows, skipped=left_out(model, record), totals=totals)


def _accelerated(name: str, module: Accelerated, record: InPlace) -> dict[str, Any]:
    """Return the row of a layer that is another library's."""
    columns, problem = module.describe(), module.problem()
    error, note = _fp8(module.packed(), columns["shape"], problem.dtype, record.compute)
    left = module.left()
    notes = (record.notes.get(name, ""), left, *module.remarks(), note)
    return {
        "module": name,
        **columns,
        "backend": _picked(problem, module.fastlora_state.backend) if left is None else "none",
        "fp8_error": error,
        "notes": "; ".join(filter(None, notes)),
    }


def _row(name: str, module: AdapterLinear, record: Record) -> dict[str, Any]:
    stored, spec = module.stored_weight(), module.adapter
    where = (stored.data.device.type, module.backend)
    notes = [record.plan.notes[name]] if name in record.plan.notes else []
    if spec is not None and spec.dropout > 0 and magnitude.NAME in spec.shapes:
        notes.append("dropout with a magnitude: two products with the weight in training")
    if spec is not None and not METHODS[spec.method].rank(spec, *where):
        notes.append("update computed beside the fused linear")
    others = partners(name, module)
    if others:
        notes.append(f"computed with {', '.join(others)}")
    shape = (module.out_features, module.in_features)
    error, note = _fp8(stored, shape, module.original_dtype(), record.compute)
    notes += [note] if note else []
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return {
        "module": name,
        "method": None if spec is None else spec.label,
        "r": None if spec is None else spec.r,
        "scaling": None if spec is None else spec.scaling,
        "format": stored.format,
        "backend": _backend(module),
        "shape": shape,
        "bytes": sum(t.nbytes for t in own),
        "fp8_error": error,
        "notes": "; ".join(notes),
    }


def _other(name: str, module: OtherLayer, record: Record) -> dict[str, Any]:
    """Return the row of a convolution or an embedding."""
    spec = module.adapter
    return {
        "module": name,
        "method": spec.label,
        "r": spec.r,
        "scaling": spec.scaling,
        "format": "dense",
        "backend": "torch",
        "shape": tuple(module.weight.shape),
        "bytes": sum(p.nbytes for p in module.parameters(recurse=False)),
        "fp8_error": None,
        "notes": DENSE if record.compute == "fp8" else "",
    }


def _expert(name: str, module: AdapterExperts, key: str, record: Record) -> dict[str, Any]:
    """Return the row of one parameter of fused experts."""
    state, stored = module.fastlora_experts, module.stored(key)
    spec, shape, params = state.specs[key], state.shapes[key], module.adapter_params(key)
    adapter = params["lora_A"].dtype if params else None
    device = stored.data.device.type
    kind = (device, module.original_dtype(), stored.format, stored.blocksize, BATCH, *shape[1:])
    backend = _picked(
        Problem("experts_linear", *kind, spec.r if spec else 0, adapter), state.backend
    )
    own = (*params.values(), *(part for part in stored[:4] if part is not None))
    notes = ["kernels launched expert by expert"] if backend in LOOPS else []
    notes += [EXPERTS] if record.compute == "fp8" else []
    return {
        "module": f"{name}.{key}",
        "method": None if spec is None else spec.label,
        "r": None if spec is None else spec.r,
        "scaling": None if spec is None else spec.scaling,
        "format": stored.format,
        "backend": backend,
        "shape": shape,
        "bytes": sum(t.nbytes for t in own),
        "fp8_error": None,
        "notes": "; ".join(notes),
    }


def _backend(module: AdapterLinear) -> str:
    """Return the name of the backend that runs a training batch, or "none"."""
    stored, spec, dtype = module.stored_weight(), module.adapter, module.original_dtype()
    where = (stored.data.device.type, module.backend)
    r = 0 if spec is None else METHODS[spec.method].rank(spec, *where)
    adapter = next(iter(module.adapter_params().values())).dtype if r else None
    kind = (stored.data.device.type, dtype, stored.format, stored.blocksize)
    problem = Problem(
        "lora_linear",
        *kind,
        BATCH,
        module.out_features,
        module.in_features,
        r,
        adapter,
        stored.compute,
    )
    return _picked(problem, module.backend)


def _picked(problem: Problem, backend: str) -> str:
    try:
        return pick(problem, backend).__name__.rpartition(".")[2]
    except NotImplementedError:
        return "none"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def text(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:g}"
        return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return tuple(text(row[column]) for column in _COLUMNS)


__all__ = ["Report", "report"]
