"""Which parameter learns how fast, and which decays."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fastlora.train.arguments import Extras
from fastlora.train.refusal import Refusal
from fastlora.train.strategies.base import blocks_of


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    extras: Extras,
    head: list[str],
    decaying: set[str],
) -> list[dict[str, Any]]:
    """Return the optimizer's groups.

    Args:
        model: its parameters that require a gradient are grouped.
        learning_rate: of the final layer and the last block.
        weight_decay: of the parameters that decay; biases and norms never do.
        extras: `layerwise_lr_decay` and `loraplus_lr_ratio`.
        head: names of the modules of the final layer.
        decaying: names of the parameters that decay.
    """
    depth = depths(model, head) if extras.layerwise_lr_decay != 1.0 else {}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = learning_rate * extras.layerwise_lr_decay ** depth.get(name, 0)
        if name.endswith("lora_B"):
            rate *= extras.loraplus_lr_ratio
        decay = weight_decay if name in decaying else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def depths(model: nn.Module, head: list[str]) -> dict[str, int]:
    """Return parameter name -> blocks between it and the final layer; 0 for that itself."""
    try:
        stem, blocks = blocks_of(model)
    except Refusal:
        return {}
    count = len(blocks)
    inside = re.compile(rf"{re.escape(stem)}\.(\d+)\.")
    names = [name for name, _ in model.named_parameters()]
    first = next((i for i, name in enumerate(names) if inside.match(name)), 0)
    found = {}
    for index, name in enumerate(names):
        match = inside.match(name)
        if match:
            found[name] = count - int(match.group(1))
        elif index < first and not name.startswith(tuple(f"{h}." for h in head)):
            found[name] = count + 1  # embeddings
    return found
