"""`onestroke serve` and `onestroke studio`: a model behind HTTP and a WebSocket, with the page or without."""

from __future__ import annotations

import errno
import importlib.util
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from onestroke import __version__
from onestroke.api import load
from onestroke.build import device_of
from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.embedded import GUIDANCE, STUDENT, TEACHER
from onestroke.embedded.vocabulary import completions, unknown_words
from onestroke.errors import RecipeError, ResourceError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from onestroke.serve.drawer import Drawer
    from onestroke.serve.replica import Replica

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "websockets", "isal")
TEACHER_STEPS = 25


@dataclass(frozen=True)
class Address:
    """Where the server listens and by which names it is called."""

    host: str = "127.0.0.1"
    port: int = 8188
    names: tuple[str, ...] = ()  # besides this machine's own
    token: str | None = None


@dataclass(frozen=True)
class House:
    """What a server offers besides its first model, and its rules."""

    also: tuple[str, ...] = ()  # further models, as MODEL or NAME=MODEL
    memory_gb: float | None = None  # weights that are loaded at once
    loras: Path | None = None  # a folder of LoRAs that requests may name
    per_minute: float | None = None  # pictures of one address
    safety: str | None = None  # an image classifier that looks at every picture
    safety_block: tuple[str, ...] = ("nsfw",)  # its labels
    safety_threshold: float = 0.5  # probability from which a label counts


@dataclass(frozen=True)
class Offer:
    """All that the application is built from, as plain data: it may be built on another machine."""

    model: str
    teacher: str | None = None  # a model to compare with, served beside `model`
    address: Address = Address()
    house: House = House()
    wait_ms: float = 5.0  # that a request waits for company
    max_batch: int = 16
    max_queue: int = 128
    with_page: bool = False


def run_serve(offer: Offer, *, console: Console) -> None:
    """Serve until interrupted."""
    check_installed()
    check_address(offer.address)
    listener = listen(offer.address)
    with listener:
        import uvicorn

        app = app_of(offer)
        announce(offer, listener.getsockname()[1], console)
        config = uvicorn.Config(
            app, log_level="warning", ws_max_size=app.state.desk.limits.upload_bytes, ws_ping_interval=20,
            ws_ping_timeout=20, timeout_graceful_shutdown=3, proxy_headers=False, server_header=False,
            ws_per_message_deflate=False,  # pictures are compressed already
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listener])


def check_address(address: Address) -> None:
    """Refuse an open address without a token. Raises `RecipeError`."""
    from onestroke.serve.guard import check_token

    check_token(address.token, address.host)


def app_of(offer: Offer, *, replica: Replica | None = None) -> FastAPI:
    """The application with its models loaded; `replica` where it is one of several."""
    from onestroke.serve.app import build_app
    from onestroke.serve.batcher import Pace
    from onestroke.serve.guard import LOCAL_NAMES, Rules
    from onestroke.serve.order import Limits

    quiet_libraries()
    use_machine()
    limits, address, house = Limits(), offer.address, offer.house
    names = {name.lower() for name in (address.host, *address.names)} - {"0.0.0.0", "::"}
    return build_app(
        drawers_of(offer.model, offer.teacher, house),
        rules=Rules(LOCAL_NAMES | names, address.token, limits.upload_bytes),
        pace=Pace(offer.wait_ms / 1000, offer.max_batch, offer.max_queue),
        limits=limits,
        with_page=offer.with_page,
        version=__version__,
        memory=None if house.memory_gb is None else int(house.memory_gb * 1e9),
        per_minute=house.per_minute,
        safety=_safety(house),
        replica=replica,
    )


def announce(offer: Offer, port: int, console: Console, *, by: str = "") -> None:
    """Print where the server is; `by`: how it is served, where that is not one process."""
    address = offer.address
    shown = next(iter(sorted(address.names)), address.host)
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    names = [split_name(text)[0] for text in (offer.model, *offer.house.also)]
    names += [] if offer.teacher is None else [offer.teacher]
    console.print(f"{', '.join(names)} at {url}{by} (Ctrl-C stops)", highlight=False)
    if offer.with_page:
        page = f"{url}/#token={address.token}" if address.token else url
        console.print(f"Open {page} in a browser.", markup=False, highlight=False, soft_wrap=True)


def drawers_of(model: str, teacher: str | None, house: House) -> list[Drawer]:
    """All models of a server, the default first."""
    from onestroke.serve.loras import find_loras

    loras = find_loras(house.loras) if house.loras is not None else {}
    named = [split_name(text) for text in (model, *house.also)]
    drawers = []
    for name, source in named:
        drawers.append(drawer_of(source, name=name, loras=loras))
        if house.memory_gb is not None and len(drawers) > 1:
            drawers[-1].release()
    if teacher is not None:
        drawers.append(drawer_of(teacher, steps=TEACHER_STEPS, guidance=GUIDANCE))
    taken = [drawer.name for drawer in drawers]
    twice = next((name for name in taken if taken.count(name) > 1), None)
    if twice is not None:
        raise RecipeError("two models have this name", where=twice, fix="Give --also NAME=MODEL.")
    return drawers


def split_name(text: str) -> tuple[str, str]:
    """Name and model in "NAME=MODEL"; a model alone is its own name."""
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)=(.+)", text)
    return (match[1], match[2]) if match else (text, text)


def _safety(house: House):
    from onestroke.serve.safety import load_safety

    if house.safety is None:
        return None
    blocked, threshold = house.safety_block, house.safety_threshold
    return load_safety(house.safety, blocked=blocked, threshold=threshold, device=device_of("auto"))


def drawer_of(
    model: str,
    *,
    steps: int = 1,
    guidance: float = 0.0,
    name: str | None = None,
    loras: Mapping[str, Path] | None = None,
) -> Drawer:
    """The model called `model`, ready to draw; the embedded ones with their words."""
    from onestroke.serve.drawer import Drawer

    def pipeline():
        loaded = load(model)
        loaded.to(device_of("auto"))
        loaded.set_progress_bar_config(disable=True)
        return loaded

    embedded = model in (STUDENT, TEACHER)
    return Drawer(
        name or model,
        pipeline(),
        steps=steps,
        guidance=guidance,
        square_only=embedded,
        unknown_words=unknown_words if embedded else None,
        phrases=completions() if embedded else (),
        loras=loras,
        reload=pipeline,
    )


def listen(address: Address) -> socket.socket:
    """A socket bound to the address, before any model is loaded. Raises `ResourceError`."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
        listener.listen()
    except OSError as error:
        listener.close()
        busy = error.errno == errno.EADDRINUSE
        raise ResourceError(
            f"port {address.port} is in use" if busy else f"this address cannot be listened on ({error.strerror})",
            where=address.host,
            fix="Choose another --port, or 0 for any that is free." if busy else "Choose another --host or --port.",
        ) from error
    return listener


def check_installed() -> None:
    """Raises `ResourceError` where the extra `serve` is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ResourceError(
            f"the server needs {', '.join(missing)}",
            where="onestroke serve",
            fix='Run: pip install "onestroke[serve]".',
        )
