"""Decide what a patch does, and refuse what it can't do, before anything is changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from fastlora.adapters import AdapterConfig, AdapterSpec, method_of
from fastlora.adapters.targets import matches
from fastlora.expert_plan import ExpertsPlan, plan_experts
from fastlora.experts import AdapterExperts
from fastlora.layer_checks import TOO_WIDE, check_layer, refuse_rank, too_wide
from fastlora.layers import AdapterLinear, QuantizedLinear
from fastlora.linears import is_linear, is_usual, linears, sizes
from fastlora.other_layers import can_adapt, spec_of
from fastlora.quant import QuantConfig
from fastlora.weight_reads import Read, weight_reads

HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
"""Task type -> names of the heads that are trained whole."""


@dataclass
class Plan:
    """What to do with each module.

    Attributes:
        specs: module name -> its adapter; None where a weight is only quantised.
        quant: module name -> how to store its weight; only the quantised ones.
        skipped: name of a linear that stays as it is -> why.
        notes: name of an adapted linear -> what else is to be said of it.
        saved: names of the modules that are trained whole.
        bias: names of the bias parameters to train.
        reads: name of an adapted linear -> who reads the values of its weight past its forward.
        experts: what to do with each module of fused experts.
    """

    specs: dict[str, AdapterSpec | None] = field(default_factory=dict)
    quant: dict[str, QuantConfig] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    bias: list[str] = field(default_factory=list)
    reads: dict[str, Read] = field(default_factory=dict)
    experts: dict[str, ExpertsPlan] = field(default_factory=dict)

    @property
    def packed(self) -> int:
        """How many layers are stored in 4 bits."""
        return len(self.quant) + sum(part.quant is not None for part in self.experts.values())

    @property
    def parameters(self) -> dict[str, AdapterSpec]:
        """The expert weights that get an adapter, by the names of the parameters."""
        return {
            f"{name}.{key}": spec
            for name, part in self.experts.items()
            for key, spec in part.adapted.items()
        }

    @property
    def adapted(self) -> dict[str, AdapterSpec]:
        """The modules that get an adapter."""
        return {name: spec for name, spec in self.specs.items() if spec is not None}


def make_plan(
    model: nn.Module,
    config: AdapterConfig | None,
    quant: QuantConfig | None,
    backend: str,
    compute: str = "auto",
    bounded: bool = True,
) -> Plan:
    """Return what `patch_model` does with these arguments; changes nothing.

    A model that is already swapped is planned as if it were not, so that a file's config can be
    compared with what is there. With `bounded` False a rank may be more than a layer's smaller
    side, as in a file that another library wrote.

    Raises:
        ValueError: a target does not exist or does not fit.
        TypeError: a target is no linear, convolution or embedding.
        NotImplementedError: no backend takes a layer.
        ImportError: the native library is missing.
    """
    plan = Plan()
    if config is not None:
        plan.saved = _saved_modules(model, config)
    reasons, reads = _reasons_to_skip(model, config), weight_reads(model)
    explicit = config is not None and not config.all_linear
    tied = _tied(model)
    has_head = getattr(model, "get_output_embeddings", lambda: None)() is not None
    for name, module in model.named_modules():
        inside = any(name == saved or name.startswith(saved + ".") for saved in plan.saved)
        if not name or inside or not (config is None or config.wants(name)):
            if is_linear(module):
                reason = "trained whole" if inside else reasons.get(name) or _foreign(name, module)
                _place_base(plan, name, quant if has_head else None, reason, reads.get(name))
        elif not is_linear(module):
            if explicit and config is not None:
                _place_other(plan, name, module, config, tied)
        else:
            reason = reasons.get(name)
            _place(plan, name, module, config, quant, reason, reads.get(name), explicit)
    every = config is None or has_head
    kept = _kept_whole(model, plan.saved, tied)
    found = plan_experts(model, config, quant, every, kept, backend)
    plan.experts = found[0]
    plan.skipped.update(found[1])
    _check_matched(model, config, plan)
    for name, spec in plan.specs.items():
        if not can_adapt(model.get_submodule(name)):
            layer = model.get_submodule(name)
            check_layer(name, layer, spec, plan.quant.get(name), backend, compute, bounded)
    if config is not None:
        plan.bias = _biases(model, getattr(config, "bias", "none"), plan)
    return plan


_NOT_LINEAR = (
    "a target module must be an nn.Linear, a convolution or an nn.Embedding, but {!r} is a {}; name"
    " others in target_modules or exclude it"
)


def _place_other(
    plan: Plan, name: str, module: nn.Module, config: AdapterConfig, tied: set[int]
) -> None:
    """Write a convolution or an embedding that is named as a target into the plan."""
    if not can_adapt(module):
        raise TypeError(_NOT_LINEAR.format(name, type(module).__name__))
    if id(module.weight) in tied:
        raise ValueError(
            f"a target module must have a weight of its own, but that of {name!r} is tied to"
            " another module's; exclude it"
        )
    plan.specs[name] = spec_of(config, name, module)


def _kept_whole(model: nn.Module, saved: list[str], tied: set[int]) -> dict[str, str]:
    """Return modules whose own parameters must stay as they are -> why."""
    reasons: dict[str, str] = {}
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, module in model.named_modules():
        if any(name == other or name.startswith(other + ".") for other in saved):
            reasons[name] = "trained whole"
        elif any(id(p) in tied for p in module._parameters.values()):
            reasons[name] = "its weight is tied to another module's"
        elif any(part in kept for part in name.split(".")):
            reasons[name] = "the model keeps it in float32"
    return reasons


def _tied(model: nn.Module) -> set[int]:
    """Return the ids of the weights that modules share."""
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {key for key, count in users.items() if count > 1}


def _place(
    plan: Plan,
    name: str,
    module: nn.Module,
    config: AdapterConfig | None,
    quant: QuantConfig | None,
    reason: str | None,
    read: Read | None,
    explicit: bool,
) -> None:
    """Write one wanted linear into the plan; `reason` is why it is left alone unless named."""
    foreign = _foreign(name, module)
    if foreign is not None and explicit:
        raise TypeError(foreign)
    if config is None and quant is not None and read is not None:
        reason = reason or str(read)
    spec = _spec(config, name, module)
    if spec is not None and not explicit and too_wide(spec, module):
        reason = reason or TOO_WIDE.format(spec.r)
    if foreign is not None or (reason is not None and not explicit):
        plan.skipped[name] = foreign or reason or ""
        return
    plan.specs[name], notes = spec, []
    if quant is not None and reason is None and read is None:
        plan.quant[name] = quant
    elif quant is not None:
        notes.append(f"kept dense: {reason or read}")
    if spec is not None and read is not None and read.values:
        plan.reads[name] = read
        notes.append(f"{read} past the adapter")
    if notes:
        plan.notes[name] = "; ".join(notes)


def _place_base(
    plan: Plan, name: str, quant: QuantConfig | None, reason: str | None, read: Read | None
) -> None:
    """Write one linear that gets no adapter into the plan: in 4 bits, or as it is."""
    if quant is not None and read is not None:
        reason = reason or str(read)
    if quant is None or reason is not None:
        plan.skipped[name] = reason or "not a target"
        return
    plan.specs[name], plan.quant[name] = None, quant


def _saved_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Return the full names of modules_to_save, and of the heads that a task type implies."""
    asked = tuple(config.modules_to_save or ())
    implied = tuple(HEADS.get(config.task_type or "", ()))
    names = [name for name, _ in model.named_modules()]
    for entry in asked:
        if entry not in implied and not any(matches((entry,), name) for name in names):
            raise ValueError(
                f"modules_to_save must name modules of the model, but none is called {entry!r};"
                f" its top modules are {[name for name, _ in model.named_children()]}"
            )
    found = [name for name in names if name and matches(asked + implied, name)]
    nested = [n for n in found if any(n.startswith(other + ".") for other in found)]
    chosen = [name for name in found if name not in nested]
    for name in chosen:
        packed = [m for m in model.get_submodule(name).modules() if is_packed(m)]
        if packed:
            raise ValueError(
                f"a module that is trained whole must have dense weights, but {name!r} has"
                f" {len(packed)} in 4 bits; name it in skip_modules when the model is loaded"
            )
    return chosen


