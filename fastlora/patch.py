"""Patch a model in place: 4-bit weights, adapters, frozen base; and undo or merge it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters import METHODS, AdapterConfig, method_of
from fastlora.config import as_config
from fastlora.dispatch import check_backend, check_compute
from fastlora.experts import AdapterExperts, to_experts, to_plain_experts
from fastlora.fuse import unfuse
from fastlora.in_place import InPlace, accelerate, found_record, restore
from fastlora.layer_checks import check_packed
from fastlora.layers import AdapterLinear, QuantizedLinear, to_adapter_linear, to_linear
from fastlora.other_layers import OtherLayer, can_adapt, to_other_layer, to_plain
from fastlora.plan import Plan, make_plan
from fastlora.quant import QuantConfig

RECORD = "_fastlora"


@dataclass
class Record:
    """What a patch did, kept on the model as `model._fastlora`.

    Attributes:
        plan: what was done to each module.
        config: the adapter's config, or None.
        quant: how weights were quantised, or None.
        backend: "auto" or the name of a backend.
        compute: how products with 4-bit weights are computed.
        nbytes: bytes of the model's tensors before.
        trained: names of the parameters that required a gradient before.
        originals: modules that trainable copies replaced, by name.
        biases: the first values of biases that are trained, by name.
        attributes: (module name, attribute, first value) of attributes that were changed.
        forget: takes back what a loader of 4-bit weights wrote on the model; None: nothing.
    """

    plan: Plan
    config: AdapterConfig | None
    quant: QuantConfig | None
    backend: str
    nbytes: int
    trained: frozenset[str]
    originals: dict[str, nn.Module] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    forget: Callable[[nn.Module], None] | None = None
    compute: str = "auto"


def patch_model(
    model: nn.Module,
    config: object | None = None,
    *,
    quantize: str | QuantConfig | None = None,
    backend: str = "auto",
    compute: str = "auto",
    seed: int = 0,
) -> nn.Module:
    """Return the same model with adapters and 4-bit weights in place of its linears.

    A model whose weights were only quantised before takes a config later. Without config and
    quantize: the same model with the layers that PEFT (LoRA, DoRA, LoHa, LoKr)
    or bitsandbytes (4-bit) put there run by fastlora's kernels. They keep their parameters, names
    and methods.

    With a config its targets get adapters, and all other parameters are frozen. `quantize` stores
    every nn.Linear in 4 bits, targets or not, but the output head (`get_output_embeddings()`), and
    fused experts of transformers; a model that does not know its head gets 4-bit weights only in
    the targets, or, without a config, in every nn.Linear. Without a config nothing else is frozen.
    Weights that two modules share are left alone unless `target_modules` names them, and are never
    quantised. Everything is checked first: after an error the model is as it was.

    Args:
        model: any nn.Module that contains nn.Linear modules.
        config: `LoraConfig`, or PEFT's config object; None: no adapter of ours.
        quantize: None, "nf4", "fp4" or a `QuantConfig`.
        backend: "auto", or the name of one backend for every layer.
        compute: how 4-bit weights are multiplied with many tokens: "auto", in the dtype of the
            activations, or "fp8", forward and backward with operands rounded to 8 bits: faster on
            GPUs that have the units, and lossy; `report` prints by how much. Adapters, dense
            layers and few tokens are computed as with "auto". backend="reference" emulates it.
        seed: of the adapter's first values, which do not depend on the global generator.

    Raises:
        TypeError: an argument or a target module is of the wrong kind.
        ValueError: the model is patched already, a target matches nothing or does not fit, a
            weight is not finite, or there is nothing to accelerate.
        NotImplementedError: no backend takes a layer, or none computes it so; the message gives
            each one's reason.
        ImportError: the native CPU library is missing, or a library's version is not supported.
    """
    config, quant = check_arguments(model, config, quantize, backend, seed)
    check_compute(compute)
    before = find_record(model)
    if isinstance(before, Record) and before.config is None and config and quant is None:
        add_adapters(model, before, config, backend, seed, compute)
        return model
    if before is not None:
        raise ValueError(
            "patch_model takes a model that is not patched yet, but this one is; call unpatch or"
            " merge first"
        )
    if config is None and quant is None:
        setattr(model, RECORD, accelerate(model, backend, tensor_bytes(model), compute))
        return model
    if quant is None and compute != "auto":
        raise ValueError(
            f"compute={compute!r} takes 4-bit weights, got a model that keeps dense ones; pass"
            " quantize='nf4', or leave compute at 'auto'"
        )
    plan = make_plan(model, config, quant, backend, compute)
    apply_plan(model, plan, config, quant, backend, seed, compute)
    return model


def add_adapters(
    model: nn.Module,
    before: Record,
    config: AdapterConfig,
    backend: str,
    seed: int,
    compute: str,
    bounded: bool = True,
) -> None:
    """Add adapters to a model whose weights were only quantised."""
    plan = make_plan(model, config, None, backend, bounded=bounded)
    if compute != "auto":
        set_compute(model, before, backend, compute)
    record = apply_plan(model, plan, config, before.quant, backend, seed, before.compute)
    plan.quant = before.plan.quant
    for name, spec in before.plan.specs.items():
        plan.specs.setdefault(name, spec)
        plan.skipped.pop(name, None)
    for name, part in before.plan.experts.items():
        plan.experts.setdefault(name, part).quant = part.quant
        plan.skipped.pop(name, None)
    record.nbytes, record.trained = before.nbytes, before.trained
    record.attributes = [*before.attributes, *record.attributes]
    record.forget = before.forget


def set_compute(model: nn.Module, record: Record, backend: str, compute: str) -> None:
    """Let every 4-bit weight of a model be multiplied in this way.

    Raises:
        NotImplementedError: no backend does; the message gives each one's reason.
    """
    check_packed(model, backend, compute)
    record.compute = compute
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.compute = compute


def check_arguments(
    model: object, config: object | None, quantize: object, backend: str, seed: int
) -> tuple[AdapterConfig | None, QuantConfig | None]:
    """Return the config as ours and `quantize` as a QuantConfig, after checking the arguments."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; pass a model")
    if isinstance(model, nn.Linear):
        raise TypeError(
            "model must contain its linears, got a bare nn.Linear; wrap it in nn.Sequential"
        )
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {seed!r}; pass a whole number")
    check_backend(backend)
    if quantize is not None and not isinstance(quantize, (str, QuantConfig)):
        raise TypeError(
            f"quantize must be None, a format name or a QuantConfig, got {quantize!r}; pass one"
        )
    quant = QuantConfig(quantize) if isinstance(quantize, str) else quantize
    return None if config is None else as_config(config), quant


