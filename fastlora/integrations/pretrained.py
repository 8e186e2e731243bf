"""Load a transformers checkpoint straight into 4-bit linears, and save one that others load."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from fastlora_kernels.formats import FORMATS
from safetensors import SafetensorError
from torch import nn

from fastlora.dispatch import check_compute
from fastlora.experts import AdapterExperts
from fastlora.in_place import InPlace
from fastlora.integrations.quantizer import FastLoraQuantConfig
from fastlora.integrations.shards import CONFIG, INDEX, check_files, read_json, weight_map
from fastlora.integrations.versions import check_version
from fastlora.layers import QuantizedLinear
from fastlora.linears import is_linear
from fastlora.patch import any_record, patch_model, set_compute, the_record
from fastlora.quant import QuantConfig


def from_pretrained(
    name: str | os.PathLike[str],
    config: object | None = None,
    *,
    quantize: str | QuantConfig | None = "nf4",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = "auto",
    auto_class: str = "AutoModelForCausalLM",
    skip_modules: list[str] | None = None,
    backend: str = "auto",
    compute: str = "auto",
    seed: int = 0,
    **options: Any,
) -> Any:
    """Return a patched model from a transformers checkpoint, without ever holding it in full.

    The checkpoint is read tensor by tensor; each linear's weight is packed as it comes and the
    dense one dropped. Beside the packed model no more memory is used than the largest tensor takes
    in the checkpoint and in float32, and about 64 MiB; fused experts are packed when all of a
    layer's have come, which takes their parameter three times. A checkpoint that bitsandbytes, or
    `save_quantized`, has packed is read as it is.

    Args:
        name: a directory, or a hub id.
        config: an adapter config; None: none is added.
        quantize: None, "nf4", "fp4" or a `QuantConfig`; a packed checkpoint keeps its own.
        device: where the model is to be.
        dtype: of what is not packed and of activations; "auto": the checkpoint's.
        auto_class: the class of transformers that loads it.
        skip_modules: linears that stay dense; None: the output head and what the model keeps in
            float32.
        backend: "auto", or the name of one backend.
        compute: "auto" or "fp8", as for `patch_model`.
        seed: of the adapter's first values.
        options: handed on to the class's `from_pretrained`.

    Returns:
        The model, in eval mode, its linears in 4 bits; with a config its adapter is there and all
        else frozen.

    Raises:
        ValueError: the checkpoint is damaged, pickled, of another kind, or lacks a weight;
            transformers has no such class; or a target does not fit.
        FileNotFoundError: the directory or a file of it is missing.
        NotImplementedError: no backend computes a layer so; the message gives each one's reason.
        ImportError: the version of transformers is not supported.
    """
    check_version("transformers")
    check_compute(compute)
    import transformers

    kind: Any = getattr(transformers, auto_class, None)
    if not hasattr(kind, "from_pretrained"):
        raise ValueError(
            f"auto_class must name a class of transformers that loads models, got {auto_class!r};"
            " pass one such as 'AutoModelForCausalLM'"
        )
    path, found = Path(name), None
    if path.is_dir():
        found = _check_directory(path)
    else:
        _check_hub_id(str(name))
    quant = QuantConfig(quantize) if isinstance(quantize, str) else quantize
    options = {"dtype": dtype, "device_map": {"": str(device)}, "use_safetensors": True, **options}
    if found is not None:
        options["config"] = _own_config(transformers, path, found, backend)
    elif quant is not None:
        options["quantization_config"] = FastLoraQuantConfig(
            quant.quant_type, quant.blocksize, quant.double_quant, skip_modules, backend
        )
    model = kind.from_pretrained(str(name), **options)
    if config is not None:
        patch_model(model, config, backend=backend, compute=compute, seed=seed)
    elif compute != "auto":
        set_compute(model, the_record(model), backend, compute)
    return model


def _check_hub_id(name: str) -> None:
    """Raise where a name that is no directory can't be a hub id either."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(
            f"a checkpoint must be a directory or a hub id, but there is no directory {name!r};"
            " check the path"
        ) from None


