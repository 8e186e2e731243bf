"""Fused 4-bit and low-rank layers for fine-tuning large models: the public names."""

import importlib
from typing import Any

from fastlora.adapters.bottleneck import BottleneckConfig
from fastlora.adapters.loha import LoHaConfig
from fastlora.adapters.lokr import LoKrConfig
from fastlora.adapters.lora import LoraConfig
from fastlora.checkpoint import load_adapter, save_adapter
from fastlora.functional import dora_linear, lora_linear, multi_lora_linear
from fastlora.fuse import fuse_groups
from fastlora.grouped import experts_linear
from fastlora.patch import merge, patch_model, unpatch
from fastlora.products import hada_linear, kron_linear
from fastlora.quant import QuantConfig, QuantizedWeight, quantize_4bit
from fastlora.quant_experts import QuantizedExperts, quantize_experts
from fastlora.report import report

_LATER = {
    "FastLoraQuantConfig": "fastlora.integrations.quantizer",
    "from_pretrained": "fastlora.integrations.pretrained",
    "save_quantized": "fastlora.integrations.pretrained",
}


def __getattr__(name: str) -> Any:
    """Import what needs transformers when it is first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


__version__ = "0.1.0"
__all__ = [
    "BottleneckConfig",
    "FastLoraQuantConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "QuantConfig",
    "QuantizedExperts",
    "QuantizedWeight",
    "__version__",
    "dora_linear",
    "experts_linear",
    "from_pretrained",
    "fuse_groups",
    "hada_linear",
    "kron_linear",
    "load_adapter",
    "lora_linear",
    "merge",
    "multi_lora_linear",
    "patch_model",
    "quantize_4bit",
    "quantize_experts",
    "report",
    "save_adapter",
    "save_quantized",
    "unpatch",
]
