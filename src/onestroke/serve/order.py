"""What a request asks for once it is checked: one picture."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from onestroke.errors import OnestrokeError

MAX_SEED = 2**32 - 1


class RequestError(OnestrokeError):
    """A request that cannot be drawn as it stands; `where` names its field."""


class UnknownModel(RequestError):
    """A request for a model that this server does not have."""


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    prompt: int = 2000  # characters
    steps: int = 50
    count: int = 10  # pictures of one request
    pixels: int = 1024 * 1024  # of one picture
    upload_bytes: int = 8 * 2**20  # of a whole HTTP request or one WebSocket frame
    upload_pixels: int = 16_000_000  # of an uploaded picture, before it is scaled
    panels: int = 64  # that one WebSocket has waiting at once


@dataclass(frozen=True, eq=False)
class Start:
    """What image-to-image starts from."""

    image: np.ndarray  # h w 3, uint8, of the order's size
    strength: float  # in (0, 1]: how far up the noise schedule drawing begins; 1 forgets the image
    mask: np.ndarray | None = None  # h w in [0, 1], 1 where the picture is redrawn; None: everywhere


@dataclass(frozen=True, eq=False)
class Order:
    """One picture. The same order is the same picture, whatever it is batched with."""

    model: str
    prompt: str
    seed: int
    steps: int
    size: tuple[int, int]  # height, width in pixels, one that the model draws
    start: Start | None = None
    strict: bool = False  # drawn alone: the same bits every time
    lora: tuple[str, float] | None = None  # name and scale

    @property
    def mode(self) -> str:
        return "draw" if self.start is None else "redraw"

    @property
    def key(self) -> Hashable:
        """Orders of one key can share a batch."""
        strength = None if self.start is None else self.start.strength
        return (self.model, self.size, self.steps, self.mode, strength, self.lora)


@dataclass(frozen=True)
class Notice:
    """Something that the answer differs in from what was asked, in words for the one who asked."""

    kind: str  # "prompt cut" | "size snapped" | "unknown words" | "ignored"
    message: str
    detail: list[str] = field(default_factory=list)
