"""The model card that goes with an exported student."""

from __future__ import annotations

import re

import yaml

from onestroke.config import Recipe, recipe_from, recipe_text
from onestroke.errors import RecipeError

TRIES = "What was tried"  # the heading of what brought a student nearer to its aims, and what did not
NOT_MEASURED = "Not measured yet: run `onestroke evaluate` on this folder.\n"
_EVALUATION = re.compile(r"(?<=^## Evaluation\n\n).*?(?=^## |\Z)", re.M | re.S)
_RECIPE = re.compile(r"^## Recipe\n+```yaml\n(.*?)^```", re.M | re.S)


def model_card(recipe: Recipe, *, images: int, sharpened: int = 0, figures: str = "") -> str:
    """README.md of the student's folder: how to draw with it, the recipe, and the figures where there are any.

    It was trained by ADD on `images` pictures, and then sharpened on `sharpened` prompts.
    """
    evaluation = figures or NOT_MEASURED
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, distillation, adversarial-diffusion-distillation, onestroke]
---
# {recipe.name}

A 1-to-4-step student of `{recipe.teacher.source}`, made by onestroke with Adversarial Diffusion Distillation
(ADD, arXiv 2311.17042) on {images:,} pictures{_before(recipe)}.{_after(recipe, sharpened)}

```python
from diffusers import AutoPipelineForText2Image

pipeline = AutoPipelineForText2Image.from_pretrained("THIS_FOLDER")
image = pipeline("a laughing person with pink hair", num_inference_steps=1, guidance_scale=0.0).images[0]
```

Draw with `guidance_scale=0.0` and 1, 2 or 4 steps. Image-to-image needs `int(num_inference_steps * strength) >= 1`.

## Evaluation

{evaluation}
## Recipe

```yaml
{recipe_text(recipe)}```
"""


def _before(recipe: Recipe) -> str:
    """What the student was before ADD, where it was not its teacher."""
    before = ""
    if recipe.anchors.images:
        before += f", after {recipe.anchors.images:,} showings of {recipe.anchors.count:,} that the teacher had drawn"
        if recipe.anchors.kept:
            before += f" ({recipe.anchors.kept:.0%} of each weight is from then)"
    if recipe.student.source:
        before += f", beginning from the student `{recipe.student.source}`"
    return before


def _after(recipe: Recipe, sharpened: int) -> str:
    """What came after ADD."""
    if not sharpened:
        return ""
    settings, learnt = recipe.sharpen, []
    first, later = settings.amounts
    if first or later:
        amounts = f"{first:.0%}" + ("" if later == first else f", after the first step {later:.0%}")
        learnt.append(f"to draw as under an unsharp mask ({amounts}, radius {settings.radius:g} pixels)")
    if settings.gain != 1:
        learnt.append(f"to draw {settings.gain:g} times its latents in its first step")
    if settings.text_gain != 1:
        learnt.append(f"to draw in its first step what it makes of {settings.text_gain:g} times the words")
    if settings.ahead:
        learnt.append("to draw in its first step what a second one made of it")
    return f" On {sharpened:,} prompts it then learnt {' and '.join(learnt)} from its own pictures."


def with_evaluation(card: str, section: str) -> str | None:
    """The card with `section` for its evaluation; None where it has no such heading, and is not ours to change."""
    if not _EVALUATION.search(card):
        return None
    return _EVALUATION.sub(lambda _: section.rstrip("\n") + "\n\n", card, count=1).rstrip("\n") + "\n"


def section_of(card: str, heading: str) -> str:
    """What stands under a heading of the second level, a line for each paragraph or point; "" where there is none."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", card, re.M | re.S)
    return re.sub(r"(?<!\n)\n(?!\n|- ) *", " ", found[1].strip()) if found else ""


def recipe_in(card: str) -> Recipe | None:
    """The recipe that a card was written with; None where there is none that this version reads."""
    found = _RECIPE.search(card)
    if not found:
        return None
    try:
        return recipe_from(yaml.safe_load(found[1]) or {})
    except (yaml.YAMLError, RecipeError):
        return None
