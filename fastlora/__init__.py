"""Fused 4-bit and low-rank layers for fine-tuning large models: the public names."""

from fastlora.adapters.lora import LoraConfig
from fastlora.checkpoint import load_adapter, save_adapter
from fastlora.ops import lora_linear
from fastlora.patch import merge, patch_model, unpatch
from fastlora.quant import QuantConfig, QuantizedWeight, quantize_4bit
from fastlora.report import report

__version__ = "0.1.0"
__all__ = [
    "LoraConfig",
    "QuantConfig",
    "QuantizedWeight",
    "__version__",
    "load_adapter",
    "lora_linear",
    "merge",
    "patch_model",
    "quantize_4bit",
    "report",
    "save_adapter",
    "unpatch",
]
