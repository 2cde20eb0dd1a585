"""What a curation does: one frozen section a stage, with its threshold, read from YAML.

A stage's `function`, "module:function", replaces ours; what it is given and gives back stands in the section's comment.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, StringConstraints, model_validator

from onestroke.config import Section, validated
from onestroke.errors import RecipeError


class DecodeStage(Section):
    """Function: (bytes) -> picture, uint8 h w 3; raises ValueError where it cannot."""

    function: str | None = None
    max_pixels: int = Field(89_000_000, ge=1, le=178_000_000)  # refused before decoding
    animated: Literal["first", "drop"] = "first"  # frame that is kept


class Limit(Section):
    """A score of the picture and the range that is kept. Function: (picture, uint8 h w 3) -> score."""

    enabled: bool = True
    function: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    def keeps(self, score: float) -> bool:
        return (self.at_least is None or score >= self.at_least) and (self.at_most is None or score <= self.at_most)

    @property
    def bounds(self) -> str:
        """As text: "at least 3"."""
        named = (("at least", self.at_least), ("at most", self.at_most))
        return " and ".join(f"{name} {value:g}" for name, value in named if value is not None) or "anything"


Language = Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}$")]


class CaptionStage(Section):
    """Function: (caption, or None where there is none) -> the cleaned caption; an empty one drops the picture."""

    enabled: bool = True
    function: str | None = None
    tags: bool = True  # booru tags become a sentence
    boilerplate: tuple[str, ...] = ()  # regular expressions to strike out, beside our own
    scripts: tuple[str, ...] = ("latin",)  # as Unicode names them in lower case; empty: any
    min_script_share: float = Field(0.8, ge=0, le=1)  # of the letters
    languages: tuple[Language, ...] = ("en",)  # ISO 639 codes of those that are kept; empty: any
    min_confidence: float = Field(0.6, ge=0, le=1)  # with which another language has to be seen
    min_chars: int = Field(3, ge=1)
    max_chars: int = Field(1000, ge=1)  # longer ones are cut at the end of a sentence or phrase


class ExactStage(Section):
    """The same bytes or the same decoded pixels. Function: (picture, uint8 h w 3) -> bytes that copies share."""

    enabled: bool = True
    function: str | None = None


class NearStage(Section):
    """Function: (thumbnail, thumbnail, each uint8 32 32 3) -> difference of two pictures with similar hashes."""

    enabled: bool = True
    function: str | None = None
    at_most: float = Field(23.0, ge=0)  # levels of 255 in which the least similar tenth of two pictures differs


class Score(Limit):
    """A transformers image classifier's score. Function: (picture, uint8 h w 3) -> score."""

    enabled: bool = False
    model: str | None = None  # folder or hub id
    labels: tuple[str, ...] = ()  # whose probabilities add up to the score; none: the raw output of a one-output model

    @model_validator(mode="after")
    def _can_score(self):
        if self.enabled and not (self.model or self.function):
            raise ValueError("it is enabled and needs a model (a transformers image classifier) or a function")
        return self


class RecaptionStage(Section):
    """Function: (picture, uint8 h w 3, caption) -> new caption."""

    enabled: bool = False
    function: str | None = None
    when: Literal["missing", "always"] = "missing"  # missing: where the caption stage leaves none
    model: str | None = None  # a vision-language model's folder or hub id, or its name at the endpoint
    endpoint: str | None = None  # OpenAI-compatible base URL, up to /v1
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the endpoint's key, if it wants one
    prompt: str = "Describe this picture in one sentence, as a caption for training an image generator."
    max_tokens: int = Field(120, ge=1)
    timeout: float = Field(60.0, gt=0)  # seconds a request may take
    max_side: int = Field(768, ge=32)  # pixels of what the model is shown

    @model_validator(mode="after")
    def _can_caption(self):
        if self.enabled and not (self.model or self.function):
            raise ValueError("it is enabled and needs a model, or a function")
        return self


class OutputRecipe(Section):
    shard_size: int = Field(1000, ge=1)  # pictures, of which fewer are left where late stages drop some
    format: Literal["keep", "png", "jpeg", "webp"] = "keep"  # keep: sound files byte for byte, others as PNG
    quality: int = Field(95, ge=1, le=100)  # of jpeg; webp is lossless


class CurationRecipe(Section):
    """The stages in the order in which a picture passes them."""

    decode: DecodeStage = DecodeStage()
    size: Limit = Limit(at_least=256)  # the shorter side, pixels
    aspect: Limit = Limit(at_most=3.0)  # longer side by shorter
    blur: Limit = Limit(at_least=0.4)  # sharpness of the edges: 0 none, about 0.9 hard
    flat: Limit = Limit(at_most=0.985)  # share of the picture without anything to see
    borders: Limit = Limit(at_most=0.05)  # share of the picture that is frame or bars
    text: Limit = Limit(at_most=0.2)  # share of the picture covered by lines of text
    greyscale: Limit = Limit(at_least=2.0)  # colour that brightness does not explain, levels of 255
    captions: CaptionStage = CaptionStage()
    exact: ExactStage = ExactStage()
    near: NearStage = NearStage()
    safety: Score = Score(at_most=0.5)
    aesthetic: Score = Score(at_least=0.0)
    recaption: RecaptionStage = RecaptionStage()
    output: OutputRecipe = OutputRecipe()


MEASURED = ("size", "aspect", "blur", "flat", "borders", "text", "greyscale")  # by pixels alone
SCORED = ("safety", "aesthetic")  # by a network, of what the others leave
STAGES = ("read", "decode", *MEASURED, "captions", "exact", "near", *SCORED, "recaption")


def load_curation(path: str | Path | None) -> CurationRecipe:
    """The recipe in a YAML file; None: every default. Raises RecipeError with the nearest known key."""
    if path is None:
        return CurationRecipe()
    if not Path(path).is_file():
        raise RecipeError("there is no such recipe", where=str(path), fix="Give a YAML file such as curate.yaml.")
    try:
        tree = yaml.safe_load(Path(path).read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError("this is not YAML", where=str(path), fix=" ".join(str(error).split())) from error
    return validated(CurationRecipe, _with_defaults(tree), where=str(path))


def _with_defaults(tree):
    """A section of the file changes what it names; the stage's other defaults stay."""
    if not isinstance(tree, dict):
        return tree
    filled = dict(tree)
    for name, section in CurationRecipe().model_dump().items():
        if isinstance(tree.get(name), dict):
            filled[name] = {**section, **tree[name]}
    return filled


def function_of(name: str, *, stage: str) -> Callable:
    """The user's "module:function", also from the current folder; raises RecipeError where there is none."""
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise RecipeError(f"{name!r} is not of the form module:function", where=f"{stage}.function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        fix = "Put the module into the current folder, or install it."
        raise RecipeError(f"{name!r} cannot be imported ({error})", where=f"{stage}.function", fix=fix) from error
    if not callable(found):
        raise RecipeError(f"{name!r} is no function", where=f"{stage}.function")
    return found
