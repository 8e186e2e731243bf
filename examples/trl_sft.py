"""Instruction tuning with TRL's SFTTrainer, loss on the answers only, on a 4-bit PEFT model."""

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import fastlora
from fastlora.nano import MODEL_DIR

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
steps, gpu = parser.parse_args().steps, torch.cuda.is_available()

tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
tokenizer.chat_template = (
    "{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }}\n"
    "{% else %}{% generation %}Answer: {{ m.content }}{{ eos_token }}\n{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="bfloat16" if gpu else "float32")
adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = fastlora.patch_model(get_peft_model(model, adapter))

names = ["len", "abs", "min", "max", "sum", "sorted", "repr", "hash", "ord", "chr"]
rows = [
    [
        {"role": "user", "content": f"Which function is called by {name}(x)?"},
        {"role": "assistant", "content": f"The built-in function {name}."},
    ]
    for name in names * 16
]
with tempfile.TemporaryDirectory() as directory:
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            directory,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            max_length=64,
            assistant_only_loss=True,
            logging_steps=max(1, steps // 4),
            save_strategy="no",
            report_to=[],
            bf16=gpu,
            use_cpu=not gpu,
        ),
        train_dataset=Dataset.from_dict({"messages": rows}),
        processing_class=tokenizer,
    )
    trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