def find_record(model: nn.Module) -> Record | InPlace | None:
    """Return what a patch did to the model, or None; also if only a part of it is patched."""
    record = getattr(model, RECORD, None)
    if isinstance(record, (Record, InPlace)):
        return record
    for name, part in model.named_modules():
        if isinstance(part, (AdapterLinear, OtherLayer, AdapterExperts)) or hasattr(part, RECORD):
            raise ValueError(
                f"the model must be the one that was patched, but only its part {name!r} is"
                " patched; pass that part, or unpatch it first"
            )
    return None


def the_record(model: nn.Module) -> Record:
    """Return what a patch did to the model.

    Raises:
        ValueError: the model is not patched, or its layers are another library's.
    """
    record = any_record(model)
    if isinstance(record, InPlace):
        raise ValueError(
            "the adapters must be fastlora's own, but this model's are PEFT's, accelerated in"
            " place; use PEFT's methods: save_pretrained, load_adapter, merge_and_unload"
        )
    return record


def any_record(model: nn.Module) -> Record | InPlace:
    """Return what a patch did to the model, with layers of our own or in place.

    Raises:
        ValueError: the model is not patched.
    """
    record = None
    if isinstance(model, nn.Module):
        record = find_record(model) or found_record(model, tensor_bytes(model))
    if record is None:
        raise ValueError("the model must be patched, but it is not; call patch_model first")
    return record


def apply_plan(
    model: nn.Module,
    plan: Plan,
    config: AdapterConfig | None,
    quant: QuantConfig | None,
    backend: str,
    seed: int,
    compute: str = "auto",
) -> Record:
    """Carry out a plan that `make_plan` has checked, and remember it on the model."""
    trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    record = Record(plan, config, quant, backend, tensor_bytes(model), trained, compute=compute)
    generator = torch.Generator().manual_seed(seed)
    if config is not None:
        model.requires_grad_(False)
    for name, spec in plan.specs.items():
        layer: Any = model.get_submodule(name)
        params = {}
        if config is not None and spec is not None:
            params = method_of(config).init(config, spec, generator)
        if can_adapt(layer) and spec is not None:
            to_other_layer(layer, spec, params)
        else:
            to_adapter_linear(layer, spec, params, plan.quant.get(name), backend, compute)
    for name, part in plan.experts.items():
        first = {
            key: method_of(config).init(config, own, generator)
            for key, own in part.adapted.items()
            if config is not None
        }
        to_experts(model.get_submodule(name), part.specs, first, part.quant, backend)
    for name in plan.saved:
        original = model.get_submodule(name)
        record.originals[name] = original
        _replace(model, name, copy.deepcopy(original).requires_grad_(True))
    for name in plan.bias:
        bias = model.get_parameter(name)
        record.biases[name] = bias.detach().clone()
        bias.requires_grad_(True)
    _leave_fast_paths(model, record)
    setattr(model, RECORD, record)
    _warn_of_reads(plan)
    return record


