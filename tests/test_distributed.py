"""Two processes train what one does: DistributedDataParallel, and FSDP2 with 4-bit shards."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from fastlora import LoHaConfig, LoKrConfig, LoraConfig, load_adapter, patch_model, save_adapter
from fastlora.adapters import AdapterConfig

CONFIGS = {
    "lora": LoraConfig(r=4, init_lora_weights=False),
    "dora": LoraConfig(r=4, init_lora_weights=False, use_dora=True),
    "loha": LoHaConfig(r=2, init_weights=False),
    "lokr": LoKrConfig(r=40, init_weights=False),
}
X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))


def make(config: AdapterConfig) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    return patch_model(model, config, quantize="nf4")


def step(model: Any, x: Tensor) -> Any:
    """One step of training; return what the trained model computes without a graph."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return model(x)


def sharded(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def work(rank: int, wrapper: str, port: int, directory: Path) -> None:
    """Train half of the rows with every method; write the outputs."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    wrap = DistributedDataParallel if wrapper == "ddp" else sharded
    outputs = {n: step(wrap(make(c)), X[4 * rank : 4 * rank + 4]) for n, c in CONFIGS.items()}
    torch.save(outputs, directory / f"{rank}.pt")
    if wrapper == "fsdp2":
        save_adapter(sharded(make(CONFIGS["lora"])), directory / "adapter")
    distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(wrapper: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(work, (wrapper, port, tmp_path), 2)
    if wrapper == "fsdp2":
        model = make(LoraConfig(r=4))
        load_adapter(model, tmp_path / "adapter")
        torch.testing.assert_close(model(X), make(CONFIGS["lora"])(X))
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, config in CONFIGS.items():
        whole = torch.cat([half[name] for half in halves])
        torch.testing.assert_close(whole, step(make(config), X), rtol=1e-4, atol=1e-5)
