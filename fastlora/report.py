"""Say what was patched, what was skipped and why, and what it costs."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastlora.adapters import METHODS, magnitude
from fastlora.dispatch import Problem, pick
from fastlora.experts import AdapterExperts, hidden_values
from fastlora.fuse import partners
from fastlora.in_place import Accelerated, InPlace
from fastlora.layers import AdapterLinear, QuantizedLinear
from fastlora.other_layers import OtherLayer
from fastlora.patch import Record, any_record, tensor_bytes

BATCH = 512  # tokens of the training batch that the backend is named for
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
        return "\n".join(line.rstrip() for line in lines)


def report(model: nn.Module) -> Report:
    """Return what a patch did to a model.

    Returns:
        A `Report`: `modules`, a list of dicts with the keys module, method, r, scaling, format,
        backend (the one that runs a training batch of 512 tokens), shape (N, K), or (E, N, K) of
        an expert parameter, bytes and notes;
        `skipped`, name -> reason; `totals`, with trainable_params, all_params (4-bit weights
        counted by value, not by byte), bytes_before and bytes_after.

    Raises:
        ValueError: the model is not patched.
        ImportError: the native CPU library is missing.
    """
    record = any_record(model)
    if isinstance(record, InPlace):
        return _in_place(model, record)
    modules = [
        _row(name, module, record) if isinstance(module, AdapterLinear) else _other(name, module)
        for name, module in model.named_modules()
        if isinstance(module, (AdapterLinear, OtherLayer))
    ]
    experts = {n: m for n, m in model.named_modules() if isinstance(m, AdapterExperts)}
    modules += [
        _expert(name, m, key) for name, m in experts.items() for key in m.fastlora_experts.shapes
    ]
    parameters = list(model.parameters())
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    hidden = sum(m.in_features * m.out_features - m.weight.numel() for m in packed)
    hidden += sum(map(hidden_values, experts.values()))
    totals = {
        "trainable_params": sum(p.numel() for p in parameters if p.requires_grad),
        "all_params": sum(p.numel() for p in parameters) + hidden,
        "bytes_before": record.nbytes,
        "bytes_after": tensor_bytes(model),
    }
    return Report(modules=modules, skipped=dict(record.plan.skipped), totals=totals)


def _in_place(model: nn.Module, record: InPlace) -> Report:
    """Return the report of a model whose layers are another library's."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, Accelerated)}
    inner = {f"{name}.base_layer" for name in found}  # part of its layer's row
    rows = [
        {
            "module": name,
            **module.describe(),
            "backend": _picked(module.problem(), module.fastlora_state.backend),
            "notes": record.notes.get(name, ""),
        }
        for name, module in found.items()
        if name not in inner
    ]
    parameters = list(model.parameters())
    hidden = sum(module.hidden() for module in found.values())
    totals = {
        "trainable_params": sum(p.numel() for p in parameters if p.requires_grad),
        "all_params": sum(p.numel() for p in parameters) + hidden,
        "bytes_before": record.nbytes,
        "bytes_after": tensor_bytes(model),
    }
    return Report(modules=rows, skipped=dict(record.skipped), totals=totals)


def _row(name: str, module: AdapterLinear, record: Record) -> dict[str, Any]:
    stored, spec = module.stored_weight(), module.adapter
    notes = [record.plan.notes[name]] if name in record.plan.notes else []
    if spec is not None and spec.dropout > 0 and magnitude.NAME in spec.shapes:
        notes.append("dropout with a magnitude: two products with the weight in training")
    if spec is not None and not METHODS[spec.method].rank(spec):
        notes.append("update computed beside the fused linear")
    others = partners(name, module)
    if others:
        notes.append(f"computed with {', '.join(others)}")
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return {
        "module": name,
        "method": None if spec is None else spec.label,
        "r": None if spec is None else spec.r,
        "scaling": None if spec is None else spec.scaling,
        "format": stored.format,
        "backend": _backend(module),
        "shape": (module.out_features, module.in_features),
        "bytes": sum(t.nbytes for t in own),
        "notes": "; ".join(notes),
    }


def _other(name: str, module: OtherLayer) -> dict[str, Any]:
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
        "notes": "",
    }


def _expert(name: str, module: AdapterExperts, key: str) -> dict[str, Any]:
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
    return {
        "module": f"{name}.{key}",
        "method": None if spec is None else spec.label,
        "r": None if spec is None else spec.r,
        "scaling": None if spec is None else spec.scaling,
        "format": stored.format,
        "backend": backend,
        "shape": shape,
        "bytes": sum(t.nbytes for t in own),
        "notes": "kernels launched expert by expert" if backend in LOOPS else "",
    }


def _backend(module: AdapterLinear) -> str:
    """Return the name of the backend that runs a training batch, or "none"."""
    stored, spec, dtype = module.stored_weight(), module.adapter, module.original_dtype()
    r = 0 if spec is None else METHODS[spec.method].rank(spec)
    adapter = next(iter(module.adapter_params().values())).dtype if r else None
    kind = (stored.data.device.type, dtype, stored.format, stored.blocksize)
    problem = Problem(
        "lora_linear", *kind, BATCH, module.out_features, module.in_features, r, adapter
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
