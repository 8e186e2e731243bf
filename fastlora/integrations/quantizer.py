"""transformers' quantiser for fastlora: weights become 4-bit while a checkpoint is being read.

Importing this file registers the method "fastlora" with transformers. A linear stays an nn.Linear
on the meta device until its weight comes; then it becomes a `QuantizedLinear`, and the dense weight
is dropped. No more than the largest tensor is there beside the packed model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from fastlora_kernels.formats import FORMATS
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastlora.adapters import Cache
from fastlora.expert_plan import ExpertsPlan, stacked
from fastlora.experts import AdapterExperts, begin, projections, refusal, set_quantized
from fastlora.integrations.shards import check_files
from fastlora.integrations.versions import check_version
from fastlora.layers import QuantizedLinear, to_adapter_linear, to_class
from fastlora.linears import is_usual, linears, sizes
from fastlora.patch import RECORD, Record, tensor_bytes
from fastlora.plan import Plan
from fastlora.quant import QuantConfig, QuantizedWeight
from fastlora.quant_experts import quantize_experts
from fastlora.weight_reads import weight_reads

METHOD = "fastlora"
_KEPT = "_fastlora_buffers"  # of a layer until the end of loading: transformers empties them


@register_quantization_config(METHOD)
class FastLoraQuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How `from_pretrained` stores linears; see `fastlora.QuantConfig`.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: values per magnitude.
        double_quant: store the magnitudes in 8 bits too.
        skip_modules: names of linears that stay dense; None: the output head and what the model
            keeps in float32.
        backend: "auto", or the name of one backend.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        skip_modules: list[str] | None = None,
        backend: str = "auto",
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        checked = QuantConfig(quant_type, blocksize, double_quant)
        self.quant_type, self.blocksize = checked.quant_type, checked.blocksize
        self.double_quant = checked.double_quant
        self.skip_modules, self.backend = skip_modules, backend

    @property
    def quant(self) -> QuantConfig:
        """The same as fastlora's own config."""
        return QuantConfig(self.quant_type, self.blocksize, self.double_quant)


@dataclass
class _Loading:
    """What the operations of one loading share; transformers copies them for each weight.

    Attributes:
        fault: the first error. transformers puts one of its own in the place of any that an
            operation raises, so it is raised when all has been read.
        dense: names of the weights that a packed checkpoint holds dense.
    """

    fault: Exception | None = None
    dense: set[str] = field(default_factory=set)

    def __deepcopy__(self, _: object) -> _Loading:
        return self


class _Take(ConversionOps):  # type: ignore[misc]
    """Takes tensors of the checkpoint."""

    def __init__(self, config: FastLoraQuantConfig, loading: _Loading) -> None:
        self.config, self.loading = config, loading

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Any]:
        tensors = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        try:
            return self.take(tensors, model, full_layer_name)
        except Exception as error:
            self.loading.fault = self.loading.fault or error
        return {key: nn.Parameter(torch.empty(0), False) for key in self.targets(tensors)}

    @abstractmethod
    def take(self, tensors: dict[str, Tensor], model: Any, name: str) -> dict[str, Any]:
        """Return the parameters that the tensors become."""

    @abstractmethod
    def targets(self, tensors: Iterable[str]) -> Iterable[str]:
        """Return the names of the parameters that `take` returns."""


class _Quantize(_Take):
    """Turn the dense weight of a linear into a packed one."""

    def take(self, tensors: dict[str, Tensor], model: Any, name: str) -> dict[str, Any]:
        """Return the packed weights, by the names of the dense ones."""
        done = {}
        config = self.config
        for full, value in tensors.items():
            module, part = get_module_from_name(model, full)
            _check_value(full, value, module._parameters[part].shape)
            if part != "weight":
                done[full] = _pack_experts(module, full, value, config)
                continue
            module.weight = nn.Parameter(value, requires_grad=False)
            to_adapter_linear(module, None, {}, config.quant, config.backend)
            vars(module)[_KEPT] = dict(module._buffers)
            done[full] = module.weight
        return done

    def targets(self, tensors: Iterable[str]) -> Iterable[str]:
        """Return the names of the dense weights."""
        return tensors


