"""Bottleneck adapters after attention and after the feed-forward part of each block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from fastlora import BottleneckConfig
from fastlora.linears import linears, sizes
from fastlora.train.models import Loaded
from fastlora.train.refusal import Refusal
from fastlora.train.strategies.low_rank import LowRankStrategy

PLACES = ("attention", "feed-forward")


class Adapter(LowRankStrategy):
    """Freeze the base and train bottlenecks.

    The section `adapter` holds the fields of `fastlora.BottleneckConfig`, and `after`: a list of
    "attention" and "feed-forward" (default: both). `target_modules` names the linears instead.
    """

    name = "adapter"
    learning_rate = 5e-4
    config_class = BottleneckConfig
    mergeable = False

    def __init__(self, adapter: Mapping[str, Any]) -> None:
        rest = dict(adapter)
        after = rest.pop("after", None)
        self.after = list(PLACES) if after is None else after
        if not isinstance(self.after, list) or not self.after or set(self.after) - set(PLACES):
            raise Refusal(f"adapter.after must be a list of {', '.join(PLACES)}, got {after!r}")
        if after is not None and "target_modules" in rest:
            raise Refusal("adapter must have after or target_modules, got both")
        self.named = "target_modules" in rest
        super().__init__(rest)

    def apply(self, loaded: Loaded, task_type: str, seed: int) -> nn.Module:
        """Put a bottleneck after the linears that end the sub-layers."""
        if not self.named:
            ends = sublayer_ends(loaded.model)
            targets = [name for place in self.after for name in ends[place]]
            if not targets:
                raise Refusal(
                    "the model must have blocks with linears that end attention and feed-forward"
                    " parts, but none were found; name them in adapter.target_modules"
                )
            kept = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
            self.config = BottleneckConfig(**{**kept, "target_modules": targets})
        return super().apply(loaded, task_type, seed)


def sublayer_ends(model: nn.Module) -> dict[str, list[str]]:
    """Return the linears that write into the residual stream: the ends of the two sub-layers.

    Of the linears of a block whose width is that of its last one, the last ends the feed-forward
    part and the one before it attention.
    """
    found: dict[str, list[str]] = {place: [] for place in PLACES}
    for stem, blocks in model.named_modules():
        is_list = isinstance(blocks, nn.ModuleList | nn.Sequential) and len(blocks) > 1
        if not is_list or len({type(block) for block in blocks.children()}) > 1:
            continue
        for number, block in blocks.named_children():
            own = {n: sizes(m)[0] for n, m in linears(block).items()}
            alike = [n for n, outputs in own.items() if outputs == [*own.values()][-1]]
            if len(alike) > 1:
                found["feed-forward"].append(f"{stem}.{number}.{alike[-1]}")
                found["attention"].append(f"{stem}.{number}.{alike[-2]}")
    return found


STRATEGY = Adapter
