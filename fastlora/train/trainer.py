"""transformers' Trainer with safe checkpoints, one loss per step and no silent NaN."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_length_grouped_indices

from fastlora.train import checkpoints
from fastlora.train.arguments import Extras, refused_options
from fastlora.train.groups import parameter_groups
from fastlora.train.nonfinite import Watch
from fastlora.train.refusal import Refusal
from fastlora.train.strategies.base import load_state, trained_state
from fastlora.train.tasks.base import Evaluation, Task

_WEIGHTS, _STATE, _SCALER = "trained.safetensors", "trainer_state.json", "scaler.json"
_SCHEDULER, _SECONDS = "scheduler.json", "seconds.json"
_PLACES = "_places"  # key of a batch: where its rows stand in the data


class Tuner(transformers.Trainer):  # type: ignore[misc]
    """A Trainer for a task.

    Attributes:
        task: what is trained.
        extras: options that TrainingArguments does not have.
        watch: counts the steps that were skipped.
        tokens: of the present step, so far.
        seconds: of training, with evaluation and checkpoints, before a resumption included.
    """

    def __init__(
        self,
        task: Task,
        extras: Extras,
        head: list[str],
        on_loss: Callable[[dict[str, Any]], None],
        **options: Any,
    ) -> None:
        self.task, self.extras, self.head, self.on_loss = task, extras, head, on_loss
        self.control: Any
        self.optimizer: Any
        self.lr_scheduler: Any
        self.watch = Watch(extras.max_bad_steps)
        self.tokens, self.step_loss, self.norm = 0, 0.0, math.nan
        self.seconds, self._began = 0.0, time.perf_counter()
        super().__init__(data_collator=self._collate, **options)

    def _collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.task.collate(examples), _PLACES: [e.get("place", "") for e in examples]}

    def rehearse(self) -> None:
        """Make what training makes of the options, once, and forget it.

        Raises:
            Refusal: an option is wrong, or no batch can be made.
        """
        state = torch.get_rng_state()
        with refused_options():
            batches = len(self.get_train_dataloader())
            if not batches:
                raise Refusal(
                    "train.per_device_train_batch_size must be at most the number of training rows,"
                    f" {len(self.train_dataset)}, where train.dataloader_drop_last is true"
                )
            self.create_optimizer()
            self.create_scheduler(num_training_steps=batches)
        self.optimizer = self.lr_scheduler = None
        self._created_lr_scheduler = False
        torch.set_rng_state(state)

    def train(self, *args: Any, **options: Any) -> Any:
        """Train, and count the seconds."""
        self._began = time.perf_counter()
        try:
            return super().train(*args, **options)
        finally:
            self.seconds = self._seconds_so_far()

    def _seconds_so_far(self) -> float:
        return self.seconds + time.perf_counter() - self._began

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kw: Any
    ) -> Tensor:
        """Run a step, and keep its loss; one that is not finite counts as nothing."""
        self.watch.places = inputs.pop(_PLACES, [])
        self.watch.batch = inputs
        self.tokens += self.task.tokens_of(inputs)
        loss: Tensor = super().training_step(model, inputs, *args, **kw)
        value = float(loss)
        self.step_loss += value
        return loss if math.isfinite(value) else torch.zeros_like(loss)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        """Return the model's loss; the Trainer has just set the training mode."""
        if model.training:
            freeze_statistics(model)
        return super().compute_loss(model, inputs, *args, **kw)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Look at the gradients of a step before the optimizer does.

        Raises:
            Diverged: too many steps in a row were not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
        self.norm = float(norm)
        fine = math.isfinite(self.norm) and math.isfinite(self.step_loss)
        step, rate = self.state.global_step + 1, self._get_learning_rate()
        row = {
            "step": step,
            "loss": self.step_loss,
            "learning_rate": rate,
            "grad_norm": self.norm,
            "tokens": self.tokens,
        }
        if not fine:
            row.update(loss=None, grad_norm=None, skipped=True)
        self.on_loss(row)
        self.step_loss, self.tokens = 0.0, 0
        self.watch.see(fine, step, rate, model)
        return self.norm if fine else 0.0

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log, but never a loss of steps that were skipped."""
        skipped = self.watch.take_skipped()
        if skipped and "loss" in logs:
            every = self.args.logging_steps if self.args.logging_steps >= 1 else skipped
            if skipped >= every:
                logs.pop("loss"), logs.pop("grad_norm", None)
            else:
                logs["loss"] *= every / (every - skipped)
            logs["skipped_steps"] = skipped
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the order of the rows, which is a function of seed and epoch alone."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        examples = self.train_dataset if train_dataset is None else train_dataset
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ByLength([len(example["input_ids"]) for example in examples], size, seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer, with a learning rate for each block and for lora_B."""
        if self.optimizer is None:
            owner = self.model if model is None else model
            groups = parameter_groups(
                owner,
                self.args.learning_rate,
                self.args.weight_decay,
                self.extras,
                self.head,
                set(self.get_decay_parameter_names(owner)),
            )
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, owner)
            self.optimizer = kind(groups, **options)
        made: torch.optim.Optimizer = self.optimizer
        return made

    def evaluate(self, dataset: Any = None, *_: Any, **__: Any) -> dict[str, float]:
        """Score the validation rows, and log it."""
        chosen = self.eval_dataset if dataset is None else dataset
        found = self.scores_of(chosen)
        metrics = {f"eval_{name}": value for name, value in found.scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def scores_of(self, examples: Any) -> Evaluation:
        """Return the task's scores of the model as it is."""
        batch_size = self.args.per_device_eval_batch_size
        with self.accelerator.autocast():
            return self.task.evaluate(self.model, examples, batch_size)

    def take_ended(self, checkpoint: Path) -> bool:
        """Take the weights of a run that ended with this checkpoint; say whether it did.

        It ended after its last step, or early; the best weights are taken where they are asked for.
        """
        state = transformers.TrainerState.load_from_json(str(checkpoint / _STATE))
        if state.global_step < state.max_steps and not _stopped_early(state):
            return False
        self.state, self.seconds = state, _read_json(checkpoint, _SECONDS)
        self._find_best()
        if not self.args.load_best_model_at_end or state.best_model_checkpoint is None:
            self._load_from_checkpoint(str(checkpoint))
        else:
            self._load_best_model()
        return True

    def _find_best(self) -> None:
        """Say where the best checkpoint is: beside the others, wherever they were written."""
        step, self.state.best_model_checkpoint = self.state.best_global_step, None
        path = Path(self.args.output_dir) / f"{checkpoints.PREFIX}{step}"
        if step and (path.exists() or step == self.state.global_step):
            self.state.best_model_checkpoint = str(path)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write everything that a resumed run needs, so that it is whole or absent."""
        root, step = Path(self.args.output_dir), self.state.global_step
        self._find_best()
        for part in [*self.callback_handler.callbacks, self.control]:
            if isinstance(part, ExportableState):
                self.state.stateful_callbacks[type(part).__name__] = part.state()
        trained = {k: v.detach().cpu().contiguous() for k, v in trained_state(self.model).items()}
        scaler = getattr(self.accelerator, "scaler", None)
        files = {
            _WEIGHTS: save(trained),
            **checkpoints.pack_optimizer(self.optimizer),
            **checkpoints.pack_random(),
            _SCHEDULER: _json(self.lr_scheduler.state_dict()),
            _STATE: _json({**vars(self.state)}),
            _SECONDS: _json(self._seconds_so_far()),
            _SCALER: _json(None if scaler is None else scaler.state_dict()),
        }
        checkpoints.write(root, step, files)
        best_path = self.state.best_model_checkpoint
        checkpoints.rotate(root, self.args.save_total_limit, Path(best_path) if best_path else None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        files = checkpoints.read(Path(resume_from_checkpoint), _WEIGHTS)
        load_state(self.model if model is None else model, load(files[_WEIGHTS]))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._find_best()
            self.seconds = _read_json(Path(checkpoint), _SECONDS)
            files = checkpoints.read(Path(checkpoint), *checkpoints.OPTIMIZER, _SCHEDULER)
            checkpoints.unpack_optimizer(self.optimizer, files)
            self.lr_scheduler.load_state_dict(json.loads(files[_SCHEDULER]))

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None:
            scaler.load_state_dict(_read_json(Path(checkpoint), _SCALER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.unpack_random(checkpoints.read(Path(checkpoint), *checkpoints.RANDOM))


class ByLength(Sampler[int]):
    """Rows of like length together, in an order that a resumed run finds again.

    Attributes:
        lengths: tokens of each row.
        size: rows per optimizer step.
        seed: of the order.
        epoch: the order of each is another.
    """

    def __init__(self, lengths: list[int], size: int, seed: int) -> None:
        self.lengths, self.size, self.seed, self.epoch = lengths, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.size, generator=generator))


def _stopped_early(state: Any) -> bool:
    entry = state.stateful_callbacks.get("EarlyStoppingCallback", {})
    counted: int = entry.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return bool(entry) and counted >= entry["args"]["early_stopping_patience"]


def _read_json(checkpoint: Path, name: str) -> Any:
    return json.loads(checkpoints.read(checkpoint, name)[name])


def _json(value: Any) -> bytes:
    return json.dumps(value, default=_plain, sort_keys=True).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return str(value)


def learns_statistics(model: nn.Module) -> bool:
    """Return whether a batch norm of the model is trained."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return any(p.requires_grad for norm in norms for p in norm.parameters(recurse=False))


def freeze_statistics(model: nn.Module) -> None:
    """Keep the running statistics of normalisations whose weights are frozen."""
    for module in model.modules():
        frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and frozen:
            module.eval()
