"""The arena's web server: one page for voting, one for the results, for this machine's own browser alone."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import cache
from importlib.resources import files

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from jinja2 import Environment, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from onestroke.arena.ratings import results_of
from onestroke.arena.session import Session, Shown
from onestroke.arena.votes import Answer
from onestroke.errors import OnestrokeError, ResourceError
from onestroke.evaluate.plots import interval_strip

HOST = "127.0.0.1"
FILES = {"style.css": "text/css", "vote.js": "text/javascript"}
ROLES = ("student", "teacher")  # all that the browser is told of the models, once the votes are in
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Answers(BaseModel):
    """What the page sends: a trial's number, an answer to each question, and how long they took in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    quality: Answer
    adherence: Answer
    seconds: float = Field(ge=0, le=86_400)


def create_app(session: Session, *, port: int) -> FastAPI:
    """The pages and the API. Whatever does not come from a page of this server itself is refused."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    @app.middleware("http")
    async def guard(request: Request, answer: Callable) -> Response:
        refusal = refused(request, hosts)
        response = JSONResponse({"detail": refusal}, 403) if refusal else await answer(request)
        response.headers.update(HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    @app.exception_handler(OnestrokeError)
    def tell(request: Request, error: OnestrokeError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 500)

    _add_pages(app, session)
    _add_api(app, session)
    return app


def refused(request: Request, hosts: set[str]) -> str | None:
    """Why a request is refused, or None. `hosts`: this server's own names, with its port.

    The Host header keeps out a foreign name that resolves to this machine (DNS rebinding); the Origin header, which no
    page can forge, keeps out what other pages send. Frames are refused by HEADERS.
    """
    if request.headers.get("host") not in hosts:
        return "This server answers to its own address only."
    if request.method not in ("GET", "HEAD"):
        origin = request.headers.get("origin", "")
        if origin.removeprefix("http://") not in hosts or not origin.startswith("http://"):
            return "Votes are taken from the arena's own page only."
    return None


def _add_pages(app: FastAPI, session: Session) -> None:
    @app.get("/")
    def vote_page() -> Response:
        return RedirectResponse("/results", 303) if session.is_finished else HTMLResponse(_page("vote.html"))

    @app.get("/results")
    def results_page() -> Response:
        return HTMLResponse(results_html(session)) if session.is_finished else RedirectResponse("/", 303)

    @app.get("/files/{name}")
    def page_file(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404)
        return Response(_page(name), media_type=FILES[name])

    @app.get("/pictures/{name}")
    def picture(name: str) -> Response:
        path = session.picture(name)
        if path is None:
            raise HTTPException(404)
        content = path.read_bytes()  # no file response: it would tell the time of the file
        return Response(content, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


def _add_api(app: FastAPI, session: Session) -> None:
    @app.get("/api/trial")
    def trial() -> dict:
        return _told(session)

    @app.post("/api/votes")
    def vote(answers: Answers) -> JSONResponse:
        kept = session.vote(answers.number, answers.quality, answers.adherence, seconds=answers.seconds)
        return JSONResponse(_told(session), 200 if kept else 409)

    @app.post("/api/finish")
    def finish() -> dict:
        session.close()
        return _told(session)


def _told(session: Session) -> dict:
    now, coming = session.shown()
    return {
        "total": len(session.trials),
        "trial": _addresses(now) if now else None,
        "preload": [f"/pictures/{name}" for name in (coming.left, coming.right)] if coming else [],
    }


def _addresses(shown: Shown) -> dict:
    sides = {"left": f"/pictures/{shown.left}", "right": f"/pictures/{shown.right}"}
    return {"number": shown.number, "prompt": shown.prompt, **sides}


def results_html(session: Session) -> str:
    """The last page: what the votes on these two models say, the models called by their roles."""
    votes = session.votes
    names = dict(zip(session.labels, ROLES, strict=True))
    results = results_of(votes) if any(not vote.is_repeat for vote in votes) else None
    return _results_template().render(results=results, names=names, student=session.labels[0], strip=_chance_strip)


def _chance_strip(interval) -> str:
    return interval_strip(
        interval.value, interval.low, interval.high, ends=(0, 1), log=False, limits=(0.5,), role="student"
    )


@cache
def _results_template():
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_page("results.html"))


@cache
def _page(name: str) -> str:
    return files("onestroke.arena").joinpath("page", name).read_text("utf-8")


def open_socket(port: int) -> socket.socket:
    """A listening socket on this machine's own address; port 0 takes a free one. Raises ResourceError."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ResourceError(
            f"port {port} cannot be used ({error.strerror})", where="arena", fix="Give another --port, or 0 for any."
        ) from error
    return listener


def serve(session: Session, listener: socket.socket) -> None:
    """Answer until SIGINT or SIGTERM."""
    app = create_app(session, port=listener.getsockname()[1])
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])
