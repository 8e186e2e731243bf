"""Models of timm, "timm:NAME", behind the interface of transformers' image classifiers.

`timm:NAME` has timm's pre-trained weights, which are fetched if they are not on the machine;
`timm:NAME@FILE.safetensors` has those of a file of yours.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import ImageClassifierOutput

from fastlora import patch_model
from fastlora.train.refusal import Refusal

if TYPE_CHECKING:
    from fastlora.train.models import Loaded

PREFIX = "timm:"


class TimmClassifier(nn.Module):
    """A timm model that takes pixel_values and labels, and gives loss and logits.

    Attributes:
        body: timm's model, its final layer included.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.config: Any = SimpleNamespace(to_dict=dict, model_type="timm")

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Return logits (M, classes), and the mean cross-entropy where there are labels."""
        logits = self.body(pixel_values)
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def split_name(name: str) -> tuple[str, Path | None]:
    """Return timm's name of a model, and the file of its weights.

    Raises:
        Refusal: the file does not exist.
    """
    plain, _, file = name.removeprefix(PREFIX).partition("@")
    path = Path(file) if file else None
    if path is not None and not path.is_file():
        raise Refusal(f"the weights in {name} must be a safetensors file, but there is no {path}")
    return plain, path


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise Refusal(
            'models of timm need the package; run: pip install "fastlora[vision]"'
        ) from None
    return timm


def load(
    name: str, quantize: str | None, classes: list[str] | None, device: torch.device
) -> Loaded:
    """Return a timm model with a final layer for the classes.

    Raises:
        Refusal: timm has no such model, or its weights can't be had.
    """
    from fastlora.train.models import Loaded

    timm, (plain, file) = _timm(), split_name(name)
    if classes is None:
        raise Refusal(f"a model of timm does image-classification alone, got {name}")
    options = {"checkpoint_path": str(file)} if file else {"pretrained": True}
    try:
        body: Any = timm.create_model(plain, **options)
        body.reset_classifier(len(classes))
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        said = " ".join(str(error).split())[:300]
        raise Refusal(f"the model {name} can't be loaded: {said}") from error
    model = TimmClassifier(body).to(device)
    head = [f"body.{part}" for part in _names(body.pretrained_cfg.get("classifier"))]
    if quantize:
        _quantize(model, quantize, head)
    return Loaded(model, head, [f"the final layer was made anew for {len(classes)} classes"])


def _names(found: Any) -> list[str]:
    return [found] if isinstance(found, str) else list(found or ())


def _quantize(model: TimmClassifier, quantize: str, head: list[str]) -> None:
    """Store every linear of the body in 4 bits but the final layer."""
    outputs = model.get_submodule(head[0])
    model.get_output_embeddings = lambda: outputs  # type: ignore[assignment]
    patch_model(model, None, quantize=quantize)


class TimmProcessor:
    """Scales images as the model's pre-training did.

    Attributes:
        channels: how many an image must have.
    """

    def __init__(self, name: str) -> None:
        timm, (plain, _) = _timm(), split_name(name)
        try:
            config = timm.data.resolve_data_config(
                {}, model=timm.create_model(plain, pretrained=False)
            )
        except RuntimeError as error:
            raise Refusal(f"timm must have the model {plain}, but says: {error}") from error
        self.channels = config.get("input_size", (3,))[0]
        self.transform = timm.data.create_transform(**config)

    def __call__(self, image: Any, return_tensors: str = "pt") -> dict[str, Tensor]:
        """Return pixel_values (1, C, H, W)."""
        return {"pixel_values": self.transform(image)[None]}
