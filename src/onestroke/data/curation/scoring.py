"""A score by any transformers image classifier, by folder or hub id: safety, aesthetics, what a team trained."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from onestroke.data.curation.recipe import Score
from onestroke.errors import ModelError

Scorer = Callable[[UInt8[np.ndarray, "h w 3"]], float]


def load_scorer(stage: Score, *, name: str) -> Scorer:
    """The scorer of the stage `name`; raises ModelError that says how to get the network or switch the stage off."""
    from transformers import AutoModelForImageClassification, ImageProcessingMixin

    try:
        model = AutoModelForImageClassification.from_pretrained(stage.model).eval().requires_grad_(False)
        settings, _ = ImageProcessingMixin.get_image_processor_dict(stage.model)
    except Exception as error:  # transformers, safetensors and the hub each raise their own kinds
        raise ModelError(
            f"the network cannot be loaded ({type(error).__name__}: {_first_line(error)})",
            where=f"{name}.model {stage.model}",
            fix="Download an image classification model of the Hugging Face hub into a folder and name the folder, or "
            f"set {name}.enabled to false.",
        ) from error
    picked = _picked_labels(model.config, stage, name)

    def score(image: UInt8[np.ndarray, "h w 3"]) -> float:
        logits = model(pixel_values=_prepared(image, settings)).logits[0].float()
        return float(logits.softmax(0)[picked].sum()) if picked else float(logits[0])

    return score


def _picked_labels(config, stage: Score, name: str) -> list[int]:
    """The outputs that count; none where the model has one output, which is the score itself."""
    known = {str(label).lower(): int(number) for number, label in config.id2label.items()}
    unknown = [label for label in stage.labels if label.lower() not in known]
    if unknown or (not stage.labels and len(known) > 1):
        what = f"no label {unknown[0]!r}" if unknown else f"{len(known)} labels and none chosen"
        raise ModelError(what, where=f"{name}.labels", fix=f"Choose of {', '.join(sorted(known)[:20])}.")
    return [known[label.lower()] for label in stage.labels]


def _prepared(image: UInt8[np.ndarray, "h w 3"], settings: dict) -> torch.Tensor:
    """As the model's own preprocessor page says: resized, cropped, scaled, normalised; 1 3 h w."""
    picture = Image.fromarray(image)
    size, crop = (_sides(settings.get(name)) for name in ("size", "crop_size"))
    if "shortest_edge" in size:
        scale = size["shortest_edge"] / min(picture.size)
        picture = picture.resize(tuple(max(1, round(scale * side)) for side in picture.size), Image.Resampling.BICUBIC)
    elif "height" in size:
        picture = picture.resize((size["width"], size["height"]), Image.Resampling(settings.get("resample") or 2))
    if settings.get("do_center_crop") and "height" in crop:
        left, top = (picture.width - crop["width"]) // 2, (picture.height - crop["height"]) // 2
        picture = picture.crop((left, top, left + crop["width"], top + crop["height"]))
    pixels = torch.from_numpy(np.array(picture)).float() * (settings.get("rescale_factor") or 1 / 255)
    if settings.get("do_normalize", True):
        pixels = (pixels - torch.tensor(settings["image_mean"])) / torch.tensor(settings["image_std"])
    return pixels.permute(2, 0, 1)[None]


def _sides(size: dict | int | None) -> dict:
    return {"height": size, "width": size} if isinstance(size, int) else size or {}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
