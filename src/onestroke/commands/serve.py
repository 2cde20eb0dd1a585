"""`onestroke serve` and `onestroke studio`: a model behind HTTP and a WebSocket, with the page or without."""

from __future__ import annotations

import errno
import importlib.util
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from onestroke import __version__
from onestroke.api import load
from onestroke.build import device_of
from onestroke.commands.quiet import cap_threads, quiet_libraries
from onestroke.embedded import GUIDANCE, STUDENT, TEACHER
from onestroke.embedded.vocabulary import completions, unknown_words
from onestroke.errors import ResourceError

if TYPE_CHECKING:
    from onestroke.serve.drawer import Drawer

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "websockets")
TEACHER_STEPS = 25


@dataclass(frozen=True)
class Address:
    """Where the server listens and by which names it is called."""

    host: str = "127.0.0.1"
    port: int = 8188
    names: tuple[str, ...] = ()  # besides this machine's own
    token: str | None = None


def run_serve(
    model: str,
    teacher: str | None,
    address: Address,
    *,
    wait_ms: float,
    max_batch: int,
    max_queue: int,
    with_page: bool,
    console: Console,
) -> None:
    """Serve until interrupted. `teacher`, a model to compare with, is served beside `model`."""
    check_installed()
    from onestroke.serve.guard import check_token

    check_token(address.token, address.host)
    listener = listen(address)
    with listener:
        quiet_libraries()
        cap_threads()
        drawers = [drawer_of(model)]
        if teacher is not None:
            drawers.append(drawer_of(teacher, steps=TEACHER_STEPS, guidance=GUIDANCE))
        _serve(drawers, address, listener, wait_ms, max_batch, max_queue, with_page=with_page, console=console)


def _serve(
    drawers: Sequence[Drawer],
    address: Address,
    listener: socket.socket,
    wait_ms: float,
    max_batch: int,
    max_queue: int,
    *,
    with_page: bool,
    console: Console,
) -> None:
    import uvicorn

    from onestroke.serve.app import build_app
    from onestroke.serve.batcher import Pace
    from onestroke.serve.guard import LOCAL_NAMES, Rules
    from onestroke.serve.order import Limits

    limits, names = Limits(), {name.lower() for name in (address.host, *address.names)} - {"0.0.0.0", "::"}
    rules = Rules(LOCAL_NAMES | names, address.token, limits.upload_bytes)
    app = build_app(
        drawers,
        rules=rules,
        pace=Pace(wait_ms / 1000, max_batch, max_queue),
        limits=limits,
        with_page=with_page,
        version=__version__,
    )
    shown = next(iter(sorted(address.names)), address.host)
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}"
    console.print(f"{', '.join(drawer.name for drawer in drawers)} at {url} (Ctrl-C stops)", highlight=False)
    if with_page:
        page = f"{url}/#token={address.token}" if address.token else url
        console.print(f"Open {page} in a browser.", markup=False, highlight=False, soft_wrap=True)
    config = uvicorn.Config(
        app, log_level="warning", ws_max_size=limits.upload_bytes, ws_ping_interval=20, ws_ping_timeout=20,
        timeout_graceful_shutdown=3, proxy_headers=False, server_header=False,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])


def drawer_of(model: str, *, steps: int = 1, guidance: float = 0.0) -> Drawer:
    """The model called `model`, ready to draw; the embedded ones with their words."""
    from onestroke.serve.drawer import Drawer

    pipeline = load(model)
    pipeline.to(device_of("auto"))
    pipeline.set_progress_bar_config(disable=True)
    embedded = model in (STUDENT, TEACHER)
    return Drawer(
        model,
        pipeline,
        steps=steps,
        guidance=guidance,
        square_only=embedded,
        unknown_words=unknown_words if embedded else None,
        phrases=completions() if embedded else (),
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
