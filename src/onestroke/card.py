"""The model card that goes with an exported student."""

from __future__ import annotations

import yaml

from onestroke.config import Recipe


def model_card(recipe: Recipe, *, images: int, figures: str = "") -> str:
    """README.md of the student's folder: how to draw with it, the recipe, and the figures where there are any."""
    resolved = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    evaluation = figures or "Not measured yet: run `onestroke report` on this folder.\n"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, distillation, adversarial-diffusion-distillation, onestroke]
---
# {recipe.name}

A 1-to-4-step student of `{recipe.teacher.source}`, made by onestroke with Adversarial Diffusion Distillation
(ADD, arXiv 2311.17042) on {images:,} pictures.

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
{resolved}```
"""
