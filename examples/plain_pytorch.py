"""4-bit LoRA in a plain PyTorch loop: an nn.Module learns the digits of scikit-learn's set."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastlora

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
steps = parser.parse_args().steps

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU())
model.append(nn.Linear(256, 10))

config = fastlora.LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2"], modules_to_save=["4"])
fastlora.patch_model(model, config, quantize="nf4")
print(fastlora.report(model))

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
for _ in range(steps):
    rows = torch.randint(1500, (128,))
    loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

with torch.no_grad():
    accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
print(f"loss {loss:.3f}, accuracy on {len(y) - 1500} held-out images {accuracy:.3f}")
