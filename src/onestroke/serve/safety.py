"""An optional model that looks at every picture before it is handed out: any image classifier, by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from onestroke.errors import ModelError, RecipeError
from onestroke.serve.order import RequestError


class Withheld(RequestError):
    """A picture that the safety model does not let pass."""


class Safety:
    """Withholds pictures that a classifier gives one of the blocked labels."""

    def __init__(
        self, model: torch.nn.Module, processor, *, blocked: Sequence[str], threshold: float = 0.5, name: str = ""
    ) -> None:
        """`blocked`: labels of the model. `threshold`: the probability, in (0, 1], from which one counts.
        Raises `RecipeError` for a label that the model does not have."""
        labels = {label.lower(): int(index) for index, label in model.config.id2label.items()}
        missing = [label for label in blocked if label.lower() not in labels]
        if missing or not blocked:
            raise RecipeError(
                f"the safety model has no label {', '.join(missing)}" if missing else "no label is to be withheld",
                where="--safety-block",
                fix=f"Choose of {', '.join(sorted(labels))}.",
            )
        self._model, self._processor, self.threshold, self.name = model.eval(), processor, threshold, name
        self._blocked = {labels[label.lower()]: label for label in blocked}

    @torch.inference_mode()
    def check(self, pictures: Sequence[np.ndarray]) -> list[Withheld | None]:
        """For each picture (h w 3, uint8) why it is withheld, or None."""
        inputs = self._processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        pixels = inputs["pixel_values"].to(self._model.device, self._model.dtype)
        shares = self._model(pixel_values=pixels).logits.float().softmax(dim=-1).cpu()  # n labels
        found: list[Withheld | None] = []
        for row in shares:
            worst = max(self._blocked, key=lambda index: float(row[index]))
            if float(row[worst]) >= self.threshold:
                message = f"the safety model withholds this picture ({self._blocked[worst]})"
                found.append(Withheld(message, where="prompt", fix="Ask for another picture."))
            else:
                found.append(None)
        return found


def load_safety(model: str, *, blocked: Sequence[str], threshold: float, device: torch.device) -> Safety:
    """The image classifier of a folder or a hub id, from safetensors. Raises `ModelError` and `RecipeError`."""
    try:
        classifier = AutoModelForImageClassification.from_pretrained(model, use_safetensors=True).to(device)
        processor = AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "this is no image classifier that can be read",
            where=model,
            fix="Give a folder or a hub id of a transformers image classifier with safetensors weights.",
        ) from error
    return Safety(classifier, processor, blocked=blocked, threshold=threshold, name=model)