def _warn_of_reads(plan: Plan) -> None:
    """Warn of adapters on weights that the model reads itself."""
    if not plan.reads:
        return
    name, read = next(iter(plan.reads.items()))
    more = f", and {len(plan.reads) - 1} more are read so" if len(plan.reads) > 1 else ""
    warnings.warn(
        f"{read.reader} reads the weight of {name!r} itself{more}: where it does, the adapter has"
        " no effect; exclude what your model computes this way",
        stacklevel=4,
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _leave_fast_paths(model: nn.Module, record: Record) -> None:
    """Make nn.TransformerEncoder call its linears; its inference path reads their weights."""
    for name, module in model.named_modules():
        for kind, attribute, value in (
            (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
            (nn.TransformerEncoder, "use_nested_tensor", False),
        ):
            if isinstance(module, kind) and _has_adapters(module):
                record.attributes.append((name, attribute, getattr(module, attribute)))
                setattr(module, attribute, value)


def _has_adapters(module: nn.Module) -> bool:
    return any(isinstance(part, AdapterLinear) for part in module.modules())


def tensor_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, each counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values())


def unpatch(model: nn.Module, *, dequantize: bool = False) -> nn.Module:
    """Return the same model as it was before the patch, without the adapter.

    Args:
        model: a patched model.
        dequantize: layers that were stored in 4 bits become dense again, with the decoded values;
            the first ones are gone.

    Raises:
        ValueError: the model is not patched, or has 4-bit layers and `dequantize` is False.
    """
    record = any_record(model)
    if isinstance(record, InPlace):
        restore(model)
        if hasattr(model, RECORD):
            delattr(model, RECORD)
        return model
    if record.plan.packed and not dequantize:
        raise ValueError(
            f"unpatch can't bring back {record.plan.packed} dense weights that were replaced by"
            " 4-bit ones; pass dequantize=True to get their decoded values, or reload the model"
        )
    unfuse(model)
    for name in record.plan.specs:
        module = model.get_submodule(name)
        if isinstance(module, AdapterLinear):
            is_dense = not isinstance(module, QuantizedLinear)
            to_linear(module, None if is_dense else module.dense_weight())
        elif isinstance(module, OtherLayer):
            to_plain(module, module.weight)
    for name in record.plan.experts:
        to_plain_experts(model.get_submodule(name), merged=False)
    for name, original in record.originals.items():
        reference = next(model.get_submodule(name).parameters(), None)
        _replace(model, name, original if reference is None else original.to(reference.device))
    for name, value in record.biases.items():
        with torch.no_grad():
            model.get_parameter(name).copy_(value)
    _finish(model, record)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Return the same model with plain layers that have the update folded in.

    Each weight is ``W + update``, with W decoded where it was 4-bit, added in float32 and rounded
    once to the dtype that the layer had at first. Modules trained whole and biases keep their
    trained values.

    Raises:
        ValueError: the model is not patched, or its adapters are no updates of weights.
    """
    record = the_record(model)
    for name, spec in record.plan.adapted.items():
        if not METHODS[spec.method].mergeable:
            raise ValueError(
                f"merge takes adapters that change weights, but {name!r} has a {spec.label}, whose"
                " non-linearity no weight can hold; keep it beside the model with save_adapter"
            )
    unfuse(model)
    for name in record.plan.specs:
        module = model.get_submodule(name)
        if isinstance(module, AdapterLinear):
            to_linear(module, module.merged_weight())
        elif isinstance(module, OtherLayer):
            to_plain(module, module.merged_weight())
    for name in record.plan.experts:
        to_plain_experts(model.get_submodule(name), merged=True)
    _finish(model, record)
    return model


def _finish(model: nn.Module, record: Record) -> None:
    """Restore what requires a gradient and what was switched, and forget the patch."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in record.trained)
    for name, attribute, value in record.attributes:
        setattr(model.get_submodule(name), attribute, value)
    if record.forget is not None:
        record.forget(model)
    delattr(model, RECORD)
