"""Preference tuning with TRL's DPOTrainer; the reference is the model without its adapter."""

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import fastlora
from fastlora.nano import MODEL_DIR

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
steps, gpu = parser.parse_args().steps, torch.cuda.is_available()

tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="bfloat16" if gpu else "float32")
adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = fastlora.patch_model(get_peft_model(model, adapter))

names = ["len", "abs", "min", "max", "sum", "sorted", "repr", "hash", "ord", "chr"]
rows = [
    {"prompt": f"x = {name}", "chosen": "(values)\n", "rejected": " of the values\n"}
    for name in names * 16
]
with tempfile.TemporaryDirectory() as directory:
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            directory,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            beta=0.1,
            logging_steps=max(1, steps // 4),
            save_strategy="no",
            report_to=[],
            bf16=gpu,
            use_cpu=not gpu,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
entries = [entry for entry in trainer.state.log_history if "loss" in entry]
first, last = entries[0], entries[-1]
print(f"loss {first['loss']:.3f} -> {last['loss']:.3f}")
print(f"chosen preferred in {last['rewards/accuracies']:.0%} of the last batches")
