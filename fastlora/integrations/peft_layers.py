"""PEFT's LoRA, LoHa and LoKr linears, run by fastlora's kernels with PEFT's own parameters.

A layer reads its parameters and switches (active adapters, `disable_adapters`, merged or not) at
each call, so everything that PEFT does to them goes on working. A call that fastlora has no fused
form of is PEFT's own: several adapters with dropout or DoRA, dropout of LoHa's and LoKr's rows,
hooks on a layer's parts, transforms of torch.func. What decides it gives the report its reason.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from peft import PeftModel
from peft.tuners import PrefixEncoder, loha, lokr, lora
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fastlora import ops
from fastlora.adapters import METHODS, AdapterSpec, Base, magnitude
from fastlora.dispatch import Problem
from fastlora.in_place import HOOKS, META, Accelerated, Swap, is_watched, one_device, refusal
from fastlora.integrations import bnb_layers
from fastlora.integrations.versions import check_version
from fastlora.linears import by_outputs, is_conv1d, is_usual, lay_by_outputs
from fastlora.ops.library import activation_dtype, autocasts, is_transformed

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PREFIX = (
    "prefix tuning is PEFT's own, and can't train with gradient checkpointing, for which"
    " transformers leaves out the cache that holds the prefix"
)
DROPOUT = "its dropout masks come from a seed, not from nn.Dropout"


class Operand:
    """What a call multiplies: x as the base takes it, and the base."""

    def __init__(self, layer: Any, x: Tensor) -> None:
        linear = layer.base_layer
        state = layer.fastlora_state
        self.dtype = None if is_usual(linear) else x.dtype
        if is_usual(linear):
            weight = StoredWeight(by_outputs(linear), None, None, None, "dense", 0)
        else:
            x, weight = bnb_layers.input_of(linear, x), bnb_layers.stored(linear)
        self.x = x
        bias = bnb_layers.bias_of(linear, x)
        self.base = Base(weight, bias, state.backend, state.cache)

    def result(self, y: Tensor) -> Tensor:
        """Return y in the dtype of a base's output: x's own for a 4-bit one, under autocast too."""
        return y if self.dtype is None else y.to(self.dtype)


def base_reason(layer: Any) -> str | None:
    """Return why PEFT computes a layer itself, whatever its adapters and its input, or None."""
    linear = layer.base_layer
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    if is_watched(linear):
        return HOOKS
    if not is_usual(linear):
        usual = isinstance(linear, bnb_layers.Linear4bit)
        return None if usual else "its base is not accelerated"
    return "its base is trained" if linear.weight.requires_grad else None


def takes(layer: Any, x: Tensor) -> bool:
    """Return whether a call may be fused at all: adapters on, a frozen base, a known dtype."""
    if base_reason(layer) is not None or not isinstance(x, Tensor):
        return False
    linear = layer.base_layer
    if is_usual(linear):
        usual = activation_dtype(x) in FLOATS and not is_transformed()
        return usual and (linear.weight.dtype == x.dtype or autocasts(x))
    return bnb_layers.computes(linear, x)


def plain_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call has nothing but x."""
    return not args and not any(value is not None for value in kwargs.values())


