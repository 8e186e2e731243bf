"""How good the bundled model is: `python -m bench.nano` appends a line to bench/results/nano.jsonl.

Bits per byte on the files held out from pre-training and on the held-out topics of the language
reference, against a unigram and a bigram model of the same tokens, gzip, and xz that has seen the
training text.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import math
import platform
from pathlib import Path

import torch
from torch import Tensor

from fastlora.integrations import causal_lm
from fastlora.nano import MODEL_DIR, corpus

RESULTS = Path(__file__).parent / "results" / "nano.jsonl"


def ngram_loss(train: Tensor, text: Tensor, vocabulary: int) -> tuple[float, float]:
    """Return nats per token of `text` under an add-one unigram and a Witten-Bell bigram."""
    unigram = torch.bincount(train, minlength=vocabulary).double() + 1
    unigram /= unigram.sum()
    pairs = torch.bincount(train[:-1] * vocabulary + train[1:], minlength=vocabulary**2)
    table = pairs.view(vocabulary, vocabulary)
    seen, kinds = table.sum(1).double(), (table > 0).sum(1).double()
    left, right = text[:-1], text[1:]
    share = seen / (seen + kinds).clamp(min=1)
    inside = table[left, right].double() / seen[left].clamp(min=1)
    bigram = share[left] * inside + (1 - share[left]) * unigram[right]
    return -float(unigram[right].log().mean()), -float(bigram.log().mean())


def xz_after(train: bytes, text: bytes) -> int:
    """Return the bytes that `text` adds to the xz of `train`."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 25}]
    sizes = [len(lzma.compress(part, filters=filters)) for part in (train, train + text)]
    return sizes[1] - sizes[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.nano", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    options = parser.parse_args()
    model, tokenizer = causal_lm.load(options.model, torch.float32, "cpu")
    own, reference = corpus.pretraining(), corpus.reference()
    train_ids = causal_lm.encode(tokenizer, [d.text for d in own.train])
    train_bytes = "\n".join(d.text for d in own.train).encode()
    weights = (options.model / "model.safetensors").read_bytes()
    record: dict[str, object] = {
        "model_sha256": hashlib.sha256(weights).hexdigest(),
        "model_bytes": len(weights),
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "window": options.length,
        "train_bytes": len(train_bytes),
        "train_tokens": train_ids.numel(),
    }
    for name, split in (("source", own), ("reference", reference)):
        texts = [d.text for d in split.held_out]
        raw = "\n".join(texts).encode()
        ids = causal_lm.encode(tokenizer, texts)
        loss = causal_lm.mean_loss(model, ids, options.length)
        unigram, bigram = ngram_loss(train_ids, ids, len(tokenizer))
        per_byte = ids.numel() / len(raw) / math.log(2)
        record[name] = {
            "held_out_files": [d.name for d in split.held_out],
            "held_out_bytes": len(raw),
            "held_out_tokens": ids.numel(),
            "perplexity": math.exp(loss),
            "bits_per_byte": {
                "model": loss * per_byte,
                "bigram": bigram * per_byte,
                "unigram": unigram * per_byte,
                "gzip": 8 * len(gzip.compress(raw, 9)) / len(raw),
                "xz after training text": 8 * xz_after(train_bytes, raw) / len(raw),
            },
        }
        print(name, json.dumps(record[name], indent=2))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
