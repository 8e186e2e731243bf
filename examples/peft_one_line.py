"""An existing PEFT script made faster by one line; everything else is as it was."""

import argparse
import tempfile
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora
from fastlora.nano import MODEL_DIR

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
steps = parser.parse_args().steps

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32")
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
fastlora.patch_model(model)  # the one line

text = "\n\n".join(text for _, text in sorted(topics.items()))
tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
windows = tokens[: len(tokens) // 128 * 128].view(-1, 128)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
losses = []
for _ in range(steps):
    batch = windows[torch.randint(len(windows), (8,))]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)  # PEFT's own files
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32")
    loaded = PeftModel.from_pretrained(base, directory)
with torch.no_grad():
    model.eval()
    gap = (loaded(batch).logits - model(batch).logits).abs().max()
print(f"logits without fastlora differ by {gap:.3f} at most")
