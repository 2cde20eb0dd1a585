"""Picture files: what strangers upload, read with suspicion; what the server answers, with its origin inside."""

from __future__ import annotations

import base64
import binascii
import io
import struct
from collections.abc import Mapping

import numpy as np
from isal import isal_zlib
from PIL import Image, ImageFilter, ImageOps
from PIL.PngImagePlugin import PngInfo, putchunk

from onestroke.picture_metadata import metadata_options
from onestroke.serve.order import Limits, RequestError, Start

READABLE = ("PNG", "JPEG", "WEBP")
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
PNG_MAGIC, PNG_RGB8, PNG_UP = b"\x89PNG\r\n\x1a\n", (8, 2, 0, 0, 0), 2  # RFC 2083: header, filter "up"
FEATHER = 1.0  # pixels that a mask's edge is softened by


def picture_bytes(picture: np.ndarray, kind: str, metadata: Mapping[str, str]) -> bytes:
    """`picture` (h w 3, uint8) as a "png", "jpeg" or "webp" file with `metadata` in it.

    PNG: a text chunk for each entry. JPEG and WebP: JSON in Exif's ImageDescription.
    """
    file, options = io.BytesIO(), metadata_options(kind.upper(), metadata)
    if kind == "png":
        _write_png(picture, options["pnginfo"], file)
    else:
        Image.fromarray(picture).save(file, kind.upper(), **options)
    return file.getvalue()


def _write_png(picture: np.ndarray, metadata: PngInfo, file: io.BytesIO) -> None:
    """A PNG a tenth larger than Pillow's, in a twentieth of its time: what is written here competes with drawing."""
    height, width, _ = picture.shape
    lines = np.empty((height, 1 + 3 * width), np.uint8)
    lines[:, 0], lines[:, 1:] = PNG_UP, picture.reshape(height, -1)
    lines[1:, 1:] -= picture.reshape(height, -1)[:-1]
    file.write(PNG_MAGIC)
    putchunk(file, b"IHDR", struct.pack(">2I5B", width, height, *PNG_RGB8))
    for name, content, *_ in metadata.chunks:
        putchunk(file, name, content)
    putchunk(file, b"IDAT", isal_zlib.compress(lines, 1))
    putchunk(file, b"IEND", b"")


def read_picture(data: bytes, limits: Limits, *, where: str) -> Image.Image:
    """An uploaded PNG, JPEG or WebP, upright; RGB or RGBA. Raises `RequestError`, before its pixels are unpacked
    where they are too many."""
    try:
        image = Image.open(io.BytesIO(data), formats=READABLE)
        if image.width * image.height > limits.upload_pixels:
            raise RequestError(
                f"the picture has {image.width} x {image.height} pixels",
                where=where,
                fix=f"Send at most {limits.upload_pixels:,} pixels.",
            )
        image = ImageOps.exif_transpose(image)
        return image.convert("RGBA" if "A" in image.mode or "transparency" in image.info else "RGB")
    except RequestError:
        raise
    except Exception as error:  # Pillow's readers raise OSError, ValueError, SyntaxError, struct.error and others
        raise RequestError(
            "this is no picture that can be read", where=where, fix="Send a whole PNG, JPEG or WebP file."
        ) from error


def read_base64(text: str, limits: Limits, *, where: str) -> Image.Image:
    """A picture in base64, with or without the head of a `data:` address. No other address is ever opened."""
    body = text.partition(",")[2] if text.startswith("data:") else text
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("this is not base64", where=where, fix="Send the bytes of a picture in base64.") from error
    return read_picture(data, limits, where=where)


def start_of(image: Image.Image, size: tuple[int, int], *, strength: float, mask: Image.Image | None = None) -> Start:
    """The start of image-to-image: `image` scaled and cut to `size` (height, width).

    The redrawn region is where `mask` is transparent (OpenAI's rule), or bright where it has no transparency; without
    a mask, where `image` itself is transparent, and everywhere if it is nowhere.
    """
    if not 0.0 < strength <= 1.0:
        raise RequestError(f"{strength} is no strength", where="strength", fix="Send more than 0 and at most 1.")
    if mask is not None and mask.size != image.size:
        raise RequestError(
            f"the mask has {mask.width} x {mask.height} pixels and the picture {image.width} x {image.height}",
            where="mask",
            fix="Send both of one size.",
        )
    region = _region(mask) if mask is not None else _region(image) if image.mode == "RGBA" else None
    if mask is None and region is not None and region.getextrema() == (0, 0):
        region = None
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image.convert("RGB"), mask=image.getchannel("A") if image.mode == "RGBA" and mask is None else None)
    pixels = np.asarray(_cut(paper, size))
    if region is None:
        return Start(pixels, strength)
    soft = _cut(region, size).filter(ImageFilter.GaussianBlur(FEATHER))
    return Start(pixels, strength, np.asarray(soft, dtype=np.float32) / 255.0)


def _region(mask: Image.Image) -> Image.Image:
    """Bright where to redraw."""
    if mask.mode == "RGBA" and mask.getchannel("A").getextrema()[0] < 255:
        return ImageOps.invert(mask.getchannel("A"))
    return mask.convert("L") if mask.mode != "RGBA" else mask.convert("RGB").convert("L")


def _cut(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