def _check_value(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """Raise unless a tensor of the checkpoint is what the model needs."""
    if value.shape != shape:
        raise ValueError(
            f"the weight {name!r} must have shape {tuple(shape)}, got {tuple(value.shape)}; the"
            " checkpoint is of another model"
        )
    if not bool(torch.isfinite(torch.stack(value.aminmax())).all()):
        raise ValueError(
            f"the weight {name!r} must be finite, but it holds NaN or infinity; repair the"
            " checkpoint"
        )


def _pack_experts(module: Any, name: str, value: Tensor, config: Any) -> nn.Parameter:
    """Return the packed parameter of fused experts; its magnitudes lie on the module then."""
    part = name.rpartition(".")[2]
    if not isinstance(module, AdapterExperts):
        begin(module, config.backend)
        module.fastlora_experts.dtype = value.dtype
    matrices = value.transpose(1, 2) if module.is_transposed else value
    quant = config.quant
    kind = (quant.quant_type, quant.blocksize, quant.double_quant)
    set_quantized(module, part, quantize_experts(matrices, *kind))
    vars(module)[_KEPT] = dict(module._buffers)
    packed: nn.Parameter = module._parameters[part]
    return packed


class _Deserialize(_Take):
    """Take a packed weight with its magnitudes from the tensors that bitsandbytes writes."""

    def take(self, tensors: dict[str, Tensor], model: Any, name: str) -> dict[str, Any]:
        """Return the packed weight, or one that was kept dense."""
        if len(tensors) == 1:
            self.loading.dense.add(name)
            return tensors
        module, _part = get_module_from_name(model, name)
        packed = {_with(name, key): value for key, value in tensors.items()}
        weight = QuantizedWeight.from_state_dict(packed, name)
        if weight.shape != sizes(module):
            raise ValueError(
                f"{name!r} must have shape {sizes(module)}, got {weight.shape}; the checkpoint is"
                " of another model"
            )
        become_quantized(module, weight, self.config.backend)
        vars(module)[_KEPT] = dict(module._buffers)
        return {"weight": module.weight}

    def targets(self, tensors: Iterable[str]) -> Iterable[str]:
        """Return the name of the weight."""
        return ["weight"]


def _with(full: str, key: str) -> str:
    return full.rpartition("weight")[0] + key


def become_quantized(module: Any, weight: QuantizedWeight, backend: str) -> None:
    """Turn a linear, perhaps on the meta device, into a 4-bit one with this weight."""
    device = weight.packed.device
    module.weight = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
    to_class(module, QuantizedLinear)
    module.adapter, module.backend, module.cache = None, backend, Cache()
    module.set_quantized(weight)


@register_quantizer(METHOD)
class FastLoraQuantizer(HfQuantizer):  # type: ignore[misc]
    """Reads a checkpoint into 4-bit linears."""

    requires_calibration = False
    serialized_names = {
        "weight": [
            "weight",
            "weight.absmax",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            *(f"weight.quant_state.bitsandbytes__{name}" for name in sorted(FORMATS)),
        ]
    }

    def __init__(self, quantization_config: FastLoraQuantConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.loading = _Loading()
        self.parts: dict[str, nn.Module] = {}  # not the model itself, which refers to this
        self.trained: set[str] = set()

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Raise unless transformers' version is supported."""
        check_version("transformers")

    @property
    def quantized_element_size(self) -> float:
        """Bytes per value of a packed weight."""
        return 0.5

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Return whether a tensor of the checkpoint becomes a packed weight."""
        return param_name in self.wanted

    def get_new_dtype(
        self, converter: Any, param: Tensor, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Return None, keep it, for the tensors that describe a packed weight."""
        packed = len(getattr(converter, "source_patterns", ())) > 1
        return None if packed else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if checkpoint_files:
            check_files([Path(file) for file in checkpoint_files])
        skip = self.get_modules_to_not_convert(
            model, self.quantization_config.skip_modules, model._keep_in_fp32_modules
        )
        reads = {n: str(r) for n, r in weight_reads(model).items() if not _skips(skip, n)}
        self.skipped = [n for n in linears(model) if _skips(skip, n) or n in reads]
        own = [n for n, m in linears(model).items() if is_usual(m)]
        self.wanted = {f"{n}.weight" for n in own if n not in self.skipped}
        self.left = reads
        self.experts: set[str] = set()
        for name, module in model.named_modules():
            if stacked(module) and _skips(skip, name):
                self.left[name] = "kept dense"
            elif stacked(module) and (reason := refusal(module)) is not None:
                self.left[name] = reason
            elif stacked(module):
                self.experts.add(name)
                self.wanted |= {f"{name}.{part}" for part in projections(module)}
        self.dense_bytes = tensor_bytes(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self.loading.fault is not None:
            raise self.loading.fault
        for module in model.modules():
            module._buffers.update(vars(module).pop(_KEPT, {}))
        quant = self.quantization_config.quant
        found = linears(model)
        plan = Plan()
        for name, module in found.items():
            if isinstance(module, QuantizedLinear):
                plan.specs[name], plan.quant[name] = None, quant
            else:
                plan.skipped[name] = "kept dense"
                self._check_came(model, f"{name}.weight")
        plan.skipped.update({n: why for n, why in self.left.items() if n not in plan.specs})
        for name, module in model.named_modules():
            if isinstance(module, AdapterExperts):
                plan.experts[name] = ExpertsPlan(dict(module.fastlora_experts.specs), quant)
                _check_whole(name, module)
            elif name in self.experts:
                plan.skipped[name] = "kept dense"
                _check_dense(name, module)
        trained = frozenset(name for name, p in model.named_parameters() if p.is_floating_point())
        backend = self.quantization_config.backend
        record = Record(plan, None, quant, backend, self.dense_bytes, trained, forget=_forget)
        setattr(model, RECORD, record)
        self.parts = dict(model.named_children())
        self.trained = _trained(self.parts)
        return model

    def _check_came(self, model: Any, weight: str) -> None:
        """Raise where a layer of the model's body has a weight that was not in the checkpoint.

        A head or a pooler may be new; of layers that are numbered none may.
        """
        if weight not in self.wanted or weight in self.loading.dense:
            return
        body = getattr(model, "base_model_prefix", "")
        inside = weight.startswith(f"{body}.") or not hasattr(model, body)
        numbered = any(part.isdigit() for part in weight.split("."))
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        if inside and numbered and weight not in tied:
            raise ValueError(
                f"a checkpoint must hold the weights of all layers, but {weight!r} is missing;"
                " fetch it again, or name the layer in skip_modules to start it anew"
            )

    def get_quantize_ops(self) -> ConversionOps:
        """Return what packs a dense weight."""
        return _Quantize(self.quantization_config, self.loading)

    def get_load_operations(self) -> dict[str, Any]:
        """Return what reads packed weights."""
        return {"deserialize": lambda _: self._deserialize()}

    def _deserialize(self) -> ConversionOps:
        return _Deserialize(self.quantization_config, self.loading)

    def get_weight_conversions(self) -> list[Any]:
        """Return the same for versions of transformers before 5.21, which ask for it so."""
        if not self.pre_quantized:
            return []
        names = sorted(self.serialized_names["weight"], key=len, reverse=True)
        return [WeightConverter(names, "weight", [self._deserialize()])]

    def is_serializable(self) -> bool:
        """Return True: `save_pretrained` writes packed weights."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters train on the packed weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether it was decided what to train: an adapter of ours, or a head, the rest frozen.

        Trainer asks, and refuses a model that is only quantised; PEFT's models it knows itself.
        """
        return _trained(self.parts) != self.trained


def _trained(parts: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of the parameters that require a gradient."""
    return {
        f"{name}.{key}"
        for name, part in parts.items()
        for key, parameter in part.named_parameters()
        if parameter.requires_grad
    }


def _check_whole(name: str, module: AdapterExperts) -> None:
    """Raise unless all weights of fused experts were in the checkpoint."""
    for part in projections(module):
        weight = module._parameters[part]
        if weight is None or weight.dtype != torch.uint8:
            raise ValueError(
                f"a checkpoint must hold all weights of fused experts, but {name}.{part} is"
                " missing; fetch the checkpoint again"
            )


def _check_dense(name: str, module: Any) -> None:
    """Raise unless the fused experts of a packed checkpoint are dense."""
    for part in projections(module):
        if module._parameters[part].dim() != 3:
            raise ValueError(
                f"a packed checkpoint must hold fused experts as floats, but {name}.{part} is in"
                " bytes, for which there is no format; load the full-precision checkpoint, and the"
                " adapter from its own files"
            )


def _forget(model: Any) -> None:
    """Take back what transformers wrote on a quantised model, when its weights are dense again."""
    for owner in (model, model.config):
        for name in ("hf_quantizer", "is_quantized", "quantization_method", "quantization_config"):
            vars(owner).pop(name, None)
    vars(model.config).pop("_is_quantized", None)


def _skips(skip: list[str], name: str) -> bool:
    parts = name.split(".")
    return any(s == name or name.endswith(f".{s}") or s in parts for s in skip)


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model without its adapters."""
    own = cast(Any, model).state_dict()
    return {key: value for key, value in own.items() if "lora_" not in key}
