"""A tokenizer, rows of data and models for the trainers, all made here: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

TEXT = "a small model reads many short lines and learns which word comes next in each of them"
WORDS = [*TEXT.split(), "yes", "no", "good", "bad", "question", "answer"]
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<user>", "<bot>")
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} {% else %}<bot>"
    " {% generation %}{{ m.content }} </s> {% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tokenizer() -> Any:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys((*SPECIAL, *WORDS)))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<user>", "<bot>"],
        model_max_length=64,
    )
    made.chat_template = CHAT
    return made


def llama(dtype: torch.dtype = torch.float32, cls: str = "LlamaForCausalLM", **more: Any) -> Any:
    """A tiny Llama whose vocabulary is the tokenizer's, in training mode."""
    import transformers

    words = tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        **more,
    )
    torch.manual_seed(0)
    return getattr(transformers, cls)(config).to(dtype).train()


def to_bnb(model: Any, dtype: torch.dtype) -> Any:
    """The model with bitsandbytes' 4-bit linears, NF4 double-quantised, but for the head."""
    import bitsandbytes as bnb

    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and not name.endswith(("lm_head", "score")):
            n, k = linear.weight.shape
            four = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4")
            weight = linear.weight.detach()
            four.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, four.to("cpu"))
    model.is_loaded_in_4bit = True  # what PEFT asks a transformers model
    return model


def peft_model(model: Any, method: str = "lora", **fields: Any) -> Any:
    """PEFT's model with adapters on every linear but the head."""
    import peft

    common: dict[str, Any] = {"r": 4, "target_modules": TARGETS, **fields}
    if method in ("lora", "dora"):
        common |= {"lora_alpha": 8, "use_dora": method == "dora"}
        config: Any = peft.LoraConfig(**common)
    else:
        config = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[method](alpha=8, **common)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).train()


def sentence(i: int, length: int) -> str:
    """Words one after the other, from the i-th on."""
    return " ".join(WORDS[(i + j) % len(WORDS)] for j in range(length))


def lines(count: int = 32) -> Any:
    """Rows of plain text."""
    from datasets import Dataset

    return Dataset.from_list([{"text": sentence(i, 6 + i % 5)} for i in range(count)])


def chats(count: int = 32) -> Any:
    """Rows of messages."""
    from datasets import Dataset

    rows = [
        [
            {"role": "user", "content": sentence(i, 4)},
            {"role": "assistant", "content": sentence(i + 4, 3)},
        ]
        for i in range(count)
    ]
    return Dataset.from_dict({"messages": rows})


def preferences(count: int = 32) -> Any:
    """Rows of a prompt with a chosen and a rejected completion."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"prompt": sentence(i, 4), "chosen": " good yes", "rejected": " bad no"}
            for i in range(count)
        ]
    )


def arguments(directory: Path, steps: int, **more: Any) -> dict[str, Any]:
    """Fields that every trainer's config gets."""
    return {
        "output_dir": str(directory),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 0,
        **more,
    }


def losses(trainer: Any) -> list[float]:
    """The logged losses, step by step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
