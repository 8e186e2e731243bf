"""Pre-trained models as they are loaded: what is said of them, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from rich.console import Console

from fastlora.train.config import read_config
from fastlora.train.data.rows import Row
from fastlora.train.models import load_model, places_of, stored_dtype
from fastlora.train.prepare import prepare
from fastlora.train.refusal import Refusal
from fastlora.train.run import Run
from fastlora.train.tasks import task
from tests.train import world

QUIET = Console(quiet=True)
TEXTS = "AutoModelForSequenceClassification"


def load(place: Path, auto_class: str = TEXTS, quantize: str | None = None, **fields: Any) -> Any:
    return load_model(
        str(place), auto_class, quantize=quantize, widen=fields.pop("widen", None), **fields
    )


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_final_layer_is_made_anew_or_kept_and_it_is_said(
    tmp_path: Path, quantize: str | None
) -> None:
    place = world.save_model(tmp_path, "bert")
    first = load(place, classes=["a", "b"])
    assert first.notes == ["the final layer (classifier) was made anew for 2 classes"]
    first.model.save_pretrained(tmp_path / "tuned")
    for classes, anew in ((["a", "b"], False), (["a", "c"], True), (["a", "b", "c"], True)):
        again = load(tmp_path / "tuned", classes=classes, quantize=quantize, seed=1)
        done = "made anew for" if anew else "kept, for the checkpoint has it for the same"
        assert again.notes == [f"the final layer (classifier) was {done} {len(classes)} classes"]
        same = torch.equal(again.model.classifier.weight[:2], first.model.classifier.weight)
        assert same != anew


def test_a_trained_number_is_kept(tmp_path: Path) -> None:
    place = world.save_model(tmp_path, "bert")
    first = load(place, outputs=1)
    assert "made anew for 1 numbers" in first.notes[0]
    first.model.save_pretrained(tmp_path / "tuned")
    again = load(tmp_path / "tuned", outputs=1)
    assert again.notes == [
        "the final layer (classifier) was kept, for the checkpoint has it for the same 1 numbers"
    ]


def test_a_head_for_other_classes_is_reset_though_other_parts_are_missing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = world.save_model(tmp_path, "bert")
    first = load(place, classes=["a", "b"])
    first.model.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if "pooler" not in k}
    save_file(kept, file, metadata={"format": "pt"})
    again = load(tmp_path / "tuned", classes=["c", "d"], seed=1)
    assert "made anew for 2 classes" in again.notes[0] and "bert.pooler" in again.notes[1]
    assert not torch.equal(again.model.classifier.weight, first.model.classifier.weight)


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_widened_weights_are_said_though_the_config_does_not_say_their_format(
    tmp_path: Path, shards: str
) -> None:
    import transformers

    config, kind = world.config_of("bert")
    model = getattr(transformers, kind)(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half", max_shard_size=shards)
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > (shards == "20KB")
    file = tmp_path / "half" / "config.json"
    said = json.loads(file.read_text())
    said.pop("dtype")
    file.write_text(json.dumps(said))
    loaded = load(tmp_path / "half", classes=["a", "b"], widen="for a reason")
    assert "the bfloat16 weights were loaded as float32: for a reason" in loaded.notes
    plain = transformers.AutoConfig.from_pretrained(tmp_path / "half")
    assert stored_dtype(str(tmp_path / "half"), plain) == "bfloat16"


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_damaged_file_is_refused(tmp_path: Path, quantize: str | None) -> None:
    place = world.save_model(tmp_path, "bert")
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Refusal, match=r"the model .*bert can't be loaded: ") as refused:
        load(place, classes=["a", "b"], quantize=quantize)
    assert "\n" not in str(refused.value)


def test_what_sees_the_tokens_that_it_should_predict_is_no_language_model(tmp_path: Path) -> None:
    file = world.write_run(tmp_path, "causal-lm", "lora", model="bert")
    config = read_config(file)
    made = task("causal-lm")(config)
    with pytest.raises(Refusal, match=r"in .*bert later tokens change what is predicted; use a ca"):
        made.load(None, None)
    said = tmp_path / "bert" / "config.json"
    said.write_text(json.dumps({**json.loads(said.read_text()), "is_decoder": True}))
    assert made.load(None, None).head == []


def test_the_places_of_a_model() -> None:
    import transformers

    assert places_of(world.config_of("bert")[0]) == places_of(world.config_of("llama")[0]) == 64
    assert places_of(world.config_of("t5")[0]) is None
    padded = transformers.RobertaConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    assert places_of(padded) == 32
    body = transformers.AutoModel.from_config(padded)
    body(input_ids=torch.full((1, 32), 5))
    with pytest.raises((IndexError, RuntimeError)):
        body(input_ids=torch.full((1, 33), 5))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_have_the_channels_of_the_model(tmp_path: Path, channels: int, mode: str) -> None:
    import transformers

    config, kind = world.config_of("vit")
    config.num_channels = channels
    getattr(transformers, kind)(config).save_pretrained(tmp_path / "vit")
    file = world.write_run(tmp_path, "image-classification", "lora", train={"max_steps": 1})
    run = Run(read_config(file), QUIET)
    made: Any = run.task
    assert made.mode == mode and run.data.train[0]["pixel_values"].shape == (channels, 8, 8)
    assert float(run.data.train[0]["pixel_values"].abs().max()) <= 1
    run.train()


def test_a_model_of_other_channels_is_refused(tmp_path: Path) -> None:
    file = world.write_run(tmp_path, "image-classification", "lora")
    said = tmp_path / "vit" / "config.json"
    said.write_text(json.dumps({**json.loads(said.read_text()), "num_channels": 5}))
    made = task("image-classification")(read_config(file))
    with pytest.raises(Refusal, match="must see images of 1, 3 or 4 channels, but it sees 5"):
        made.prepare()


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    made: Any = task("regression")(read_config(world.write_run(tmp_path, "regression", "lora")))
    data = prepare(made, made.config.data, 0)
    model = made.load(None, None).model
    model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(Refusal, match="must give finite numbers, but for 8 of 8 rows it gives NaN"):
        made.evaluate(model, data.test, 4)
    assert made.ask(Row({"text": "a small"}, "x"))["label"] == 0.0
