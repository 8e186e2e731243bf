"""Fused 4-bit and low-rank layers for fine-tuning large models: the public names."""

from fastlora.adapters.loha import LoHaConfig
from fastlora.adapters.lokr import LoKrConfig
from fastlora.adapters.lora import LoraConfig
from fastlora.checkpoint import load_adapter, save_adapter
from fastlora.functional import dora_linear, lora_linear, multi_lora_linear
from fastlora.fuse import fuse_groups
from fastlora.patch import merge, patch_model, unpatch
from fastlora.products import hada_linear, kron_linear
from fastlora.quant import QuantConfig, QuantizedWeight, quantize_4bit
from fastlora.report import report

__version__ = "0.1.0"
__all__ = [
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "QuantConfig",
    "QuantizedWeight",
    "__version__",
    "dora_linear",
    "fuse_groups",
    "hada_linear",
    "kron_linear",
    "load_adapter",
    "lora_linear",
    "merge",
    "multi_lora_linear",
    "patch_model",
    "quantize_4bit",
    "report",
    "save_adapter",
    "unpatch",
]
