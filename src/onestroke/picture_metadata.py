"""What a picture was drawn from, inside its file."""

from __future__ import annotations

import json
from collections.abc import Mapping

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo


def metadata_options(kind: str, metadata: Mapping[str, str]) -> dict:
    """What Pillow's `save` takes to put `metadata` into a file of `kind`: "PNG", "JPEG" or "WEBP"."""
    if kind == "PNG":
        chunks = PngInfo()
        for name, value in metadata.items():
            chunks.add_itxt(name, value) if not value.isascii() else chunks.add_text(name, value)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(metadata)
    exif[ExifTags.Base.Software] = metadata["software"]
    return {"exif": exif.tobytes(), "quality": 95}
