"""What a finished run leaves: weights, scores, the page."""

from __future__ import annotations

import platform
import resource
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fastlora
from fastlora.patch import RECORD
from fastlora.train import directory, page
from fastlora.train.models import parameter_counts
from fastlora.train.tasks.base import Evaluation

if TYPE_CHECKING:
    from fastlora.train.run import Run
    from fastlora.train.trainer import Tuner

_PACKAGES = ("torch", "transformers", "peft", "triton", "bitsandbytes", "safetensors")


def write(run: Run, output: Path, trainer: Tuner, after: Evaluation, audit: dict[str, Any]) -> None:
    """Write weights, page and, last, metrics.json: with it the run is finished."""
    weights = output / directory.WEIGHTS
    weights.mkdir(exist_ok=True)
    if run.caches is not None:
        run.model.config.use_cache = run.caches
    run.strategy.save(run.model, weights)
    run.task.save(weights)
    log = directory.read_log(output / directory.LOG)
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    metrics = collect(run, log, after, audit, trainer)
    metrics["checkpoint_bytes"] = sum(f.stat().st_size for f in weights.iterdir() if _is_model(f))
    found = [*run.data.report.lines(), *after.notes]
    html = page.run_page(metrics, log, evaluations, run.before, after, found, patch_rows(run.model))
    directory.write_whole(output / directory.REPORT, html)
    directory.write_json(output / directory.METRICS, metrics)


def _is_model(file: Path) -> bool:
    return file.suffix == ".safetensors" or file.name.endswith("config.json")


def collect(
    run: Run, log: list[dict[str, Any]], after: Evaluation, audit: dict[str, Any], trainer: Tuner
) -> dict[str, Any]:
    """Return the content of metrics.json."""
    trained, total = parameter_counts(run.model)
    seconds = sum(row.get("seconds") or 0.0 for row in log)
    tokens = sum(row.get("tokens") or 0 for row in log)
    return {
        "model": run.config.model,
        "task": run.config.task,
        "method": run.config.method,
        "quantize": run.config.quantize,
        "base": run.before.scores,
        "tuned": after.scores,
        "notes": after.notes,
        "retained": run.retained(),
        "retain_perplexity": run.forgetting(),
        "trainable_parameters": trained,
        "total_parameters": total,
        "steps": trainer.state.global_step,
        "skipped_steps": sum(bool(row.get("skipped")) for row in log),
        "batch_size": run.arguments.per_device_train_batch_size,
        "best_step": trainer.state.best_global_step,
        "train_seconds": seconds,
        "seconds": trainer.seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else None,
        "peak_memory_bytes": peak_bytes(),
        "seed": run.config.seed,
        "audit": audit,
        "data": vars(run.data.report),
        "versions": versions(),
        "git_revision": git_revision(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def peak_bytes() -> int:
    """Return the most memory that was used: of the GPU, or of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    """Return the versions of fastlora and of what it stands on."""
    found = {"fastlora": fastlora.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Return the revision of the repository that the run was started in; None: it is in none."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def patch_rows(model: Any) -> dict[str, Any] | None:
    """Return fastlora's report on the part of a model that is patched; None: none is."""
    patched = next((part for part in model.modules() if RECORD in vars(part)), None)
    return None if patched is None else dict(fastlora.report(patched))