class _Lora(Accelerated):
    """A LoRA or DoRA layer of PEFT."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output with the updates of the active adapters; x is (..., K)."""
        layer = cast(Any, self)
        owners = kwargs.pop("adapter_names", None)
        if owners is not None:
            return self._mixed(x, owners, args, kwargs)
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        fused = plain_call(args, kwargs) and takes(layer, x) and _reason(layer, names) is None
        if not fused:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        at = Operand(layer, x)
        if len(names) == 1:
            y = _single(layer, names[0], at)
        else:
            y = ops.linear(
                at.x, at.base.weight, at.base.bias, _joined(layer, names), at.base.backend
            )
        return at.result(y)

    def _mixed(self, x: Tensor, owners: list[str], args: Any, kwargs: Any) -> Tensor:
        """Return the output of a batch in which each sample names its adapter."""
        layer = cast(Any, self)
        names = [name for name in dict.fromkeys(owners) if name in layer.lora_A]
        fused = plain_call(args, kwargs) and not self.training and takes(layer, x)
        if not fused or any(n in layer.lora_variant for n in names) or _reason(layer, names):
            result: Tensor = super().forward(x, *args, adapter_names=owners, **kwargs)
            return result
        layer._check_forward_args(x, adapter_names=owners)
        at = Operand(layer, x)
        update = _joined(layer, names)._replace(spans=_spans(layer, names, owners, x))
        y = ops.linear(at.x, at.base.weight, at.base.bias, update, at.base.backend)
        return at.result(y)

    def problem(self) -> Problem:
        """Return a training batch of this layer."""
        layer = cast(Any, self)
        base, compute = layer.base_layer, self.fastlora_state.compute
        for part in layer.lora_A.values():
            return bnb_layers.problem(base, part.weight.shape[0], part.weight.dtype, compute)
        return bnb_layers.problem(base, 0, None, compute)

    def describe(self) -> dict[str, Any]:
        """Return the report's columns; of several adapters, those of the active ones."""
        layer = cast(Any, self)
        names = [n for n in layer.active_adapters if n in layer.lora_A] or list(layer.lora_A)
        kinds = sorted({_kind(layer, name) for name in names})
        return _columns(layer, " + ".join(kinds) or None, names)

    def left(self) -> str | None:
        """Return that PEFT computes a training batch, and why."""
        layer = cast(Any, self)
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        return _left(base_reason(layer) or _reason(layer, names, training=True))

    def remarks(self) -> list[str]:
        """Return that dropout has other masks than PEFT's."""
        drops = any(_dropout(self, name, True) for name in cast(Any, self).lora_A)
        return [DROPOUT] if drops and self.left() is None else []


def _left(reason: str | None) -> str | None:
    return None if reason is None else f"left to PEFT: {reason}"


def _reason(layer: Any, names: list[str], training: bool = False) -> str | None:
    """Return why PEFT computes these LoRA adapters itself, or None.

    Args:
        layer: the layer.
        names: its active adapters.
        training: whether dropout counts in inference too.
    """
    if not names:
        return "no active adapter"
    several = len(names) > 1
    for name in names:
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if type(a) is not nn.Linear or type(b) is not nn.Linear:
            return "its adapter is not made of nn.Linear"
        if b.bias is not None:
            return "lora_bias"
        if a.weight.dtype not in FLOATS:
            return f"its adapter is in {a.weight.dtype}"
        if name in layer.lora_variant and (several or _kind(layer, name) != "dora"):
            return f"{'several active adapters with ' if several else ''}{_kind(layer, name)}"
        if several and _dropout(layer, name, training):
            return "several active adapters with dropout"
        if type(dropout) not in (nn.Identity, nn.Dropout):
            return f"its dropout is a {type(dropout).__name__}"
        if is_watched(a) or is_watched(b) or is_watched(dropout):
            return HOOKS
        if name in layer.lora_variant and is_watched(layer.lora_magnitude_vector[name]):
            return HOOKS
    return None


def _kind(layer: Any, name: str) -> str:
    """Return what an adapter is called: lora, dora, or what PEFT's variant of LoRA is."""
    variant = layer.lora_variant.get(name)
    if variant is None:
        return "lora"
    cls = getattr(variant, "__name__", type(variant).__name__)
    return str(cls).removesuffix("LinearVariant").lower()


def _dropout(layer: Any, name: str, training: bool = False) -> float:
    module = layer.lora_dropout[name]
    drops = isinstance(module, nn.Dropout) and (training or module.training)
    return float(module.p) if drops else 0.0


def _single(layer: Any, name: str, at: Operand) -> Tensor:
    """Return the output with one adapter, LoRA or DoRA."""
    params = {"lora_A": layer.lora_A[name].weight, "lora_B": layer.lora_B[name].weight}
    if name in layer.lora_variant:
        params[magnitude.NAME] = layer.lora_magnitude_vector[name].weight
    scaling, r = layer.scaling[name], params["lora_A"].shape[0]
    dropout = _dropout(layer, name)
    if isinstance(scaling, Tensor):  # as PEFT has it for adapters that are swapped under a graph
        update, scaling = _joined(layer, [name]), 1.0
    else:
        update = LowRank(_as(params["lora_A"], at.x), _as(params["lora_B"], at.x), float(scaling))
    spec = AdapterSpec("lora", r, scaling * r, scaling, {}, dropout)
    training = dropout > 0 or layer.training
    call = METHODS["lora"].low_rank_call(at.x, at.base, params, spec, update, training)
    return call.run(at.base)


