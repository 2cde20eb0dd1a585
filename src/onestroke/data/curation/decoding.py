"""Any picture file as upright 8-bit RGB, with what had to be mended; bombs are refused before decoding."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from onestroke.data.folder import as_rgb

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # what is written, byte for byte where it is sound
_OTHER_SUFFIXES = {"JPEG": (".jpeg", ".jpe", ".jfif"), "MPO": (".jpg", ".jpeg"), "TIFF": (".tif", ".tiff")}
_ORIENTATION = 0x0112  # EXIF
_ON_ITS_SIDE = (5, 6, 7, 8)  # orientations that change width and height


class Undecodable(Exception):
    """A file that is no picture, or one that may not be decoded; the message is the reason."""


@dataclass(frozen=True)
class Decoded:
    picture: Image.Image  # RGB, upright; smaller than the file's where that was asked for
    kind: str  # as Pillow names it: "JPEG"
    repairs: tuple[str, ...]  # what was not as a trainer wants it
    size: tuple[int, int]  # width, height of the whole picture, pixels

    @cached_property
    def image(self) -> UInt8[np.ndarray, "h w 3"]:
        return np.asarray(self.picture)


def decode(
    content: bytes, *, max_pixels: int = 89_000_000, animated: str = "first", enough: int | None = None
) -> Decoded:
    """The picture in `content`; what is transparent on white, the first frame of an animation.

    A JPEG is decoded to an eighth, a quarter or half of its size if its longer side still has `enough` pixels then:
    most of the work is left out, and damage shows all the same. Raises Undecodable for what is empty, no picture, cut
    short or damaged, larger than `max_pixels`, and for animations if they are to be dropped. Colour profiles are not
    applied.
    """
    if not content:
        raise Undecodable("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on size and odd metadata: the size is judged here
            with Image.open(io.BytesIO(content)) as image:
                _refuse(image, max_pixels, animated)
                repairs, size = tuple(_repairs(image)), image.size
                if enough and image.format == "JPEG":
                    image.draft(None, tuple(-(-side * enough // max(size)) for side in size))
                image.load()
                turned = image.getexif().get(_ORIENTATION, 1)
                size = size[::-1] if turned in _ON_ITS_SIDE else size
                picture = image if turned == 1 else ImageOps.exif_transpose(image)
                if picture.mode != "RGB" or picture.has_transparency_data:
                    picture = as_rgb(picture)
                return Decoded(picture, image.format or "", repairs, size)
    except Undecodable:
        raise
    except Image.UnidentifiedImageError as error:
        raise Undecodable("not a picture") from error
    except Image.DecompressionBombError as error:
        raise Undecodable(f"more than {max_pixels} pixels") from error
    except Exception as error:  # Pillow's decoders raise anything at all on damaged bytes
        raise Undecodable(" ".join(str(error).split()) or type(error).__name__) from error


def _refuse(image: Image.Image, max_pixels: int, animated: str) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise Undecodable(f"{width} x {height} is more than {max_pixels} pixels")
    if animated == "drop" and _is_animated(image):
        raise Undecodable("animated")


def _is_animated(image: Image.Image) -> bool:
    return image.format != "MPO" and getattr(image, "n_frames", 1) > 1  # MPO: a camera's photo with a preview


def _repairs(image: Image.Image):
    if image.getexif().get(_ORIENTATION, 1) != 1:
        yield "turned upright"
    if _is_animated(image):
        yield "first frame"
    if image.mode == "P":
        yield "palette"
    elif image.mode.startswith("I"):
        yield "16 bits"
    elif image.mode not in ("RGB", "L", "RGBA", "LA"):
        yield image.mode
    if image.has_transparency_data:
        yield "transparency"


def wrong_suffix(name: str, kind: str) -> bool:
    """Whether a file's name promises another kind of picture than it is."""
    suffix = ("." + name.rpartition(".")[2].lower()) if "." in name else ""
    return suffix not in (SUFFIXES.get(kind, f".{kind.lower()}"), *_OTHER_SUFFIXES.get(kind, ()))


def encode(image: UInt8[np.ndarray, "h w 3"], kind: str, *, quality: int = 95) -> bytes:
    """A file of kind PNG, JPEG (4:4:4) or WEBP (lossless)."""
    page = io.BytesIO()
    options = {"JPEG": {"quality": quality, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    Image.fromarray(image).save(page, kind, **options)
    return page.getvalue()
