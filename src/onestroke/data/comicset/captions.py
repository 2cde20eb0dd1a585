"""Natural-language captions: each names a random part of what is drawn, in one of many phrasings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onestroke.data.comicset.character import Character
from onestroke.data.comicset.vocabulary import load_style

NOUNS = ("person", "character", "figure")
OPENINGS = ("", "", "a drawing of ", "a comic portrait of ", "a picture of ", "a comic drawing of ")
BACKGROUNDS = ("on {}", "against {}", "in front of {}")


@dataclass(frozen=True)
class Caption:
    """`text`, and the attributes it names with their values ("style" among them)."""

    text: str
    named: Mapping[str, str]


def make_caption(character: Character, rng: np.random.Generator, *, share: float | None = None) -> Caption:
    """A caption that names each visible attribute with probability `share`.

    `share` in [0, 1]; by default drawn anew for each caption from [0.25, 0.95], so that some prompts leave much
    room and some little. A held-out pair is always named, and a caption names at least one attribute.
    """
    share = rng.uniform(0.25, 0.95) if share is None else share
    known = {"style": character.style, **character.values}
    forced = {name for name, _ in character.held_out}
    names = [name for name in known if name in forced or rng.random() < share]
    names = names or [list(known)[rng.integers(len(known))]]
    named = {name: known[name] for name in names}
    return Caption(_write(character.style, named, rng), named)


def odds_of_silence(character: Character) -> float:
    """How likely a caption is to name nothing of `character`, if it names each visible attribute half the time.

    Captions name what is there, so glasses that go unnamed are rarer than glasses. A blank caption that says as little
    as these do has to stand for pictures by these odds; else guidance, which leads away from what a blank caption
    draws, leads away from glasses wherever none are named.
    """
    return 0.5 ** (1 + len(character.values))


def _write(style_name: str, named: Mapping[str, str], rng: np.random.Generator) -> str:
    style = load_style(style_name)

    def pick(choices: Sequence[str]) -> str:
        return choices[rng.integers(len(choices))]

    parts: dict[str, list[str]] = {role: [] for role in ("adjective", "with", "wearing", "doing", "background")}
    color = named.get("hair color", "")
    for attribute in style.attributes:
        if attribute.name not in named or attribute.role == "hair color":
            continue
        phrase = pick(attribute[named[attribute.name]].phrases)
        if attribute.role == "hair":
            parts["with"].append(phrase.replace("{color}", color))
        else:
            parts[attribute.role].append(phrase)
    if color and "hair" not in named:
        parts["with"].append(f"{color} hair")
    rng.shuffle(parts["with"])
    look = pick(style.phrases) if "style" in named else ""
    text = _as_tags(parts, look, pick, rng) if rng.random() < 0.2 else _as_sentence(parts, look, pick, rng)
    return _tidy(text)


def _as_tags(parts: Mapping[str, list[str]], look: str, pick, rng: np.random.Generator) -> str:
    tags = [phrase for phrases in parts.values() for phrase in phrases]
    rng.shuffle(tags)
    subject = f"a {pick(NOUNS)}" if rng.random() < 0.5 else "portrait"
    return ", ".join([*([look] if look else []), subject, *tags])


def _as_sentence(parts: Mapping[str, list[str]], look: str, pick, rng: np.random.Generator) -> str:
    text = pick(OPENINGS) + " ".join(["a", *parts["adjective"], pick(NOUNS)])
    if parts["with"]:
        text += pick((" with ", " with ", " who has ")) + _listed(parts["with"])
    if parts["wearing"]:
        text += (", " if parts["with"] else " ") + "wearing " + _listed(parts["wearing"])
    if parts["doing"]:
        text += (", " if parts["with"] or parts["wearing"] else " ") + _listed(parts["doing"])
    if parts["background"]:
        text += pick((" ", ", ")) + pick(BACKGROUNDS).format(parts["background"][0])
    if look:
        text = pick((f"{look}, {text}", f"{text}, {look}", f"{text} in {look}"))
    return text


def _listed(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _tidy(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return re.sub(r"\ban (?=[^aeiou])", "a ", text)
