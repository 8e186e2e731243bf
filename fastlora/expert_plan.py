"""Decide what a patch does with fused experts, and refuse what it can't do, before any change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters import AdapterConfig, AdapterSpec
from fastlora.adapters.lora import METHOD
from fastlora.adapters.targets import matches
from fastlora.checks import FLOATS
from fastlora.dispatch import Problem, pick
from fastlora.experts import AdapterExperts, projections, refusal, shape_of
from fastlora.quant import QuantConfig


@dataclass
class ExpertsPlan:
    """What to do with one experts module.

    Attributes:
        specs: weight -> its adapter, or None.
        quant: how to store its weights in 4 bits; None: as they are.
    """

    specs: dict[str, AdapterSpec | None] = field(default_factory=dict)
    quant: QuantConfig | None = None

    @property
    def adapted(self) -> dict[str, AdapterSpec]:
        """The weights that get an adapter, in the order of the module's parameters."""
        return {name: spec for name, spec in self.specs.items() if spec is not None}


def stacked(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that look like weights of several experts.

    Three dimensions, in a module that counts experts or is called after them; in the latter, two
    dimensions too, which some models use in another way.
    """
    if isinstance(module, AdapterExperts):
        return list(projections(module))
    if isinstance(module, nn.Linear):
        return []
    called = "expert" in type(module).__name__.lower()
    counted = called or hasattr(module, "num_experts")
    own = [(name, p.dim()) for name, p in module._parameters.items() if p is not None]
    return [name for name, dim in own if (dim == 3 and counted) or (dim == 2 and called)]


def plan_experts(
    model: nn.Module,
    config: AdapterConfig | None,
    quant: QuantConfig | None,
    every: bool,
    reasons: dict[str, str],
    backend: str,
) -> tuple[dict[str, ExpertsPlan], dict[str, str]]:
    """Return what is done with each experts module, and why others stay as they are.

    Args:
        model: the model.
        config: the adapter's config, or None.
        quant: how to store weights in 4 bits, or None.
        every: quantise experts that are no targets too.
        reasons: module -> why it must stay as it is.
        backend: "auto", or the name of a backend.

    Raises:
        ValueError: a target does not exist, or a weight does not fit.
        TypeError: a target is no weight of fused experts.
        NotImplementedError: no backend takes one.
    """
    targets: Sequence[str] = getattr(config, "target_parameters", None) or ()
    _check_targets(model, targets)
    plans: dict[str, ExpertsPlan] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not stacked(module):
            continue
        reason = reasons.get(name) or refusal(module)
        wanted = [] if reason else [p for p in projections(module) if _wanted(targets, name, p)]
        if reason is None and (wanted or (quant is not None and every)):
            plans[name] = _place(name, module, config, quant, wanted)
            _check(name, module, plans[name], backend)
        elif not isinstance(module, AdapterExperts):
            skipped[name] = reason or "fused experts: not in target_parameters"
    return plans, skipped


def _wanted(targets: Sequence[str], module: str, parameter: str) -> bool:
    return bool(targets) and matches(targets, f"{module}.{parameter}")


def _place(
    name: str,
    module: nn.Module,
    config: Any,
    quant: QuantConfig | None,
    wanted: list[str],
) -> ExpertsPlan:
    plan = ExpertsPlan(quant=None if isinstance(module, AdapterExperts) else quant)
    ordered = [key for key in module._parameters if key in projections(module)]
    for key in ordered:
        shape = shape_of(module, key)
        spec = METHOD.experts_spec(config, f"{name}.{key}", shape) if key in wanted else None
        plan.specs[key] = spec
    return plan


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raise unless every entry of target_parameters names weights of fused experts alone."""
    if not targets:
        return
    good: list[str] = []
    other: dict[str, str] = {}
    for name, module in model.named_modules():
        reason = refusal(module) if stacked(module) else f"a {type(module).__name__} is no experts"
        for key in module._parameters:
            full = f"{name}.{key}"
            if reason is None and key in projections(module):
                good.append(full)
            else:
                other[full] = reason or "it is no weight of two dimensions per expert"
    for target in targets:
        wrong = [full for full in other if matches((target,), full) and "_lora_" not in full]
        if wrong:
            raise TypeError(
                f"target_parameters must name weights of fused experts, but {wrong[0]!r} is not"
                f" one: {other[wrong[0]]}; leave it out, and name linears in target_modules"
            )
        if not any(matches((target,), full) for full in good):
            raise ValueError(
                f"target_parameters must name weights of fused experts of the model, but nothing"
                f" is called {target!r}; its candidates are {sorted(set(map(_short, good)))}"
            )


def _short(name: str) -> str:
    """Return the part of a parameter's name behind the last number."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def _check(name: str, module: nn.Module, plan: ExpertsPlan, backend: str) -> None:
    """Raise unless the weights of an experts module can have these adapters and this format."""
    for key, spec in plan.specs.items():
        _, n, k = shape_of(module, key)
        full = f"{name}.{key}"
        if spec is not None and spec.r > min(n, k):
            raise ValueError(
                f"the rank of {full!r} must be at most {min(n, k)}, the smaller side of its {n} x"
                f" {k} weights, got {spec.r}; lower r or set rank_pattern"
            )
        weight = module._parameters[key]
        assert weight is not None
        if not isinstance(module, AdapterExperts):
            _check_weight(full, weight, plan.quant)
        quant = plan.quant
        format, blocksize = ("dense", 0) if quant is None else (quant.quant_type, quant.blocksize)
        adapter = torch.promote_types(weight.dtype, torch.float32) if spec is not None else None
        if not isinstance(module, AdapterExperts):
            kind = (weight.device.type, weight.dtype, format, blocksize, 512, n, k)
            pick(Problem("experts_linear", *kind, spec.r if spec else 0, adapter), backend)


def _check_weight(name: str, weight: Tensor, quant: QuantConfig | None) -> None:
    if weight.is_meta:
        raise ValueError(
            f"the weight {name!r} must hold values, but it is on the meta device; load the model"
            " first"
        )
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in FLOATS:
        raise TypeError(
            f"the weight {name!r} must be a plain floating tensor, got {type(weight).__name__} of"
            f" {weight.dtype}; load the model in float32, bfloat16 or float16"
        )
    if quant is not None and weight.dtype == torch.float64:
        raise TypeError(
            f"a weight must be float32, bfloat16 or float16 to be stored in 4 bits, but {name!r} is"
            " float64; convert the model"
        )
    if not bool(torch.isfinite(torch.stack(weight.detach().aminmax())).all()):
        raise ValueError(
            f"the weight {name!r} must be finite, but it holds NaN or infinity; repair the"
            " checkpoint"
        )
