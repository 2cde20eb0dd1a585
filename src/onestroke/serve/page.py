"""The studio's page: packaged files, read once. A request names one of them or nothing; its path is never opened."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.exceptions import HTTPException

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "ttf": "font/ttf",
    "txt": "text/plain; charset=utf-8",
}

router = APIRouter(include_in_schema=False)


@cache
def studio_files() -> dict[str, bytes]:
    """Every file of the page by its name below studio/, as in "fonts/bangers.ttf"."""
    found: dict[str, bytes] = {}

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.rpartition(".")[2] in MEDIA_TYPES:
                found[prefix + entry.name] = entry.read_bytes()

    walk(files(__package__).joinpath("studio"), "")
    return found


@router.get("/")
async def index() -> Response:
    return _file("index.html")


@router.get("/studio/{name:path}")
async def part(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    content = studio_files().get(name)
    if content is None:
        raise HTTPException(404, "the studio has no such file")
    kind = MEDIA_TYPES[name.rpartition(".")[2]]
    return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})
