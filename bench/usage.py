"""What lies around training steps: text generation, the import, and the patch itself."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import fastlora
from bench import common, models

NEW = 24
PROMPT = 16


def generate(device: str, dtype: str, seconds: float) -> list[dict[str, Any]]:
    """Greedy text generation of the 1B shape, one sequence: bitsandbytes, dense and ours."""
    wanted, dense = getattr(torch, dtype), {"bfloat16": "bf16"}.get(dtype, dtype)
    made = {
        "bnb": models.build("1B", "bnb", device, wanted),
        dense: models.build("1B", "dense", device, wanted),
        "ours": fastlora.patch_model(models.build("1B", "bnb", device, wanted)),
    }
    tokens = torch.randint(8192, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], object]] = {}
    for name, model in made.items():
        runs[name] = _decoder(model.eval(), tokens.to(device))
    rates = {
        name: NEW / common.summary(times)["ms_p50"] * 1e3
        for name, times in common.interleaved(runs, seconds, device).items()
    }
    targets = {"bnb": 1.5, dense: 2.5}
    return [
        {
            "name": f"generate-1B-{other}",
            "dtype": dtype,
            "other_tokens_s": round(rates[other], 2),
            "ours_tokens_s": round(rates["ours"], 2),
            "times": round(rates["ours"] / rates[other], 3),
            "target": target,
        }
        for other, target in targets.items()
    ]


def _decoder(model: Any, tokens: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return model.generate(
                tokens, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
            )

    return run


def import_seconds(repeats: int = 5) -> dict[str, Any]:
    """The least time that `import fastlora` takes after torch, in fresh processes."""
    code = (
        "import time, torch; start = time.perf_counter(); import fastlora;"
        "print(time.perf_counter() - start)"
    )
    runs = [
        float(subprocess.check_output([sys.executable, "-c", code], text=True))
        for _ in range(repeats)
    ]
    return {"name": "import", "seconds": round(min(runs), 3), "at_most": 0.3}


def patch_seconds() -> dict[str, Any]:
    """The time of `patch_model` with LoRA on the 1B shape, without quantising."""
    model = models.build("1B", "dense", "cpu")
    gc.collect()
    start = time.perf_counter()
    fastlora.patch_model(model, fastlora.LoraConfig(r=16))
    seconds = time.perf_counter() - start
    return {"name": "patch-1B", "seconds": round(seconds, 3), "at_most": 3.0}
