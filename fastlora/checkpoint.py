"""Adapter files: PEFT's `adapter_config.json` and `adapter_model.safetensors`, key for key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import adapter_files, expert_files
from fastlora.adapters import METHODS, AdapterConfig, AdapterSpec
from fastlora.config import from_fields
from fastlora.dispatch import check_compute
from fastlora.patch import (
    Record,
    add_adapters,
    apply_plan,
    check_arguments,
    find_record,
    the_record,
)
from fastlora.plan import Plan, make_plan
from fastlora.quant import QuantConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(model: nn.Module, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write the adapter as PEFT writes it, so that PEFT loads it.

    The files appear together or not at all: they are written beside the directory, flushed to the
    disk and renamed. With `overwrite`, each file of an existing directory is replaced in one step
    and other files are left alone. Of a model in shards (FSDP2), every process calls this, and the
    first one writes.

    Args:
        model: a model that `patch_model` gave an adapter.
        directory: where to; its parents are made.
        overwrite: allow a directory that is not empty.

    Raises:
        ValueError: the model has no adapter.
        FileExistsError: the directory is not empty and `overwrite` is False.
        OSError: the files can't be written.
    """
    record = the_record(model)
    if record.config is None:
        raise ValueError("the model must have an adapter to save, but it is only quantised")
    live = _live_tensors(model, record.plan)
    in_shards = any(hasattr(tensor, "full_tensor") for tensor in live.values())
    tensors = {key: _whole(tensor).cpu().contiguous().clone() for key, tensor in live.items()}
    if in_shards and torch.distributed.get_rank() != 0:
        return
    text = json.dumps(_fields(model, record, record.config), indent=2, sort_keys=True) + "\n"
    files = {WEIGHTS: adapter_files.encode(tensors), CONFIG: text.encode()}
    adapter_files.write_directory(Path(directory), files, overwrite)


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph; one in shards is gathered from all processes."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    quantize: str | QuantConfig | None = None,
    backend: str = "auto",
    compute: str = "auto",
) -> nn.Module:
    """Return the same model with the adapter of PEFT's files, checked strictly.

    A model without an adapter, one whose weights were only quantised too, is patched by the file's
    config; one with an adapter must have been patched alike. After an error the model is as it was.

    Args:
        model: the base model, or one that is patched.
        directory: an adapter directory, from `save_adapter` or PEFT's `save_pretrained`.
        quantize: as for `patch_model`, when the model is not patched yet.
        backend: as for `patch_model`, when the model has no adapter yet.
        compute: as for `patch_model`, when the model has no adapter yet.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged; the config has a bad value; tensors are missing, unexpected,
            misshapen or not finite; or the model is patched in another way.
        TypeError: an argument or a config field is of the wrong kind.
        NotImplementedError: a method or feature of PEFT that fastlora does not have, or no backend
            computes a layer so.
    """
    path = Path(directory)
    config = _read_config(path / CONFIG)
    tensors = adapter_files.read_tensors(path / WEIGHTS)
    _, quant = check_arguments(model, config, quantize, backend, 0)
    check_compute(compute)
    record = None if find_record(model) is None else the_record(model)
    _check_unset(record, quantize, compute)
    if record is not None and record.config is not None:
        plan = make_plan(model, config, None, record.backend, bounded=False)
        _check_alike(record, plan)
    else:
        plan = make_plan(model, config, quant, backend, compute, bounded=False)
    _check_tensors(_expected(model, plan), tensors)
    if record is None:
        record = apply_plan(model, plan, config, quant, backend, 0, compute)
    elif record.config is None:
        add_adapters(model, record, config, backend, 0, compute, bounded=False)
        record = the_record(model)
    _fill(model, record.plan, tensors)
    return model


def _check_unset(record: Record | None, quantize: object, compute: str) -> None:
    """Raise where an argument asks a patched model for what it can get no more."""
    if record is not None and quantize is not None:
        raise ValueError(
            f"quantize must be None for a model that is patched already, got {quantize!r}; leave it"
            " out"
        )
    if record is not None and record.config is not None and compute != "auto":
        raise ValueError(
            f"compute must be 'auto' for a model that has an adapter already, got {compute!r};"
            " leave it out"
        )
    if record is None and quantize is None and compute != "auto":
        raise ValueError(
            f"compute={compute!r} takes 4-bit weights, got a model that keeps dense ones; pass"
            " quantize='nf4', or leave compute at 'auto'"
        )