def _as(parameter: Tensor, x: Tensor) -> Tensor:
    """Return an adapter's parameter in float32 or in x's dtype, which kernels take."""
    dtype = activation_dtype(x)
    return parameter if parameter.dtype in (torch.float32, dtype) else parameter.float()


def _joined(layer: Any, names: list[str]) -> LowRank:
    """Return the sum of several updates as one: A below A, scaled B beside B."""
    a = torch.cat([layer.lora_A[name].weight.float() for name in names])
    b = [layer.lora_B[name].weight.float() * layer.scaling[name] for name in names]
    return LowRank(a, torch.cat(b, dim=1), 1.0)


def _spans(layer: Any, names: list[str], owners: list[str], x: Tensor) -> Tensor:
    """Return the ranks that each row of x has: (M, 2) int32, none for the bare base."""
    ends = torch.tensor([layer.lora_A[name].weight.shape[0] for name in names]).cumsum(0).tolist()
    spans = dict(zip(names, zip([0, *ends], ends, strict=False), strict=True))
    rows = torch.tensor([spans.get(owner, (0, 0)) for owner in owners], dtype=torch.int32)
    each = x.shape[:-1].numel() // len(owners)
    return rows.repeat_interleave(each, dim=0).to(x.device)


class _Product(Accelerated):
    """A LoHa or LoKr layer of PEFT."""

    method: ClassVar[str]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output with the active adapter's update; x is (..., K)."""
        layer = cast(Any, self)
        name, params, reason = self._active(self.training)
        if reason is not None or not (plain_call(args, kwargs) and takes(layer, x)):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        at = Operand(layer, x)
        if layer.training:
            torch.rand(1)  # PEFT's draw for module_dropout: the model's own dropout stays the same
        method = METHODS[self.method]
        params = {key: _as(value, at.x) for key, value in params.items()}
        scaling, r = float(layer.scaling[name]), int(layer.r[name])
        spec = AdapterSpec(self.method, r, scaling * r, scaling, {})
        y = method.call(at.x, at.base, params, spec, layer.training).run(at.base)
        return y.to(x.dtype)

    def _active(self, training: bool) -> tuple[str, dict[str, Tensor], str | None]:
        """Return the active adapter, its parameters by our names, and why it is left to PEFT."""
        layer = cast(Any, self)
        names = [name for name in layer.active_adapters if name in layer._available_adapters]
        if len(names) != 1:
            return "", {}, "several active adapters" if names else "no active adapter"
        name = names[0]
        for field in ("rank_dropout", "module_dropout") if training else ():
            if getattr(layer, field)[name]:
                return name, {}, f"{field} in training"
        known, found = METHODS[self.method].file_keys, {}
        for key in layer.adapter_layer_names:
            values = getattr(layer, key)
            if name not in values:
                continue
            if key not in known or values[name].dim() != 2:
                return name, {}, f"a parameter {key} of another form"
            found[key] = values[name]
        return name, found, None

    def left(self) -> str | None:
        """Return that PEFT computes a training batch, and why."""
        return _left(base_reason(self) or self._active(True)[2])

    def problem(self) -> Problem:
        """Return a training batch of this layer."""
        layer = cast(Any, self)
        rank, compute = max(layer.r.values(), default=0) ** 2, self.fastlora_state.compute
        dtype = torch.float32 if rank else None
        return bnb_layers.problem(layer.base_layer, rank, dtype, compute)

    def describe(self) -> dict[str, Any]:
        """Return the report's columns; of several adapters, those of the active ones."""
        layer = cast(Any, self)
        available = layer._available_adapters
        names = [n for n in layer.active_adapters if n in available] or sorted(available)
        return _columns(layer, self.method if names else None, names)


class LoraLinear(_Lora, lora.Linear):  # type: ignore[misc]
    """PEFT's LoRA on a dense linear."""

    plain: ClassVar[type[nn.Module]] = lora.Linear

    def prepare(self) -> None:
        """Lay the weight of a Conv1D out by rows; its shape stays (K, N)."""
        base = cast(Any, self).base_layer
        if is_conv1d(base):
            lay_by_outputs(base)

    def release(self) -> None:
        """Lay the weight of a Conv1D out as it was."""
        base = cast(Any, self).base_layer
        if is_conv1d(base):
            base.weight.data = base.weight.data.contiguous()


