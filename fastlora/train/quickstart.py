"""The main job: QLoRA fine-tuning of the bundled model on the language reference, on a CPU.

Everything that can be wrong is found before training: the output directory is claimed, then
`Quickstart(options)` loads and patches the model. The loop is transformers' Trainer, as in a real
fine-tuning script: `patch_model` is the one line that such a script adds.
"""

from __future__ import annotations

import json
import math
import platform
import re
import resource
import shlex
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import fastlora
from fastlora import LoHaConfig, LoKrConfig, LoraConfig
from fastlora.adapters import AdapterConfig
from fastlora.dispatch import check_backend
from fastlora.integrations import causal_lm
from fastlora.nano import MODEL_DIR, corpus
from fastlora.train.options import QuickstartOptions
from fastlora.train.output import free_directory, staged_directory
from fastlora.train.precision import WHY_SLOW, slow_on_cpu
from fastlora.train.refusal import refusing
from fastlora.train.threads import fastest_threads

SAMPLE_TOKENS = 80
PROMPT_CHARACTERS = 100


@dataclass(frozen=True)
class Scores:
    """Held-out loss in nats per token of the base as loaded, as stored, and fine-tuned."""

    base: float
    quantized: float
    tuned: float


class Quickstart:
    """One run: data, and the patched model that it trains.

    Raises:
        ValueError: an option that the model, the adapter or the machine cannot take.
        NotImplementedError: no backend takes the problem.
    """

    def __init__(self, options: QuickstartOptions) -> None:
        self.options = options
        check_backend(options.backend)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "device cuda needs a CUDA build of PyTorch and a GPU, and torch sees none; "
                "use --device cpu"
            )
        self.dtype = torch.bfloat16
        if options.device == "cpu" and slow_on_cpu(self.dtype):
            self.dtype = torch.float32
        self.model, self.tokenizer = self._load()
        context = self.model.config.max_position_embeddings
        if options.sequence_length > context:
            raise ValueError(
                f"sequence_length must be at most the model's context of {context} tokens, "
                f"got {options.sequence_length}"
            )
        fastlora.patch_model(
            self.model,
            config_of(options),
            quantize=options.quantization,
            backend=options.backend,
            seed=options.seed,
        )
        texts = corpus.reference()
        self.held_out_topics = [d.name for d in texts.held_out]
        self.prompt = _prompt(max(texts.held_out, key=lambda d: len(d.text)).text)
        self.held_out = causal_lm.encode(self.tokenizer, [d.text for d in texts.held_out])
        ids = causal_lm.encode(self.tokenizer, [d.text for d in texts.train])
        rows = ids.numel() // options.sequence_length
        self.windows = ids[: rows * options.sequence_length].view(rows, -1)

    def run(self, console: Console, directory: Path) -> None:
        """Fine-tune, print what happened, and write the adapter and `run.json` to `directory`."""
        self._set_threads()
        base, _ = self._load()
        self._introduce(console, base)
        base_loss, before = self._loss(base), self._sample(base)
        _show_report(console, fastlora.report(self.model))
        stored_loss = self._loss(self.model)
        seconds = self._train(console, directory)
        scores = Scores(base_loss, stored_loss, self._loss(self.model))
        self._show(console, scores, before, self._sample(self.model), seconds)
        fastlora.save_adapter(self.model, directory)
        record = json.dumps(self._record(scores, seconds), indent=2)
        (directory / "run.json").write_text(record + "\n", encoding="utf-8")

    def _load(self) -> tuple[Any, Any]:
        return causal_lm.load(MODEL_DIR, self.dtype, self.options.device)

    def _set_threads(self) -> None:
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        elif self.options.device == "cpu":
            window = self.windows[:2]
            fastest_threads(lambda: self.model(input_ids=window, labels=window).loss.backward())
            self.model.zero_grad()

    def _loss(self, model: Any) -> float:
        return causal_lm.mean_loss(model, self.held_out, self.options.sequence_length)

    def _sample(self, model: Any) -> str:
        return causal_lm.sample(
            model, self.tokenizer, self.prompt, SAMPLE_TOKENS, self.options.seed
        )

    @property
    def _trained_tokens(self) -> int:
        return self.options.steps * self.options.batch_size * self.options.sequence_length

    def _introduce(self, console: Console, base: Any) -> None:
        parameters = sum(p.numel() for p in base.parameters())
        console.print(
            f"Fine-tuning the bundled Llama ({parameters / 1e6:.1f} M parameters, pre-trained on "
            f"the standard library's source) on the language reference of Python "
            f"{platform.python_version()}: {self.windows.numel():,} tokens, "
            f"{self.held_out.numel():,} held out ({', '.join(self.held_out_topics)}). "
            f"Threads: {torch.get_num_threads()}; numbers: {_name(self.dtype)}.",
            highlight=False,
            soft_wrap=True,
        )
        if self.dtype == torch.float32:
            console.print(f"Not in bfloat16: {WHY_SLOW}.", soft_wrap=True)

    def _train(self, console: Console, directory: Path) -> float:
        options = self.options
        recipe = causal_lm.Recipe(
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            seed=options.seed,
            device=options.device,
            work=directory,
        )
        columns = (
            TextColumn("training"),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("training", total=options.steps, loss=math.nan)

            def on_step(step: int, loss: float) -> None:
                progress.update(task, completed=step, loss=loss)

            return causal_lm.finetune(self.model, self.windows, recipe, on_step)

    def _show(
        self, console: Console, scores: Scores, before: str, after: str, seconds: float
    ) -> None:
        table = Table("held-out language reference", "loss", "perplexity", "against the base")
        rows = [("base model", scores.base), ("fine-tuned", scores.tuned)]
        if self.options.quantization:
            rows.insert(1, (f"base stored as {self.options.quantize}", scores.quantized))
        for name, loss in rows:
            change = f"{math.exp(loss - scores.base) - 1:+.1%}" if loss is not scores.base else ""
            table.add_row(name, f"{loss:.3f}", f"{math.exp(loss):.2f}", change)
        console.print(table)
        for title, text in (("prompt", self.prompt), ("base", before), ("fine-tuned", after)):
            console.rule(title, align="left")
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        console.rule()
        rate = self._trained_tokens / seconds
        console.print(
            f"{self._trained_tokens:,} tokens in {seconds:.1f} s: {rate:,.0f} tokens per second; "
            f"peak memory {_peak_bytes() / 2**20:,.0f} MiB, the whole process with PyTorch.",
            highlight=False,
            soft_wrap=True,
        )

    def _record(self, scores: Scores, seconds: float) -> dict[str, Any]:
        options = {k: v for k, v in asdict(self.options).items() if k != "output"}
        return {
            "options": options,
            "held_out_loss": asdict(scores),
            "held_out_perplexity": {k: math.exp(v) for k, v in asdict(scores).items()},
            "held_out_topics": self.held_out_topics,
            "train_seconds": seconds,
            "tokens_per_second": self._trained_tokens / seconds,
            "peak_memory_bytes": _peak_bytes(),
            "threads": torch.get_num_threads(),
            "dtype": _name(self.dtype),
            "fastlora": fastlora.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }


def config_of(options: QuickstartOptions) -> AdapterConfig:
    """Return the adapter's config for the method that was asked for; alpha is twice the rank."""
    r = options.rank
    if options.method == "loha":
        return LoHaConfig(r=r, alpha=2 * r)
    if options.method == "lokr":
        return LoKrConfig(r=r, alpha=2 * r)
    return LoraConfig(r=r, lora_alpha=2 * r, use_dora=options.method == "dora")


def _show_report(console: Console, report: dict[str, Any]) -> None:
    """Print `fastlora.report`, the layers that are alike in one row."""
    keys = ("method", "r", "format", "backend", "shape")
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row in report["modules"]:
        name = re.sub(r"^.*\.\d+\.", "", row["module"])
        groups.setdefault((name, *(row[key] for key in keys)), []).append(row["bytes"])
    table = Table("patched", *keys, "layers", "KiB", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for (name, *cells, shape), sizes in groups.items():
        size = f"{shape[0]} x {shape[1]}"
        table.add_row(name, *map(str, cells), size, str(len(sizes)), f"{sum(sizes) / 1024:,.0f}")
    console.print(table)
    for name, why in report["skipped"].items():
        console.print(f"skipped {name}: {why}", markup=False, highlight=False)
    totals = report["totals"]
    console.print(
        f"{totals['trainable_params']:,} of {totals['all_params']:,} parameters are trained; "
        f"the model takes {totals['bytes_before'] / 2**20:.1f} MiB before and "
        f"{totals['bytes_after'] / 2**20:.1f} MiB now.",
        highlight=False,
        soft_wrap=True,
    )


def _prompt(text: str) -> str:
    """Return the first paragraphs of `text`, at least `PROMPT_CHARACTERS` long."""
    end = text.find("\n\n", PROMPT_CHARACTERS)
    return text if end < 0 else text[:end]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _how_to_load(directory: Path) -> str:
    return (
        f"The adapter is in {shlex.quote(str(directory))}. PEFT loads it:\n\n"
        "    from peft import PeftModel\n"
        "    from transformers import AutoModelForCausalLM\n"
        "    from fastlora.nano import MODEL_DIR\n\n"
        "    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)\n"
        f"    model = PeftModel.from_pretrained(model, {str(directory)!r})"
    )


def quickstart(**options: Any) -> Path:
    """Run on standard output and return the new adapter directory.

    Args:
        options: the fields of `QuickstartOptions`.

    Raises:
        Refusal: bad input; nothing was trained and nothing written.
    """
    console = Console()
    with ExitStack() as stack:
        with refusing():
            checked = QuickstartOptions(**options)
            output = checked.output or free_directory("quickstart")
            directory = stack.enter_context(staged_directory(output))
            job = Quickstart(checked)
        job.run(console, directory)
    console.print(_how_to_load(output), markup=False, highlight=False, soft_wrap=True)
    return output
