"""4-bit LoRA in a LightningModule: patch the model where it is made, the Trainer stays as it is."""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastlora

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
steps = parser.parse_args().steps


class Digits(lightning.LightningModule):
    """A classifier of scikit-learn's digits whose base is frozen and stored in 4 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))
        config = fastlora.LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2"])
        fastlora.patch_model(self.model, config, quantize="nf4")
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3)


lightning.seed_everything(0, verbose=False)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
module = Digits()
trainer = lightning.Trainer(
    max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False
)
trainer.fit(module, DataLoader(data, batch_size=128, shuffle=True))
print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")
