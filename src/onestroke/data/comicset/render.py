"""Characters to pictures: DiceBear draws the vector picture, resvg the pixels."""

from __future__ import annotations

import io
import json
from functools import cache
from importlib.resources import files

import numpy as np
import resvg
from dicebear import Avatar
from dicebear import Style as AvatarStyle
from PIL import Image

from onestroke.data.comicset.character import Character


@cache
def _avatar_style(name: str) -> AvatarStyle:
    return AvatarStyle(json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8")))


@cache
def _resvg_options():
    return resvg.usvg.Options.default()


def render(character: Character, *, size: int = 128) -> np.ndarray:
    """The character as uint8 RGB, h w 3, `size` pixels on each side (1 to 4096)."""
    # `size` sets the SVG's own width and height, so the transform is the identity (row-major: a c e b d f).
    svg = Avatar(_avatar_style(character.style), {"size": size, **character.options}).to_string()
    png = resvg.render(resvg.usvg.Tree.from_str(svg, _resvg_options()), (1, 0, 0, 0, 1, 0))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
