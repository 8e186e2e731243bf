"""Image classification: one class per image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from fastlora.train import scores, timm_models
from fastlora.train.data.rows import BadRow, Row
from fastlora.train.models import Loaded, load_model, place_of
from fastlora.train.refusal import Refusal
from fastlora.train.tasks.base import Evaluation, Example
from fastlora.train.tasks.classification import predict_classes
from fastlora.train.tasks.labels import ClassLabels

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Channels -> Pillow's mode."""


class ImageClassification(ClassLabels):
    """Give each image one of the classes that the training rows have."""

    name = "image-classification"
    required = ("image", "label")
    targets = ("label",)
    metric = "accuracy"
    greater = True
    task_type = "IMAGE_CLS"
    vision = True

    def inputs_of(self, row: Row) -> Any:
        """Return the image, or the digest of its pixels' place."""
        value = row.values.get(self.columns["image"])
        return value if isinstance(value, str) else repr(value)

    def prepare(self) -> None:
        """Load the image processor; a model that has none gets one from its config."""
        name = self.config.model
        if name.startswith("timm:"):
            self.processor: Any = timm_models.TimmProcessor(name)
            self.mode = mode_of(self.processor.channels)
            return
        place = place_of(name)
        try:
            config = transformers.AutoConfig.from_pretrained(place)
            if Path(place).is_dir() and not (Path(place) / "preprocessor_config.json").is_file():
                self.processor = plain_processor(config)
            else:
                self.processor = transformers.AutoImageProcessor.from_pretrained(place)
        except (OSError, ValueError, KeyError, ImportError) as error:
            said = " ".join(str(error).split())[:300]
            raise Refusal(f"the model {name} must have an image processor, but: {said}") from error
        self.mode = mode_of(getattr(config, "num_channels", 3))

    def load(self, quantize: str | None, widen: str | None) -> Loaded:
        """Return the model with a final layer for the classes."""
        return load_model(
            self.config.model,
            "AutoModelForImageClassification",
            quantize=quantize,
            widen=widen,
            seed=self.config.seed,
            classes=self.classes,
        )

    def pixels(self, row: Row) -> torch.Tensor:
        """Return an image as the model reads it, (channels, height, width).

        Raises:
            BadRow: it can't be read.
        """
        from PIL import Image, UnidentifiedImageError

        value = row.values.get(self.columns["image"])
        try:
            if isinstance(value, dict) and value.get("bytes"):
                image: Any = Image.open(io.BytesIO(value["bytes"]))
            elif isinstance(value, str):
                image = Image.open(find_image(value, row.place))
            else:
                image = value
            made = self.processor(image.convert(self.mode), return_tensors="pt")
        except (OSError, AttributeError, ValueError, UnidentifiedImageError) as error:
            raise BadRow(f"the image {value!r:.80} can't be read: {error}") from None
        found: torch.Tensor = made["pixel_values"][0]
        return found

    def examples(self, row: Row, train: bool) -> list[Example]:
        """Return the pixels and the number of the class."""
        return [{"pixel_values": self.pixels(row), "label": self.number_of(row)}]

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return pixels (M, C, H, W) and labels (M,)."""
        pixels = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixels, "labels": torch.tensor([e["label"] for e in examples])}

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> Evaluation:
        """Return accuracy, macro F1 and loss, and the confusion matrix."""
        return scores.evaluate_classes(self, model, examples, batch_size)

    def ask(self, row: Row) -> Example:
        """Return the pixels."""
        return {"pixel_values": self.pixels(row), "label": 0}

    def predict(self, model: nn.Module, asked: Sequence[Any], batch_size: int) -> list[Any]:
        """Return each image's class with its probability."""
        return predict_classes(self, model, asked, batch_size)

    def save(self, directory: Path) -> None:
        """Write the image processor."""
        if hasattr(self.processor, "save_pretrained"):
            self.processor.save_pretrained(directory)


def find_image(name: str, place: str) -> Path:
    """Return the path of an image: as it is, or beside the file that names it."""
    path = Path(name)
    beside = Path(place.rpartition(":")[0] or place).parent / name
    return path if path.exists() or not beside.exists() else beside


def plain_processor(config: Any) -> Any:
    """Return a processor that scales to the config's image size, and pixels to -1 ... 1."""
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    kind = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    middle = [0.5] * getattr(config, "num_channels", 3)
    return kind(size={"height": height, "width": width}, image_mean=middle, image_std=list(middle))


def mode_of(channels: int) -> str:
    """Return Pillow's name for images of so many channels.

    Raises:
        Refusal: there is none.
    """
    if channels not in MODES:
        raise Refusal(
            f"the model must see images of 1, 3 or 4 channels, but it sees {channels}; choose"
            " another"
        )
    return MODES[channels]


TASK = ImageClassification
