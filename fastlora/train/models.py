"""Load a pre-trained model for a task, dense or in 4 bits, with the final layer that it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from fastlora import QuantConfig, from_pretrained
from fastlora.integrations.shards import weight_map
from fastlora.layers import QuantizedLinear
from fastlora.nano import MODEL_DIR
from fastlora.train import timm_models
from fastlora.train.refusal import Refusal

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass
class Loaded:
    """A model as it was loaded.

    Attributes:
        model: on the device that it trains on.
        head: full names of the modules that were made anew for the task.
        notes: what was done to it without a word from the user.
        fresh: names of the tensors that the checkpoint does not have.
    """

    model: Any
    head: list[str]
    notes: list[str]
    fresh: list[str] = field(default_factory=list)


def place_of(name: str) -> str:
    """Return what transformers is to load: a directory or a hub id.

    Raises:
        Refusal: a directory that does not exist or holds no model.
    """
    if name == "nano":
        return str(MODEL_DIR)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise Refusal(f"model must be a directory with a config.json, but {name} has none")
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise Refusal(f"model must be a directory, a hub id, timm:NAME or nano, but {name} is none")
    return name


def device_of() -> torch.device:
    """Return where models train: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    name: str,
    auto_class: str,
    *,
    quantize: str | None = None,
    widen: str | None = None,
    seed: int = 0,
    classes: list[str] | None = None,
    outputs: int | None = None,
    **options: Any,
) -> Loaded:
    """Return the model of a directory or hub id, for a task.

    Args:
        name: as in `RunConfig.model`.
        auto_class: a class of transformers.
        quantize: None, "nf4" or "fp4": how every linear but the head is stored.
        widen: why 16-bit weights are loaded as float32; None: they are kept as they are stored.
        seed: of the new final layer's values.
        classes: the task's classes; None: it has none.
        outputs: how many numbers the final layer gives, when there are no classes.
        options: further fields of the model's config.

    Raises:
        Refusal: there is no such model, it can't do the task, or can't be stored in 4 bits.
    """
    transformers.set_seed(seed)
    if name.startswith("timm:"):
        return timm_models.load(name, quantize, classes, device_of())
    place = place_of(name)
    if classes is not None:
        options["id2label"] = dict(enumerate(classes))
        options["label2id"] = {label: i for i, label in enumerate(classes)}
        options["num_labels"] = len(classes)
    elif outputs is not None:
        options["num_labels"] = outputs
    try:
        config = transformers.AutoConfig.from_pretrained(place)
        kind = getattr(transformers, auto_class)
        before = dict(getattr(config, "id2label", None) or {})
        for key, value in options.items():
            setattr(config, key, value)
        head = []
        if classes is not None or outputs is not None:
            with torch.device("meta"):
                head = head_of(kind.from_config(config))
        model, fresh = _load(place, kind, options, quantize, widen is not None, head)
        stored = stored_dtype(place, config)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise Refusal(_reason(name, auto_class, error)) from error
    notes = []
    if widen and stored in ("bfloat16", "float16"):
        notes.append(f"the {stored} weights were loaded as float32: {widen}")
    in_head = tuple(f"{part}." for part in head)
    if classes is not None or outputs is not None:
        anew = any(part.startswith(in_head) for part in fresh)
        if not anew and classes is not None and list(before.values()) != classes:
            anew = True
            _reset(model, head)
        count = f"{len(classes)} classes" if classes else f"{outputs} numbers"
        notes.append(_note_of_head(head, anew, count))
    others = sorted({part for part in fresh if not part.startswith(in_head)})
    if others:
        notes.append(f"not in the checkpoint, and made anew: {', '.join(others[:6])}")
    _check_packed(model, quantize, name)
    return Loaded(model, head, notes, fresh)


def _note_of_head(head: list[str], anew: bool, count: str) -> str:
    layer = f"the final layer ({', '.join(head) or 'the output'})"
    if anew:
        return f"{layer} was made anew for {count}"
    return f"{layer} was kept, for the checkpoint has it for the same {count}"


def stored_dtype(place: str, config: Any) -> str | None:
    """Return the number format of a checkpoint's weights, "bfloat16"; None: it is not known.

    A config that does not say it leaves it to the first of the tensors.
    """
    said = getattr(config, "dtype", None)
    if said is not None:
        return str(said).removeprefix("torch.")
    file = _first_file(place)
    if file is None:
        return None
    with safe_open(file, "pt") as tensors:
        kinds = [tensors.get_slice(name).get_dtype() for name in tensors.keys()]  # noqa: SIM118
    return next((_DTYPES[kind] for kind in kinds if kind in _DTYPES), None)