def is_packed(module: nn.Module) -> bool:
    """Return whether a module's own weights are in 4 bits."""
    if isinstance(module, AdapterExperts):
        return module.fastlora_experts.quant is not None
    return isinstance(module, QuantizedLinear)


def _reasons_to_skip(model: nn.Module, config: AdapterConfig | None) -> dict[str, str]:
    """Return linears that only a name in target_modules may adapt, and none may quantise."""
    reasons: dict[str, str] = {}
    tied = _tied(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, module in linears(model).items():
        if id(module.weight) in tied:
            reasons[name] = "its weight is tied to another module's"
        elif module is head:
            reasons[name] = "output head"
        elif any(part in kept for part in name.split(".")):
            reasons[name] = "the model keeps it in float32"
    return reasons


def _foreign(name: str, module: nn.Module) -> str | None:
    """Return why a linear can't be swapped, or None."""
    if not is_usual(module) and not isinstance(module, AdapterLinear):
        return (
            f"a target module must be exactly an nn.Linear, but {name!r} is a"
            f" {type(module).__name__}, whose forward would be lost; exclude it"
        )
    if "forward" in vars(module):
        return (
            f"a target module must use the forward of its class, but {name!r} has one of its own,"
            " perhaps from a hook of accelerate; remove it first"
        )
    return None


def _check_matched(model: nn.Module, config: AdapterConfig | None, plan: Plan) -> None:
    if config is None and (plan.specs or plan.experts):
        return
    if plan.adapted or (plan.parameters and config is not None and not config.target_modules):
        return
    asked = "linears" if config is None else f"target_modules={config.target_modules!r}"
    kinds = sorted({type(m).__name__ for m in model.modules() if _holds_matrix(m)})
    others = f"; modules of type {', '.join(kinds)} are none" if kinds else ""
    wanted = [n for n in plan.skipped if config is None or config.wants(n)]
    if wanted:
        spec = _spec(config, wanted[0], model.get_submodule(wanted[0]))
        if spec is not None and plan.skipped[wanted[0]] == TOO_WIDE.format(spec.r):
            refuse_rank(wanted[0], model.get_submodule(wanted[0]), spec)
        raise ValueError(
            f"{asked} must match an nn.Linear that can be patched, but none of {len(wanted)} can"
            f"{others}; {wanted[0]}: {plan.skipped[wanted[0]]}"
        )
    names = sorted({_short(name) for name in linears(model)})
    raise ValueError(
        f"{asked} must match an nn.Linear of the model, but nothing does{others}; its linears are"
        f" named {names}, so choose from these"
    )


def _holds_matrix(module: nn.Module) -> bool:
    """Return whether a module that is no linear has a weight that looks like one's."""
    weight = module._parameters.get("weight")
    own = is_linear(module) or isinstance(module, nn.Embedding) or can_adapt(module)
    return not own and weight is not None and weight.dim() == 2


def _spec(config: AdapterConfig | None, name: str, module: nn.Module) -> AdapterSpec | None:
    """Return what the adapter of a linear is; None of what is no linear, or without a config."""
    if config is None or not is_linear(module):
        return None
    return method_of(config).spec(config, name, *sizes(module))


def _short(name: str) -> str:
    """Return the last part of a name; the whole name when that is a number."""
    last = name.rpartition(".")[2]
    return name if last.isdigit() else last


def _biases(model: nn.Module, bias: str, plan: Plan) -> list[str]:
    """Return the names of the bias parameters that the config's `bias` trains."""
    if bias == "none":
        return []
    names = [name for name, _ in model.named_parameters() if name.split(".")[-1] == "bias"]
    if bias == "all":
        saved = tuple(f"{name}." for name in plan.saved)
        return [name for name in names if not name.startswith(saved)]
    return [name for name in names if name.rpartition(".")[0] in plan.adapted]
