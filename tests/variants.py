"""Configs of every adapter method that changes weights: the contract tests run each of them."""

from __future__ import annotations

from typing import Any

from fastlora import LoHaConfig, LoKrConfig, LoraConfig
from fastlora.adapters import METHODS, AdapterConfig

# K of the layer that they suit, and N: 48 = 6 x 8 and 40 = 5 x 8 for LoKr.
IN_FEATURES, OUT_FEATURES = 48, 40

VARIANTS: dict[str, AdapterConfig] = {
    **{
        f"{name} by default": method.config_class(r=2)
        for name, method in METHODS.items()
        if method.mergeable
    },
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True),
    "dora": LoraConfig(r=4, use_dora=True),
    "rslora and dora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, use_dora=True),
    "loha": LoHaConfig(r=3, alpha=5),
    "lokr, both full": LoKrConfig(r=8, alpha=12),
    "lokr, w2 low": LoKrConfig(r=3, alpha=5),
    "lokr, both low": LoKrConfig(r=2, alpha=3, decompose_both=True),
    "lokr, factor 4": LoKrConfig(r=3, decompose_factor=4),
    "lokr, factor 1": LoKrConfig(r=30, alpha=20, decompose_factor=1),
    "lokr, w1 wide": LoKrConfig(r=3, decompose_factor=24, decompose_both=True),
    "lokr as lycoris": LoKrConfig(r=3, init_weights="lycoris"),
}


def with_(config: AdapterConfig, **fields: Any) -> AdapterConfig:
    """Return a config with these fields changed."""
    return type(config)(**{**config.changed_fields(), **fields})
