"""Distil a diffusers text-to-image model into one that draws in 1 to 4 steps.

import onestroke

onestroke.load()("a laughing person with pink hair", num_inference_steps=1, guidance_scale=0.0).images[0]
onestroke.distill("mini", "runs/mini", minutes=10)
onestroke.comicset("pictures", count=1000)
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["comicset", "distill", "load"]


def __getattr__(name: str):  # importing torch and diffusers takes seconds: only when used
    if name in __all__:
        from onestroke import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
