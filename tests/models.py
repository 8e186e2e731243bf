"""Small models that tests patch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.adapters import AdapterConfig


class Block(nn.Module):
    """A residual block with two linears."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return x + y


class Plain(nn.Module):
    """A plain PyTorch model: two blocks and a head."""

    def __init__(self, width: int = 32, classes: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.head(self.norm(x))
        return y


def plain(seed: int = 0, dtype: torch.dtype = torch.float32) -> Plain:
    """Return the plain model with fixed weights, in eval mode."""
    torch.manual_seed(seed)
    return Plain().to(dtype).eval()


def llama(tied: bool = False, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny Llama built from a config, without any file, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    cls = changes.pop("cls", LlamaForCausalLM)
    return cls(LlamaConfig(**{**settings, **changes})).eval()


def peft_model(model: nn.Module, config: AdapterConfig, **fields: Any) -> Any:
    """Return PEFT's model for a config of ours, with these fields of PEFT's beside."""
    import peft

    config_class = getattr(peft, type(config).__name__)
    return peft.get_peft_model(model, config_class(**{**config.changed_fields(), **fields}))


def fill_adapters(model: nn.Module, seed: int = 1) -> None:
    """Give every trainable parameter a value, so that an adapter changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