class LoHaLinear(_Product, loha.Linear):  # type: ignore[misc]
    """PEFT's LoHa on a linear."""

    plain: ClassVar[type[nn.Module]] = loha.Linear
    method = "loha"


class LoKrLinear(_Product, lokr.Linear):  # type: ignore[misc]
    """PEFT's LoKr on a linear."""

    plain: ClassVar[type[nn.Module]] = lokr.Linear
    method = "lokr"


class LoraLinear4bit(_Lora, PeftLinear4bit):  # type: ignore[misc]
    """PEFT's LoRA on a 4-bit linear of bitsandbytes."""

    plain: ClassVar[type[nn.Module]] = PeftLinear4bit

    def packed(self) -> StoredWeight | None:
        """Return the 4-bit weight, unless the layer under the adapter was left as it was."""
        base = cast(Any, self).base_layer
        return base.packed() if isinstance(base, Accelerated) else None


SWAPS: dict[type[nn.Module], type[Accelerated]] = {
    cls.plain: cls for cls in (LoraLinear, LoraLinear4bit, LoHaLinear, LoKrLinear)
}


def _columns(layer: Any, method: str | None, names: list[str]) -> dict[str, Any]:
    base = bnb_layers.weight_columns(layer.base_layer)
    own = sum(p.nbytes for n, p in layer.named_parameters() if not n.startswith("base_layer."))
    return {
        "method": method,
        "r": sum(layer.r[name] for name in names) or None,
        "scaling": float(layer.scaling[names[0]]) if len(names) == 1 else None,
        **base,
        "bytes": base["bytes"] + own,
    }


def plan(name: str, module: nn.Module, backend: str, compute: str) -> Swap | str | None:
    """Return what becomes of a layer of PEFT, or why nothing does; None: it is no such layer."""
    if isinstance(module, PrefixEncoder):
        return PREFIX
    if not isinstance(module, BaseTunerLayer):
        return None
    check_version("peft")
    check_version("transformers")
    if "trl" in sys.modules:
        check_version("trl")
    layer = cast(Any, module)
    kind = f"{type(module).__module__.split('.')[2]}.{type(module).__name__}"
    if type(module) not in SWAPS:
        return f"PEFT's {kind} is left to PEFT"
    if getattr(layer, "fan_in_fan_out", False) and not is_conv1d(layer.base_layer):
        return "a base weight stored as (inputs, outputs) is left to PEFT"
    reason = _base_reason(name, layer.base_layer, backend, compute)
    if reason is not None:
        return reason
    one_device(name, list(module.parameters()))
    return Swap(SWAPS[type(module)], "")


def guard(model: nn.Module) -> None:
    """Let prefix tuning say why it can't train with gradient checkpointing."""
    for module in model.modules():
        prompts = getattr(module, "prompt_encoder", None) if isinstance(module, PeftModel) else None
        if prompts is not None and any(isinstance(m, PrefixEncoder) for m in prompts.values()):
            module.register_forward_pre_hook(refuse_checkpointing)


def refuse_checkpointing(model: Any, inputs: tuple[Any, ...]) -> None:
    """Raise where a model with an active prefix is to train with gradient checkpointing.

    Raises:
        ValueError: it is.
    """
    prefix = isinstance(model.prompt_encoder[model.active_adapter], PrefixEncoder)
    if not (prefix and model.training and torch.is_grad_enabled()):
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "prefix tuning must train without gradient checkpointing, for which transformers"
            " leaves out the cache that holds the prefix, but it is on; call"
            " model.gradient_checkpointing_disable()"
        )


def _base_reason(name: str, linear: nn.Module, backend: str, compute: str) -> str | None:
    if isinstance(linear, bnb_layers.Linear4bit):
        return None
    if is_usual(linear):
        if linear.weight.is_meta:
            return META
        if linear.weight.dtype not in FLOATS:
            return f"a base in {linear.weight.dtype} is left to PEFT"
        return refusal(bnb_layers.problem(linear, 16, torch.float32), backend)
    if type(linear).__module__.startswith("bitsandbytes."):
        found = bnb_layers.plan(f"{name}.base_layer", linear, backend, compute)
        return found if isinstance(found, str) else None
    return f"a base of {type(linear).__name__} is left to PEFT"
