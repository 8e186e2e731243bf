"""Llama models of a given shape with random weights, built layer by layer, and their adapters."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastlora

R, ALPHA = 16, 32


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {
    "110M": Shape(12, 768, 2560, 12, 12, 8192),
    "1B": Shape(16, 2048, 8192, 32, 8, 8192),
    "Llama-3.2-1B": Shape(16, 2048, 8192, 32, 8, 128256),
    "Llama-3-8B": Shape(32, 4096, 14336, 32, 8, 128256),
    "Llama-3-70B": Shape(80, 8192, 28672, 64, 8, 128256),
    "tiny": Shape(2, 64, 128, 4, 2, 128),
}


def build(name: str, base: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A LlamaForCausalLM of that dtype, its decoder's linears "dense", "bnb" or "nf4" (fastlora's).

    Layers are made and converted one by one on the device, so that no more than one of them is ever
    there in full.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    shape = SHAPES[name]
    config = LlamaConfig(
        num_hidden_layers=0,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
        dtype=str(dtype).removeprefix("torch."),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
        model.config.num_hidden_layers = shape.layers
        for i in range(shape.layers):
            layer = LlamaDecoderLayer(model.config, i).to(dtype)
            for parameter in layer.parameters():
                if parameter.dim() == 2:
                    parameter.data.normal_(std=0.02)
            convert(layer, base, device)
            model.model.layers.append(layer)
    model.is_loaded_in_4bit = base == "bnb"  # what PEFT asks a transformers model
    gc.collect()
    return model.train()


def convert(layer: nn.Module, base: str, device: str) -> None:
    """Store the linears of a layer as `base` says."""
    if base == "nf4":
        config = fastlora.LoraConfig(r=R, lora_alpha=ALPHA)
        fastlora.patch_model(layer, config, quantize="nf4")
    if base != "bnb":
        return
    import bitsandbytes as bnb

    for name, linear in list(layer.named_modules()):
        if isinstance(linear, nn.Linear):
            n, k = linear.weight.shape
            four = bnb.nn.Linear4bit(
                k, n, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta"
            )
            weight = linear.weight.detach()
            four.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            layer.set_submodule(name, four.to(device))


def adapted(model: Any, method: str) -> Any:
    """The model wrapped by PEFT with its defaults, adapters on every linear but the head."""
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if method in ("lora", "dora"):
        config: Any = peft.LoraConfig(
            r=R, lora_alpha=ALPHA, target_modules=targets, use_dora=method == "dora"
        )
    else:
        kind = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[method]
        config = kind(r=R // 2, alpha=ALPHA // 2, target_modules=targets)
    return peft.get_peft_model(model, config).train()


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the decoder's frozen linear weights, with what 4-bit ones need to be decoded."""
    total = 0
    for _, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or weight is None or weight.requires_grad:
            continue
        total += weight.nbytes + sum(b.nbytes for b in module.buffers(recurse=False))
        state = getattr(weight, "quant_state", None)
        if state is not None:
            parts = [state.absmax, getattr(state.state2, "absmax", None)]
            total += sum(t.nbytes for t in parts if t is not None)
    return total
