"""The bundled model: what it is, how good it is, and that its two corpora share no text."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.integrations import causal_lm
from fastlora.nano import MODEL_DIR, corpus

# 9.7 and 38.6 in bench/results/nano.jsonl; room for another Python's version of the held-out files.
HELD_OUT_PERPLEXITY = 13.0
REFERENCE_PERPLEXITY = 55.0


@cache
def _model() -> tuple[Any, Any]:
    return causal_lm.load(MODEL_DIR, torch.float32, "cpu")


@cache
def _source() -> corpus.Split:
    return corpus.pretraining()


def _perplexity(documents: list[corpus.Document], tokens: int) -> float:
    model, tokenizer = _model()
    ids = causal_lm.encode(tokenizer, [d.text for d in documents])[:tokens]
    return math.exp(causal_lm.mean_loss(model, ids, 512))


def _shingles(text: str, size: int) -> set[str]:
    """Return the runs of `size` words of `text`, by other means than `corpus.windows`."""
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text.casefold()).split()
    return {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}


def test_files_are_small() -> None:
    sizes = {p.name: p.stat().st_size for p in MODEL_DIR.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= sizes.keys()
    assert sum(sizes.values()) < 10_000_000


def test_is_a_small_llama_with_tied_embeddings() -> None:
    model, tokenizer = _model()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_predicts_held_out_source_better_than_the_reference() -> None:
    source = _perplexity(_source().held_out, 8_192)
    reference = _perplexity(corpus.reference().held_out, 8_192)
    assert source < HELD_OUT_PERPLEXITY < reference < REFERENCE_PERPLEXITY


def test_sample_depends_on_the_seed_alone() -> None:
    model, tokenizer = _model()
    first = causal_lm.sample(model, tokenizer, "def main():\n", 12, seed=1)
    torch.rand(3)
    assert causal_lm.sample(model, tokenizer, "def main():\n", 12, seed=1) == first
    assert causal_lm.sample(model, tokenizer, "def main():\n", 12, seed=2) != first


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_tokenizer_round_trips_any_text(text: str) -> None:
    tokenizer = _model()[1]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < 4096


def test_pretraining_text_shares_nothing_with_the_reference() -> None:
    split, reference = _source(), corpus.reference()
    prose = set().union(*(_shingles(d.text, 14) for d in reference.train + reference.held_out))
    assert len(prose) > 30_000
    for document in split.train + split.held_out:
        assert _shingles(document.text, 14).isdisjoint(prose), document.name


@pytest.mark.parametrize("split", ["pretraining", "reference"])
def test_held_out_text_is_not_in_training_text(split: str) -> None:
    sides = _source() if split == "pretraining" else corpus.reference()
    assert sides.held_out and len(sides.train) > 4 * len(sides.held_out)
    names = {d.name for d in sides.train}
    blocks = {" ".join(b.split()) for d in sides.train for b in d.text.split("\n\n")}
    for document in sides.held_out:
        assert document.name not in names
        for block in document.text.split("\n\n"):
            assert len(block) <= 80 or " ".join(block.split()) not in blocks


def test_held_out_topics_share_no_sentence_with_training_topics() -> None:
    split = corpus.reference()
    train = set().union(*(_shingles(d.text, 14) for d in split.train))
    for document in split.held_out:
        assert _shingles(document.text, 14).isdisjoint(train), document.name


def test_an_overlap_is_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    topic = corpus.reference().held_out[0].text
    quoted = next(b for b in topic.split("\n\n") if len(b.split()) > 30)
    source = [("a.py", f"first = 1\n{quoted}\nlast = 2\n"), ("b.py", "first = 1\n")]
    monkeypatch.setattr(corpus, "_source_files", lambda: iter(source))
    texts = {d.name: d.text for side in corpus.pretraining() for d in side}
    assert texts["a.py"] == "first = 1\nlast = 2\n"
    assert texts["b.py"] == "first = 1\n"


def test_corpora_are_the_same_each_time() -> None:
    assert corpus.reference() == corpus.reference()
    assert corpus.pretraining() == _source()
