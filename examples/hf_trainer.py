"""4-bit LoRA with transformers' Trainer: the bundled Llama learns the Python reference."""

import argparse
import tempfile
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import fastlora
from fastlora.nano import MODEL_DIR

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
steps, gpu = parser.parse_args().steps, torch.cuda.is_available()

tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="bfloat16" if gpu else "float32")
fastlora.patch_model(model, fastlora.LoraConfig(r=8, lora_alpha=16), quantize="nf4")

texts = Dataset.from_dict({"text": [text for _, text in sorted(topics.items())]})
rows = texts.map(
    lambda row: tokenizer(row["text"], truncation=True, max_length=128), remove_columns="text"
)
split = rows.train_test_split(0.1, seed=0)
with tempfile.TemporaryDirectory() as directory:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            directory,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            gradient_checkpointing=True,
            logging_steps=max(1, steps // 4),
            save_strategy="no",
            report_to=[],
            bf16=gpu,
            use_cpu=not gpu,
        ),
        train_dataset=split["train"],
        eval_dataset=split["test"],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    fastlora.save_adapter(model, f"{directory}/adapter")  # PEFT loads it
print(f"held-out loss {before:.3f} -> {after:.3f}")