def _first_file(place: str) -> str | None:
    """Return the first safetensors file of a checkpoint; None: there is none."""
    options = {"_raise_exceptions_for_missing_entries": False}
    whole: str | None = cached_file(place, SAFE_WEIGHTS_NAME, **options)
    index = None if whole else cached_file(place, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is None:
        return whole
    shard: str | None = cached_file(place, min(weight_map(Path(index)).values()), **options)
    return shard


def places_of(config: Any) -> int | None:
    """Return how many tokens a model has places for; None: its config does not say.

    An embedding of positions that has a row for padding counts from the row after that.
    """
    said: int = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    if said < 1:
        return None
    with torch.device("meta"):
        body = transformers.AutoModel.from_config(config)
    taken = [
        module.padding_idx + 1
        for name, module in body.named_modules()
        if "position" in name
        and isinstance(module, nn.Embedding)
        and module.padding_idx is not None
    ]
    return said - max(taken, default=0)


def check_causal(model: Any, name: str) -> None:
    """Raise unless a model predicts each token from those before it alone.

    Raises:
        Refusal: the last token changes what it gives for those before.
    """
    ids = torch.ones((1, 8), dtype=torch.long, device=next(model.parameters()).device)
    other = ids.clone()
    other[0, -1] = 2
    with torch.no_grad():
        first, second = (model.eval()(input_ids=part).logits for part in (ids, other))
    moved = (first - second)[0, :-1].abs().max()
    if moved > 4 * torch.finfo(first.dtype).eps * first.abs().max():  # not by rounding
        raise Refusal(
            "the model must predict each token from those before it to learn to write, but in"
            f" {name} later tokens change what is predicted; use a causal language model"
        )


def _load(
    place: str, kind: Any, fields: dict[str, Any], quantize: str | None, wide: bool, head: list[str]
) -> tuple[Any, list[str]]:
    """Return the model and the names of the tensors that the checkpoint does not have."""
    common = {**fields, "output_loading_info": True, "ignore_mismatched_sizes": True}
    dtype = torch.float32 if wide else "auto"
    if quantize is not None:
        skip = [*head, "lm_head"] if head else None
        model, info = from_pretrained(
            place,
            None,
            quantize=QuantConfig(quantize),
            device=device_of(),
            auto_class=kind.__name__,
            skip_modules=skip,
            dtype=dtype,
            **common,
        )
    else:
        model, info = kind.from_pretrained(place, dtype=dtype, use_safetensors=True, **common)
        model.to(device_of())
    mismatched = [entry[0] for entry in info.get("mismatched_keys", ())]
    return model, [*info["missing_keys"], *mismatched]


HEADS = ("classifier", "score", "qa_outputs", "classification_head", "head", "fc")


def head_of(model: nn.Module) -> list[str]:
    """Return the names of a model's final layers: its children beside the pre-trained body.

    A model that does not say which child its body is has a head of one of the usual names.
    """
    body = getattr(model, "base_model_prefix", "")
    children = {n: c for n, c in model.named_children() if any(True for _ in c.parameters())}
    if body in children:
        return [name for name in children if name != body]
    return [name for name in children if name in HEADS]


def _reset(model: Any, head: list[str]) -> None:
    """Give a final layer that was trained for other classes new values."""
    std = getattr(model.config, "initializer_range", 0.02)
    for name in head:
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _check_packed(model: nn.Module, quantize: str | None, name: str) -> None:
    if quantize and not any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise Refusal(
            f"quantize={quantize} stores linear layers in 4 bits, but {name} has none beside its"
            " final layer; leave quantize out"
        )


def _reason(name: str, auto_class: str, error: Exception) -> str:
    said = " ".join(str(error).split())
    if "Unrecognized configuration class" in said:
        task = auto_class.removeprefix("AutoModelFor")
        return f"the model must be able to do the task ({task}), but {name} has no such head"
    return f"the model {name} can't be loaded: {said[:300]}"


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters are trained, and how many there are; a 4-bit weight is whole."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters() if p.dtype.is_floating_point)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            total += module.out_features * module.in_features
    return trained, total
