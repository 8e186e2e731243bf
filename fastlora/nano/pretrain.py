"""Pre-train the bundled model: `python -m fastlora.nano.pretrain --help`.

A Llama of 4.6 M parameters on `corpus.pretraining()`: a byte-level BPE of 4096 tokens, windows
in an order fixed by the seed, Muon for the hidden matrices and AdamW for the rest, a constant
learning rate that falls to zero over the last `--decay` of the steps, bfloat16 autocast.
Stops and starts from the checkpoint in `--work`: run the same command again.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.integrations import causal_lm
from fastlora.nano import MODEL_DIR
from fastlora.nano.corpus import Document, pretraining

END = "<|endoftext|>"
VOCAB = 4096
CONTEXT = 512
LAYERS = 6


def train_tokenizer(documents: list[Document], path: Path) -> None:
    """Write a byte-level BPE of `VOCAB` tokens, trained on `documents`, to `path`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    tokenizer.save(str(path))


def build_model(end: int) -> Any:
    """Return a randomly initialised Llama of the bundled shape, float32; `end` is its eos token."""
    model = causal_lm.new_llama(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.div_(math.sqrt(2 * LAYERS))
    return model


def batches(ids: Tensor, batch: int, length: int, seed: int, skip: int) -> Iterator[Tensor]:
    """Yield (batch, length) windows for ever, each epoch shifted and shuffled, from step `skip`."""
    step = 0
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        shift = int(torch.randint(length, (), generator=generator))
        rows = (ids.numel() - shift) // length
        order = torch.randperm(rows, generator=generator)
        for start in range(0, rows - batch + 1, batch):
            if step >= skip:
                picked = order[start : start + batch] * length + shift
                yield ids[picked[:, None] + torch.arange(length)]
            step += 1
        epoch += 1


def optimizers(model: Any, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the hidden matrices and AdamW for embeddings and norms."""
    hidden: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (hidden if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def rate(step: int, steps: int, decay: float, warmup: int = 50) -> float:
    """Return the factor on the learning rate: warm-up, constant, then linear to zero."""
    tail = max(1, int(steps * decay))
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / tail))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastlora.nano.pretrain", description=__doc__)
    parser.add_argument("--output", type=Path, default=MODEL_DIR, help="where the model goes")
    parser.add_argument("--work", type=Path, required=True, help="checkpoint and corpus cache")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--length", type=int, default=CONTEXT, help="tokens per window")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.5, help="share of the steps that decay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile")
    return parser.parse_args()


def _corpus(work: Path) -> tuple[Any, Tensor, Tensor]:
    """Return tokenizer, training ids and held-out ids, from the cache in `work` if there."""
    cache, vocabulary = work / "corpus.pt", work / "tokenizer.json"
    if not cache.exists():
        split = pretraining()
        train_tokenizer(split.train, vocabulary)
        tokenizer = causal_lm.tokenizer_of(vocabulary, END, CONTEXT)
        ids = [
            causal_lm.encode(tokenizer, [d.text for d in side])
            for side in (split.train, split.held_out)
        ]
        torch.save(ids, cache)
    train, held_out = torch.load(cache)
    return causal_lm.tokenizer_of(vocabulary, END, CONTEXT), train, held_out


def main() -> None:
    """Run or continue the pre-training."""
    options = _options()
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit(f"pre-training needs torch >= 2.9 for its Muon, got {torch.__version__}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer, ids, held_out = _corpus(options.work)
    print(f"Python {platform.python_version()}: {ids.numel()} tokens, {held_out.numel()} held out")
    model = build_model(tokenizer.eos_token_id)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    _train(model, ids, held_out, options)
    model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    for path in options.output.iterdir():
        path.chmod(0o644)


@dataclass
class _State:
    """Model, optimizers and progress: what a checkpoint holds."""

    model: Any
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the checkpoint under another name, then rename it."""
        partial = path.with_suffix(".tmp")
        torch.save(
            {
                "step": self.step,
                "seconds": self.seconds,
                "model": self.model.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
            },
            partial,
        )
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on where the checkpoint stopped."""
        saved = torch.load(path)
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)


def _train(model: Any, ids: Tensor, held_out: Tensor, options: argparse.Namespace) -> None:
    """Train `model` in place up to `options.steps`."""
    state = _State(model, optimizers(model, options.lr))
    checkpoint = options.work / "checkpoint.pt"
    if checkpoint.exists():
        state.load(checkpoint)
    stream = batches(ids, options.batch, options.length, options.seed, state.step)
    forward = model if options.no_compile else torch.compile(model)
    while state.step < options.steps:
        started = time.monotonic()
        lr = options.lr * rate(state.step, options.steps, options.decay)
        loss = _step(forward, next(stream), state.optimizers, lr)
        state.step += 1
        state.seconds += time.monotonic() - started
        last = state.step == options.steps
        if state.step % 20 == 0:
            print(f"step {state.step} loss {loss:.4f} {state.seconds / 60:.1f} min", flush=True)
        if state.step % options.every == 0 or last:
            state.save(checkpoint)
        if state.step % (5 * options.every) == 0 or last:
            unseen = causal_lm.mean_loss(model, held_out, options.length)
            print(f"step {state.step} held-out {unseen:.4f}", flush=True)


def _step(forward: Any, window: Tensor, chosen: list[torch.optim.Optimizer], lr: float) -> float:
    """Do one optimizer step on a (batch, length) window and return its loss."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = forward(input_ids=window, labels=window).loss
    loss.backward()
    parameters = [p for o in chosen for group in o.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


if __name__ == "__main__":
    main()
