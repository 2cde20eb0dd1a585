"""Comic characters drawn from real artists' parts, with captions: a pure function of (seed, split, index).

The function `render` stays in its module `render`, whose name it would hide here.
"""

from onestroke.data.comicset.captions import Caption, make_caption
from onestroke.data.comicset.character import SPLITS, Character, draw_character
from onestroke.data.comicset.dataset import ComicSource, write_comicset
from onestroke.data.comicset.vocabulary import STYLE_NAMES, judged_values, load_style

__all__ = [
    "SPLITS",
    "STYLE_NAMES",
    "Caption",
    "Character",
    "ComicSource",
    "draw_character",
    "judged_values",
    "load_style",
    "make_caption",
    "write_comicset",
]
