"""PEFT's LoRA, LoHa and LoKr linears, run by fastlora's kernels with PEFT's own parameters.

A layer reads its parameters and switches (active adapters, `disable_adapters`, merged or not) at
each call, so everything that PEFT does to them goes on working. A call that fastlora has no fused
form of is PEFT's own: several adapters with dropout or DoRA, dropout of LoHa's and LoKr's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from peft.tuners import loha, lokr, lora
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fastlora import ops
from fastlora.adapters import METHODS, AdapterSpec, Base, magnitude
from fastlora.dispatch import Problem
from fastlora.in_place import Accelerated, Swap, one_device, refusal
from fastlora.integrations import bnb_layers
from fastlora.integrations.versions import check_version
from fastlora.ops.library import activation_dtype, autocasts

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DROPOUT = "its dropout masks come from a seed, not from nn.Dropout"


class Operand:
    """What a call multiplies: x as the base takes it, and the base."""

    def __init__(self, layer: Any, x: Tensor) -> None:
        linear = layer.base_layer
        state = layer.fastlora_state
        self.dtype = None if type(linear) is nn.Linear else x.dtype
        if type(linear) is nn.Linear:
            weight = StoredWeight(linear.weight, None, None, None, "dense", 0)
        else:
            x, weight = bnb_layers.input_of(linear, x), bnb_layers.stored(linear)
        self.x = x
        bias = bnb_layers.bias_of(linear, x)
        self.base = Base(weight, bias, state.backend, state.cache)

    def result(self, y: Tensor) -> Tensor:
        """Return y in the dtype of a base's output: x's own for a 4-bit one, under autocast too."""
        return y if self.dtype is None else y.to(self.dtype)


def takes(layer: Any, x: Tensor) -> bool:
    """Return whether a call may be fused at all: adapters on, a frozen base, a known dtype."""
    linear = layer.base_layer
    if layer.disable_adapters or layer.merged or not isinstance(x, Tensor):
        return False
    if type(linear) is nn.Linear:
        usual = activation_dtype(x) in FLOATS and not linear.weight.requires_grad
        return usual and (linear.weight.dtype == x.dtype or autocasts(x))
    if not isinstance(linear, Accelerated):
        return False
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
        if not (plain_call(args, kwargs) and names and takes(layer, x) and _fusible(layer, names)):
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
        fused = names and plain_call(args, kwargs) and not self.training and takes(layer, x)
        if not fused or any(n in layer.lora_variant for n in names) or not _fusible(layer, names):
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
        a = next(iter(layer.lora_A.values())).weight
        compute = self.fastlora_state.compute
        return bnb_layers.problem(layer.base_layer, a.shape[0], a.dtype, compute)

    def describe(self) -> dict[str, Any]:
        """Return the report's columns; of several adapters, those of the active ones."""
        layer = cast(Any, self)
        names = [n for n in layer.active_adapters if n in layer.lora_A] or list(layer.lora_A)
        dora = any(name in layer.lora_variant for name in names)
        return _columns(layer, "dora" if dora else "lora", names)


def _fusible(layer: Any, names: list[str]) -> bool:
    """Return whether the active adapters have a fused form together."""
    for name in names:
        a, b = layer.lora_A[name], layer.lora_B[name]
        if type(a) is not nn.Linear or type(b) is not nn.Linear or b.bias is not None:
            return False
        if a.weight.dtype not in FLOATS:
            return False
        variant = layer.lora_variant.get(name)
        if variant is not None and (len(names) > 1 or not _is_dora(variant)):
            return False
        if len(names) > 1 and _dropout(layer, name) > 0:
            return False
        if type(layer.lora_dropout[name]) not in (nn.Identity, nn.Dropout):
            return False
    return True


def _is_dora(variant: Any) -> bool:
    return getattr(variant, "__name__", type(variant).__name__) == "DoraLinearVariant"


def _dropout(layer: Any, name: str) -> float:
    module = layer.lora_dropout[name]
    return float(module.p) if isinstance(module, nn.Dropout) and module.training else 0.0