def _fill(model: nn.Module, plan: Plan, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of a file, which are checked, into the model."""
    with torch.no_grad():
        for key, live in {**_layer_tensors(model, plan), **_whole_tensors(model, plan)}.items():
            live.copy_(tensors[key])
        for entry in expert_files.entries(plan.experts):
            stored = expert_files.from_file(entry, tensors[PREFIX + entry.key])
            model.get_parameter(f"{entry.module}.{entry.parameter}").copy_(stored)


def _fields(model: nn.Module, record: Record, config: AdapterConfig) -> dict[str, Any]:
    """Return the smallest config that describes the adapter to PEFT."""
    alpha = config.alpha_field
    always = {"r": config.r, alpha: getattr(config, alpha), "task_type": config.task_type}
    fields = {**always, **config.changed_fields()}
    if config.peft_type == "LORA" and any(
        getattr(model.get_submodule(name), "fan_in_fan_out", False) for name in record.plan.adapted
    ):
        fields["fan_in_fan_out"] = True
    if config.all_linear:
        fields["target_modules"] = _target_names(model, record.plan, config)
    base = getattr(model, "name_or_path", None) or None
    return {
        **fields,
        "peft_type": config.peft_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
    }


def _target_names(model: nn.Module, plan: Plan, config: AdapterConfig) -> list[str]:
    """Return suffixes that select exactly the adapted modules, or else their full names."""
    short = sorted({name.rpartition(".")[2] for name in plan.adapted})
    names = [name for name, _ in model.named_modules() if name and not config.excludes(name)]
    chosen = {name for name in names if name.rpartition(".")[2] in short}
    return short if chosen == set(plan.adapted) else sorted(plan.adapted)


def _adapter_keys(name: str, spec: AdapterSpec) -> dict[str, str]:
    """Return parameter name -> key in the file, for the module `name`."""
    ends = METHODS[spec.method].file_keys
    return {parameter: f"{PREFIX}{name}.{ends[parameter]}" for parameter in spec.shapes}


def _bias_key(name: str, plan: Plan) -> str:
    module, _, last = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{last}" if module in plan.adapted else PREFIX + name


def _live_tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Return key -> tensor of everything that an adapter file of a patched model holds."""
    experts = {
        PREFIX + entry.key: expert_files.to_file(
            entry, model.get_parameter(f"{entry.module}.{entry.parameter}")
        )
        for entry in expert_files.entries(plan.experts)
    }
    return {**_layer_tensors(model, plan), **experts, **_whole_tensors(model, plan)}


def _layer_tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Return key -> tensor, sharing memory, of the adapters of modules."""
    tensors: dict[str, Tensor] = {}
    for name, spec in plan.adapted.items():
        module = model.get_submodule(name)
        for parameter, key in _adapter_keys(name, spec).items():
            live = getattr(module, parameter)
            tensors[key] = live.view(METHODS[spec.method].file_shape(spec, parameter))
    return tensors


def _whole_tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Return key -> tensor of the modules and biases that are trained as they are."""
    tensors: dict[str, Tensor] = {}
    for name in plan.saved:
        state = model.get_submodule(name).state_dict(keep_vars=True)
        tensors.update({f"{PREFIX}{name}.{key}": value for key, value in state.items()})
    for name in plan.bias:
        tensors[_bias_key(name, plan)] = model.get_parameter(name)
    return tensors


def _expected(model: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of everything that the file must hold for this plan."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, spec in plan.adapted.items():
        keys = _adapter_keys(name, spec)
        method = METHODS[spec.method]
        shapes.update({keys[p]: method.file_shape(spec, p) for p in spec.shapes})
    for entry in expert_files.entries(plan.experts):
        shapes[PREFIX + entry.key] = expert_files.file_shape(entry)
    whole = _whole_tensors(model, plan).items()
    return {**shapes, **{key: tuple(tensor.shape) for key, tensor in whole}}


def _check_tensors(expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    """Raise unless the file holds exactly the expected tensors, finite and of these shapes."""
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    wrong = [
        f"{key} has shape {shapes[key]}, the model needs {expected[key]}"
        for key in sorted(set(expected) & set(tensors))
        if shapes[key] != expected[key]
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("misshapen", wrong))
    faults = [f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in found if keys]
    if faults:
        raise ValueError(
            f"the adapter file must hold the tensors that this base model needs, got"
            f" {'; '.join(faults)}; load it on the model that it was trained on"
        )
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"the adapter file must hold finite floating values, but {key} does not; train it"
                " again or take an earlier checkpoint"
            )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")


def _read_config(path: Path) -> AdapterConfig:
    fields = adapter_files.read_json(path)
    config = from_fields(fields)
    if fields.get("target_modules") is None and not fields.get("target_parameters"):
        raise ValueError(f"target_modules must be set in {path}, got none; add the module names")
    if fields.get("target_parameters"):
        _check_layout(path, str(fields.get("peft_version") or ""))
    return config


def _check_layout(path: Path, version: str) -> None:
    """Raise unless the factors of expert weights are laid out as PEFT does since 0.20."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < (0, 20):
        raise NotImplementedError(
            f"adapters of target_parameters must be written by PEFT 0.20 or later, but {path} is of"
            f" {version[:20]}, which exchanged inputs and outputs; train the adapter again"
        )


def _check_alike(record: Record, plan: Plan) -> None:
    """Raise unless a patched model has the adapter that a file's config describes."""
    live = record.plan
    for what, ours, theirs in (
        ("adapted modules", sorted(live.adapted), sorted(plan.adapted)),
        ("adapted parameters", sorted(live.parameters), sorted(plan.parameters)),
        ("modules_to_save", sorted(live.saved), sorted(plan.saved)),
        ("trained biases", sorted(live.bias), sorted(plan.bias)),
    ):
        if ours != theirs:
            differ = sorted(set(ours) ^ set(theirs))
            raise ValueError(
                f"the model must be patched as the adapter file says, but their {what} differ in"
                f" {_some(differ)}; load the file on a model that is not patched"
            )
    mine_all = {**live.adapted, **live.parameters}
    for name, spec in {**plan.adapted, **plan.parameters}.items():
        mine, filed = _description(mine_all[name]), _description(spec)
        if mine != filed:
            raise ValueError(
                f"the model must be patched as the adapter file says, but {name} has {mine} and the"
                f" file {filed}; load the file on a model that is not patched"
            )


def _description(spec: AdapterSpec) -> str:
    """Return what an adapter and its file must have in common."""
    shapes = ", ".join(f"{name} {shape}" for name, shape in spec.shapes.items())
    return f"{spec.label} with r={spec.r}, scaling={spec.scaling:g} and {shapes}"
