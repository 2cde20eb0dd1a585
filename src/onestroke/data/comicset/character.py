"""Which character a picture shows: a pure function of (seed, split, index)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onestroke.data.comicset.vocabulary import STYLE_NAMES, Fact, Style, load_style

SPLITS = ("train", "validation", "held-out")
MAX_DRAWS = 100


@dataclass(frozen=True)
class Character:
    """What is drawn: the values that a caption may name, and the DiceBear options that draw them.

    `values` maps attribute to value for all that can be seen; what is hidden or absent is not in it.
    `held_out` is the pair that training never shows together, empty outside the held-out split.
    """

    style: str
    values: Mapping[str, str]
    options: Mapping[str, object]
    held_out: tuple[Fact, ...] = ()


def generator(seed: int, split: str, index: int, stream: int) -> np.random.Generator:
    """The generator of picture `index`: `stream` 0 draws the character, 1 the caption."""
    return np.random.default_rng((seed, SPLITS.index(split), index, stream))


def draw_character(index: int, *, split: str = "train", seed: int = 0, style: str | None = None) -> Character:
    """The character of picture `index` of `split`; `style` fixes the drawing style."""
    rng = generator(seed, split, index, 0)
    chosen = load_style(style or STYLE_NAMES[rng.integers(len(STYLE_NAMES))])
    pairs = sorted(tuple(sorted(pair)) for pair in chosen.held_out) if split == "held-out" else []
    while True:
        forced = dict(pairs[rng.integers(len(pairs))]) if pairs else {}
        for _ in range(MAX_DRAWS):  # a few held-out pairs leave no room for the rest: then another pair
            drawn = _resolve(chosen, forced, rng)
            if drawn is not None:
                values, options = drawn
                return Character(chosen.name, values, options | _placement(chosen, rng), tuple(forced.items()))


def _resolve(style: Style, forced: Mapping[str, str], rng: np.random.Generator):
    """Values and options of one character, or None where the draw met a dead end."""
    options: dict[str, object] = {**style.fixed}
    options |= {name: [choices[rng.integers(len(choices))]] for name, choices in style.free.items()}
    present: dict[str, str] = {}
    unavailable: set[str] = set()
    hair_variant = ""
    for attribute in style.attributes:
        is_forced = attribute.name in forced
        if attribute.name in unavailable or (rng.random() < attribute.absent and not is_forced):
            if is_forced:
                return None
            options |= {f"{component}Probability": 0 for component in attribute.components}
            continue
        others = {**present, **{name: value for name, value in forced.items() if name != attribute.name}}
        candidates = [v for v in attribute.values if style.allows((attribute.name, v.name), others)]
        if is_forced:
            candidates = [attribute[forced[attribute.name]]]
            free_others = {name: value for name, value in present.items() if name not in forced}
            if not style.allows((attribute.name, forced[attribute.name]), free_others):
                return None
        if not candidates:
            return None
        value = candidates[rng.integers(len(candidates))]
        for option, choices in value.draw.items():
            options[option] = [choices[rng.integers(len(choices))]]
        options |= {f"{component}Probability": 100 for component in attribute.components}
        if attribute.role == "hair":
            hair_variant = options[next(iter(value.draw))][0]
        if attribute.role == "hair color" and hair_variant in style.uncolored:
            if is_forced:
                return None
            continue
        present[attribute.name] = value.name
        unavailable |= set(style.excludes.get((attribute.name, value.name), ()))
    hidden = {name for fact in present.items() for name in style.hides.get(fact, ())}
    if hidden & forced.keys():
        return None
    return {name: value for name, value in present.items() if name not in hidden}, options


def _placement(style: Style, rng: np.random.Generator) -> dict[str, object]:
    scale = rng.uniform(*style.scale)
    low, high = style.shift_y
    if style.bust:
        low = max(low, 50 * (1 - scale))
    return {
        "scale": round(float(scale), 4),
        "translateX": round(float(rng.uniform(*style.shift_x)), 3),
        "translateY": round(float(rng.uniform(low, max(low, high))), 3),
        "flip": "horizontal" if rng.random() < 0.5 else "none",
    }