def _check_directory(path: Path) -> dict[str, Any] | None:
    """Return how a checkpoint is packed, None where it is not; raise unless it is whole."""
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"a checkpoint must hold {CONFIG}, but {path} does not; pass the directory that"
            " save_pretrained wrote"
        )
    shards = sorted(path.glob("*.safetensors"))
    if (path / INDEX).is_file():
        shards = [path / shard for shard in sorted(set(weight_map(path / INDEX).values()))]
    if not shards:
        pickled = [file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth")]
        raise ValueError(
            f"a checkpoint must be stored as safetensors, but {path} holds {pickled or 'none'};"
            " convert it with transformers' save_pretrained"
        )
    check_files(shards)
    packed = read_json(path / CONFIG).get("quantization_config")
    if packed is None:
        return None
    if packed.get("quant_method") not in ("bitsandbytes", "fastlora"):
        raise ValueError(
            "a packed checkpoint must be in 4 bits of bitsandbytes or fastlora, got"
            f" {packed.get('quant_method')!r}; load the full-precision one"
        )
    if packed["quant_method"] == "bitsandbytes" and not packed.get("load_in_4bit"):
        raise ValueError(
            "a checkpoint of bitsandbytes must be packed in 4 bits, got one in 8 bits; load the"
            " full-precision one"
        )
    return dict(packed)


def _own_config(transformers: Any, path: Path, packed: dict[str, Any], backend: str) -> Any:
    """Return the model's config, with fastlora in charge of the packed weights."""
    config = transformers.AutoConfig.from_pretrained(path)
    own = packed["quant_method"] == "fastlora"
    config.quantization_config = {
        "quant_method": "fastlora",
        "quant_type": packed["quant_type" if own else "bnb_4bit_quant_type"],
        "blocksize": packed.get("blocksize", 64),
        "double_quant": packed["double_quant" if own else "bnb_4bit_use_double_quant"],
        "skip_modules": packed.get("skip_modules" if own else "llm_int8_skip_modules"),
        "backend": backend,
    }
    return config


def save_quantized(
    model: nn.Module, directory: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write the packed base of a model so that transformers with bitsandbytes loads it.

    The adapter is not part of it; see `save_adapter`. Files are written beside the directory and
    renamed into place when they are complete; what was there comes back if that fails.

    Args:
        model: a transformers model whose linears are in 4 bits.
        directory: must not exist, unless `overwrite`.
        overwrite: replace a whole directory of a model, with all files in it.

    Raises:
        ValueError: the model is not patched, has no 4-bit weight, or has 4-bit experts.
        TypeError: it is no model of transformers.
        FileExistsError: the directory exists, or what exists is no directory of a model.
        OSError: the files can't be written.
    """
    record = any_record(model)
    if isinstance(record, InPlace):
        raise ValueError(
            "save_quantized takes 4-bit weights of fastlora's own, but this model's layers are"
            " another library's, accelerated in place; use the model's own save_pretrained"
        )
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"save_quantized takes a model of transformers, got {type(model).__name__}; save its"
            " state_dict yourself"
        )
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not packed:
        raise ValueError("save_quantized needs 4-bit weights, but the model has none; quantise it")
    experts = [name for name, m in model.named_modules() if isinstance(m, AdapterExperts)]
    if experts:
        raise ValueError(
            f"save_quantized takes 4-bit linears alone, but {experts[0]!r} holds fused experts, for"
            " which bitsandbytes has no format; save the adapter, and quantise the base again when"
            " it is loaded"
        )
    target = Path(directory)
    _check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
        work.mkdir()
        try:
            _write(model, work, packed, set(record.plan.adapted))
            _put(work, target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the checkpoint must be writable to {target}, but the system says:"
            f" {getattr(error, 'strerror', None) or error}; free space, fix the permissions or"
            " choose another path"
        ) from error


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise unless a checkpoint may take this place."""
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"save_quantized needs a directory that does not exist, but {target} does; choose"
            " another or pass overwrite=True"
        )
    if target.exists() and not (target / CONFIG).is_file():
        raise FileExistsError(
            f"save_quantized overwrites directories of models alone, but {target} holds no"
            f" {CONFIG}; choose another path or remove it yourself"
        )


def _put(work: Path, target: Path) -> None:
    """Rename a directory to its place; the one that is there goes, or comes back on failure."""
    old = work.with_name(f"{work.name}.old")
    try:
        if target.exists():
            target.rename(old)
        work.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write(model: Any, work: Path, packed: dict[str, QuantizedLinear], adapted: set[str]) -> None:
    """Write config and shards into an empty directory, and force them to disk."""
    from huggingface_hub import save_torch_state_dict

    own = {f"{n}.{p}" for n in adapted for p in model.get_submodule(n).adapter_params()}
    state = {key: value for key, value in model.state_dict().items() if key not in own}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = {key: value.contiguous() for key, value in state.items() if key not in tied}
    save_torch_state_dict(state, work, metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=True))
    config["quantization_config"] = _bnb_config(model, packed)
    config["architectures"] = [type(model).__name__]
    (work / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(work)
    for file in work.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _bnb_config(model: nn.Module, packed: dict[str, QuantizedLinear]) -> dict[str, Any]:
    """Return the quantization_config that transformers writes for bitsandbytes."""
    first = next(iter(packed.values()))
    kept = [
        name for name, module in model.named_modules() if is_linear(module) and name not in packed
    ]
    assert first.quant.quant_type in FORMATS
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": first.quant.quant_type,
        "bnb_4bit_use_double_quant": first.weight_nested_absmax is not None,
        "bnb_4bit_compute_dtype": str(first.quant.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept or None,
    }
