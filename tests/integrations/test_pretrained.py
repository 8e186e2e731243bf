"""Loading checkpoints straight into 4-bit linears, and saving them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from safetensors import SafetensorError

import fastlora
from fastlora.layers import QuantizedLinear
from tests import offline

BF16 = torch.bfloat16
TOKENS = torch.randint(4, 20, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = model.eval()(TOKENS).logits
    return y


def expected(**quant: Any) -> torch.Tensor:
    """What patching the model in memory gives."""
    model = offline.llama(BF16)
    return logits(fastlora.patch_model(model, quantize=fastlora.QuantConfig(**quant)))


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """But for the rotary tables, which a cast of the whole model rounds."""
    torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_weights_are_those_of_patching(checkpoint: Path, quant_type: str, double: bool) -> None:
    quant = fastlora.QuantConfig(quant_type, 64, double)
    model = fastlora.from_pretrained(checkpoint, quantize=quant)
    assert model.is_quantized and model.hf_quantizer.is_trainable
    patched = fastlora.patch_model(offline.llama(BF16), quantize=quant)
    mine, theirs = model.state_dict(), patched.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    close(logits(model), expected(quant_type=quant_type, double_quant=double))
    report = fastlora.report(model)
    assert len(report["modules"]) == 14 and report["skipped"] == {"lm_head": "kept dense"}


def test_by_transformers_own_way(checkpoint: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=fastlora.FastLoraQuantConfig(quant_type="fp4"), dtype=BF16
    )
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantizedLinear)
    close(logits(model), expected(quant_type="fp4"))


def test_what_transformers_saves_it_loads(checkpoint: Path, tmp_path: Path) -> None:
    model = fastlora.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "own")
    for again in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own"),
        fastlora.from_pretrained(tmp_path / "own"),
    ):
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_loads_what_is_saved(checkpoint: Path, tmp_path: Path, double: bool) -> None:
    quant = fastlora.QuantConfig("nf4", 64, double)
    model = fastlora.from_pretrained(checkpoint, fastlora.LoraConfig(r=2), quantize=quant)
    fastlora.save_quantized(model, tmp_path / "packed")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert type(other.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        theirs = other.train()(TOKENS).logits  # in inference bitsandbytes computes coarsely
    torch.testing.assert_close(theirs, logits(model), rtol=0.02, atol=0.02)
    again = fastlora.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))


def test_adapters_train_on_what_was_loaded(checkpoint: Path, tmp_path: Path) -> None:
    model = fastlora.from_pretrained(checkpoint, fastlora.LoraConfig(r=4))
    again = fastlora.patch_model(fastlora.from_pretrained(checkpoint), fastlora.LoraConfig(r=4))
    assert torch.equal(logits(model), logits(again))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 28
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merged: Any = fastlora.merge(model)
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    merged.save_pretrained(tmp_path / "merged")  # a dense checkpoint says nothing of 4 bits
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(plain), logits(merged))


@pytest.mark.parametrize("tied", [True, False])
def test_other_architectures(tmp_path: Path, tied: bool) -> None:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    bert = fastlora.from_pretrained(
        tmp_path / "bert", auto_class="AutoModelForSequenceClassification"
    )
    assert logits(bert).shape == (2, 3)
    offline.llama(BF16, tie_word_embeddings=tied).save_pretrained(tmp_path / "llama")
    model = fastlora.from_pretrained(tmp_path / "llama")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    fastlora.save_quantized(model, tmp_path / "packed")
    again = fastlora.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))


def test_weights_that_the_model_reads_stay_dense(tmp_path: Path) -> None:
    config = transformers.LongT5Config(
        vocab_size=30, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, local_radius=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LongT5ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    model = fastlora.from_pretrained(tmp_path / "dense", auto_class="AutoModelForSeq2SeqLM")
    report = fastlora.report(model)
    wo = [name for name in report["skipped"] if name.endswith(".wo")]
    assert len(wo) == 2 and len(report["modules"]) == 14
    assert {report["skipped"][name] for name in wo} == {"LongT5DenseActDense reads its weight"}
    y = model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
    fastlora.save_quantized(model, tmp_path / "packed")
    again = fastlora.from_pretrained(tmp_path / "packed", auto_class="AutoModelForSeq2SeqLM")
    assert torch.equal(again(input_ids=TOKENS, decoder_input_ids=TOKENS).logits, y)


CODE = """
import sys, threading, time, fastlora
import transformers.models.llama.modeling_llama
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024
fastlora.from_pretrained
peak, before, done = [0.0], anonymous(), threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
model = fastlora.from_pretrained(sys.argv[1])
seconds = time.perf_counter() - start
done.set()
thread.join()
print(seconds, peak[0] - before)
"""


@pytest.mark.slow
def test_peak_memory(tmp_path: Path) -> None:
    """The packed model, the largest tensor twice over in float32, and 64 MiB; then reload."""
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config).to(BF16)
    dense = sum(p.nbytes for p in model.parameters()) / 2**20
    model.save_pretrained(tmp_path / "dense", max_shard_size="100MB")
    fastlora.patch_model(model, quantize="nf4")
    packed = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 2**20
    fastlora.save_quantized(model, tmp_path / "packed")
    del model
    largest = 1024 * 4096 * 4 / 2**20
    seconds = {}
    for kind in ("dense", "packed"):
        command = [sys.executable, "-c", CODE, str(tmp_path / kind)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds[kind], extra = (float(part) for part in done.stdout.split()[-2:])
        assert extra < packed + 2 * largest + 64 < dense, (kind, extra, packed, dense)
    assert seconds["packed"] < seconds["dense"]


# ---- what is refused ----


def test_bad_arguments(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="quant_type"):
        fastlora.from_pretrained(checkpoint, quantize="nf3")
    with pytest.raises(ValueError, match="nothing does; its linears are named"):
        fastlora.from_pretrained(checkpoint, fastlora.LoraConfig(target_modules=["nowhere"]))
    with pytest.raises(FileNotFoundError, match="directory or a hub id, but there is no directory"):
        fastlora.from_pretrained(checkpoint / "nowhere")
    for auto_class in ("Nope", "logging"):
        with pytest.raises(ValueError, match=f"class of transformers .*, got '{auto_class}'; pass"):
            fastlora.from_pretrained(checkpoint, auto_class=auto_class)


def test_saving_leaves_nothing_half_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fastlora.from_pretrained(checkpoint)
    target = tmp_path / "saved"
    fastlora.save_quantized(model, target)
    before = sorted(file.name for file in target.iterdir())
    with pytest.raises(FileExistsError, match="that does not exist, but"):
        fastlora.save_quantized(model, target)
    for error in (OSError(28, "No space left on device"), SafetensorError("No space left")):

        def full(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.save_torch_state_dict", full)
            words = "checkpoint must be writable to .*saved, but the system says: No space left"
            with pytest.raises(OSError, match=words):
                fastlora.save_quantized(model, target, overwrite=True)
    assert sorted(file.name for file in target.iterdir()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "saved"]
    with pytest.raises(ValueError, match="must be patched, but it is not"):
        fastlora.save_quantized(offline.llama(), tmp_path / "x")
    dense = fastlora.patch_model(offline.llama(), fastlora.LoraConfig(r=2))
    with pytest.raises(ValueError, match="needs 4-bit weights, but the model has none"):
        fastlora.save_quantized(dense, tmp_path / "x")
    with pytest.raises(TypeError, match="takes a model of transformers, got Sequential"):
        plain = torch.nn.Sequential(torch.nn.Linear(64, 64))
        fastlora.save_quantized(fastlora.patch_model(plain, quantize="nf4"), tmp_path / "x")


def test_overwriting_takes_models_alone_and_brings_them_back(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fastlora.from_pretrained(checkpoint)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.tex").write_text("years of work")
    for path in (notes, notes / "thesis.tex"):
        with pytest.raises(FileExistsError, match=r"directories of models alone, but .* no"):
            fastlora.save_quantized(model, path, overwrite=True)
    assert (notes / "thesis.tex").read_text() == "years of work"
    target = tmp_path / "saved"
    fastlora.save_quantized(model, target)
    (target / "mark").write_text("old")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self.name.startswith(".saved.") and not self.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="the system says: Input/output error"):
            fastlora.save_quantized(model, target, overwrite=True)
    assert (target / "mark").read_text() == "old"
    fastlora.save_quantized(model, target, overwrite=True)
    assert not (target / "mark").exists()
    assert torch.equal(logits(fastlora.from_pretrained(target)), logits(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "notes", "saved"]


def test_save_quantized_says_whose_layers_it_takes(tmp_path: Path) -> None:
    theirs = fastlora.patch_model(offline.to_bnb(offline.llama(), torch.float32))
    with pytest.raises(ValueError, match=r"weights of fastlora's own, but .* another"):
        fastlora.save_quantized(theirs, tmp_path / "x")


def trainer(model: Any, directory: Path) -> Any:
    arguments = transformers.TrainingArguments(**offline.arguments(directory, 2))
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows)


@pytest.mark.parametrize("how", ["patched", "loaded", "copied", "PEFT's", "head"])
def test_trainer_takes_what_has_something_to_train(
    checkpoint: Path, tmp_path: Path, how: str
) -> None:
    model = fastlora.from_pretrained(checkpoint, dtype=torch.float32)
    with pytest.raises(ValueError, match="attach trainable adapters on top of the quantized model"):
        trainer(model, tmp_path)
    config = fastlora.LoraConfig(r=2)
    if how == "patched":
        fastlora.patch_model(model, config)
    elif how == "loaded":
        fastlora.save_adapter(fastlora.patch_model(offline.llama(), config), tmp_path / "adapter")
        fastlora.load_adapter(model, tmp_path / "adapter")
    elif how == "copied":
        bare, model = model, copy.deepcopy(model)
        fastlora.patch_model(model, config)
        with pytest.raises(ValueError, match="attach trainable adapters"):
            trainer(bare, tmp_path)
        model = pickle.loads(pickle.dumps(model))
    elif how == "PEFT's":
        model = offline.peft_model(model)
    else:
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
    assert trainer(model, tmp_path).train().training_loss > 0


def test_what_peft_trains_on_it_is_merged_here(checkpoint: Path, tmp_path: Path) -> None:
    def base() -> Any:
        return fastlora.from_pretrained(checkpoint, dtype=torch.float32)

    theirs = offline.peft_model(base())
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = fastlora.load_adapter(base(), tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert not torch.allclose(logits(base()), logits(ours))
    torch.testing.assert_close(logits(fastlora.merge(ours)), logits(theirs), rtol=1e-4, atol=1e-4)