def _single(layer: Any, name: str, at: Operand) -> Tensor:
    """Return the output with one adapter, LoRA or DoRA."""
    params = {"lora_A": layer.lora_A[name].weight, "lora_B": layer.lora_B[name].weight}
    if name in layer.lora_variant:
        params[magnitude.NAME] = layer.lora_magnitude_vector[name].weight
    scaling, r = float(layer.scaling[name]), params["lora_A"].shape[0]
    dropout = _dropout(layer, name)
    spec = AdapterSpec("lora", r, scaling * r, scaling, {}, dropout)
    update = LowRank(_as(params["lora_A"], at.x), _as(params["lora_B"], at.x), scaling)
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
        names = [name for name in layer.active_adapters if name in layer._available_adapters]
        params = self._params(names[0]) if len(names) == 1 else None
        if params is None or not (plain_call(args, kwargs) and takes(layer, x)):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        at = Operand(layer, x)
        name, method = names[0], METHODS[self.method]
        params = {key: _as(value, at.x) for key, value in params.items()}
        scaling, r = float(layer.scaling[name]), int(layer.r[name])
        spec = AdapterSpec(self.method, r, scaling * r, scaling, {})
        y = method.call(at.x, at.base, params, spec, layer.training).run(at.base)
        return y.to(x.dtype)

    def _params(self, name: str) -> dict[str, Tensor] | None:
        """Return the parameters of one adapter by our names; None: not of the usual form."""
        layer = cast(Any, self)
        if layer.training and (layer.rank_dropout[name] or layer.module_dropout[name]):
            return None
        known, found = METHODS[self.method].file_keys, {}
        for key in layer.adapter_layer_names:
            values = getattr(layer, key)
            if name not in values:
                continue
            if key not in known or values[name].dim() != 2:
                return None
            found[key] = values[name]
        return found

    def problem(self) -> Problem:
        """Return a training batch of this layer."""
        layer = cast(Any, self)
        rank, compute = max(layer.r.values()) ** 2, self.fastlora_state.compute
        return bnb_layers.problem(layer.base_layer, rank, torch.float32, compute)

    def describe(self) -> dict[str, Any]:
        """Return the report's columns; of several adapters, those of the active ones."""
        layer = cast(Any, self)
        available = layer._available_adapters
        names = [n for n in layer.active_adapters if n in available] or sorted(available)
        return _columns(layer, self.method, names)


class LoraLinear(_Lora, lora.Linear):  # type: ignore[misc]
    """PEFT's LoRA on a dense linear."""

    plain: ClassVar[type[nn.Module]] = lora.Linear


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


def _columns(layer: Any, method: str, names: list[str]) -> dict[str, Any]:
    base = bnb_layers.weight_columns(layer.base_layer)
    own = sum(p.nbytes for n, p in layer.named_parameters() if not n.startswith("base_layer."))
    return {
        "method": method,
        "r": sum(layer.r[name] for name in names),
        "scaling": float(layer.scaling[names[0]]) if len(names) == 1 else None,
        **base,
        "bytes": base["bytes"] + own,
    }


def plan(name: str, module: nn.Module, backend: str, compute: str) -> Swap | str | None:
    """Return what becomes of a layer of PEFT, or why nothing does; None: it is no such layer."""
    if not isinstance(module, BaseTunerLayer):
        return None
    check_version("peft")
    layer = cast(Any, module)
    kind = f"{type(module).__module__.split('.')[2]}.{type(module).__name__}"
    if type(module) not in SWAPS:
        return f"PEFT's {kind} is left to PEFT"
    if getattr(layer, "fan_in_fan_out", False):
        return "a base weight stored as (inputs, outputs) is left to PEFT"
    reason = _base_reason(name, layer.base_layer, backend, compute)
    if reason is not None:
        return reason
    one_device(name, list(module.parameters()))
    return Swap(SWAPS[type(module)], _notes(layer))


def _base_reason(name: str, linear: nn.Module, backend: str, compute: str) -> str | None:
    if isinstance(linear, Accelerated):
        return None
    if type(linear) is nn.Linear:
        if linear.weight.dtype not in FLOATS:
            return f"a base in {linear.weight.dtype} is left to PEFT"
        return refusal(linear, bnb_layers.problem(linear, 16, torch.float32), backend)
    if type(linear).__module__.startswith("bitsandbytes."):
        found = bnb_layers.plan(f"{name}.base_layer", linear, backend, compute)
        return found if isinstance(found, str) else None
    return f"a base of {type(linear).__name__} is left to PEFT"


def _notes(layer: Any) -> str:
    notes = []
    drops = [m for m in getattr(layer, "lora_dropout", {}).values() if isinstance(m, nn.Dropout)]
    if drops:
        notes.append(DROPOUT)
    for field in ("rank_dropout", "module_dropout"):
        if any(getattr(layer, field, {}).values()):
            notes.append(f"in training PEFT's own, for its {field}")
    variants = {
        type(v).__name__ if not isinstance(v, type) else v.__name__
        for v in getattr(layer, "lora_variant", {}).values()
        if not _is_dora(v)
    }
    notes += [f"{variant} is PEFT's own" for variant in sorted(variants)]
    return "; ".join(notes)
