"""The words that the embedded model was trained on, so that a prompt with others can be told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from onestroke.data.comicset.captions import BACKGROUNDS, NOUNS, OPENINGS
from onestroke.data.comicset.vocabulary import STYLE_NAMES, load_style

# What captions.py writes between the phrases; a test holds both together.
FUNCTION_WORDS = ("a", "an", "and", "has", "in", "portrait", "wearing", "who", "with")


def words_in(text: str) -> list[str]:
    """The words of a text as the tokenizer cuts it: runs of letters, in lower case ("T-shirt" is two)."""
    return re.findall(r"[^\W\d_]+", text.lower())


@cache
def known_words() -> frozenset[str]:
    """Every word that a caption of the embedded pictures may hold."""
    return frozenset(word for phrase in _phrases() for word in words_in(phrase))


def unknown_words(prompt: str) -> list[str]:
    """The words of `prompt` that no caption has, in order, each once."""
    return [word for word in dict.fromkeys(words_in(prompt)) if word not in known_words()]


@cache
def completions() -> tuple[str, ...]:
    """Whole phrases that captions hold, sorted: "round glasses", "pink hair", "a yellow background" ..."""
    found: set[str] = set()
    for style in map(load_style, STYLE_NAMES):
        found |= set(style.phrases)
        colors = [value.name for a in style.attributes if a.name == "hair color" for value in a.values]
        for attribute in style.attributes:
            if attribute.name == "hair color":
                found |= {f"{color} hair" for color in colors}
                continue
            for phrase in (phrase for value in attribute.values for phrase in value.phrases):
                tinted = [phrase.replace("{color}", color) for color in colors] if "{color}" in phrase else [phrase]
                found |= {" ".join(text.split()) for text in tinted}
    return tuple(sorted(found))


def _phrases() -> Iterator[str]:
    yield from (*FUNCTION_WORDS, *NOUNS, *OPENINGS, *(phrase.replace("{}", "") for phrase in BACKGROUNDS))
    for style in map(load_style, STYLE_NAMES):
        yield from style.phrases
        for attribute in style.attributes:
            yield from (phrase.replace("{color}", "") for value in attribute.values for phrase in value.phrases)
