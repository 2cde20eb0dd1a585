"""The whole server as one ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from onestroke.serve import openai_api, page
from onestroke.serve.allowance import TooFast
from onestroke.serve.batcher import Pace, QueueFull
from onestroke.serve.desk import Desk, Gone
from onestroke.serve.drawer import Drawer
from onestroke.serve.guard import Guard, Rules
from onestroke.serve.live import Live
from onestroke.serve.order import Limits, RequestError, UnknownModel
from onestroke.serve.replica import Replica, Signed, joined
from onestroke.serve.safety import Safety, Withheld

CLIENT_GONE = 499  # nginx's number; nobody is there to read it, but the log and the metrics are


DOCUMENTED = (400, 401, 403, 404, 413, 421, 429, 500, 503)


class Fault(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Ready(BaseModel):
    ready: bool


class ErrorOut(BaseModel):
    """What is wrong, in OpenAI's form."""

    error: Fault


def build_app(
    drawers: Sequence[Drawer],
    *,
    rules: Rules = Rules(),
    limits: Limits = Limits(),
    pace: Pace = Pace(),
    with_page: bool = False,
    version: str = "0",
    memory: int | None = None,
    per_minute: float | None = None,
    safety: Safety | None = None,
    replica: Replica | None = None,
) -> FastAPI:
    """A server of `drawers`, the first of which is the default; `with_page` adds the studio at /.

    `memory`: bytes of weights that may be loaded at once. `per_minute`: pictures that one address may ask for.
    `replica`: where it is one of several; it takes no request before it is warm then, since others can.
    """
    desk = Desk(
        drawers, limits, pace,
        software=f"onestroke {version}", memory=memory, per_minute=per_minute, safety=safety,
    )  # fmt: skip

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        desk.batcher.start()
        warming = asyncio.create_task(desk.warm())
        if replica is not None:
            await warming
        yield
        warming.cancel()
        await desk.batcher.stop()

    # FastAPI's own pages of the API load scripts from other addresses: the description alone is served.
    app = FastAPI(
        title="onestroke", version=version, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses={status: {"model": ErrorOut} for status in DOCUMENTED},
    )  # fmt: skip
    app.state.desk = desk
    app.include_router(openai_api.router)
    if with_page:
        app.include_router(page.router)
    _add_errors(app)
    _add_probes(app, desk, version, replica)

    @app.websocket("/v1/live")
    async def live(socket: WebSocket) -> None:
        await Live(socket, desk).run()

    app.add_middleware(Guard, rules=rules)
    if replica is not None:
        app.add_middleware(Signed, name=replica.name)
    for route in app.openapi()["paths"].values():
        for operation in route.values():
            operation["responses"].pop("422", None)  # FastAPI's own answer to a malformed request; ours is 400
    return app


def _add_probes(app: FastAPI, desk: Desk, version: str, replica: Replica | None) -> None:
    @app.get("/health", tags=["probes"])
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok", "version": version}

    @app.get("/ready", tags=["probes"], responses={503: {"model": Ready}})
    async def ready(response: Response) -> Ready:
        """200 once every model has drawn its first picture, 503 before."""
        response.status_code = 200 if desk.is_warm else 503
        return Ready(ready=desk.is_warm)

    @app.get("/metrics", tags=["probes"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus's figures; of all replicas where there are several."""
        text = desk.meters.text() if replica is None else joined(await replica.figures())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    """Errors in OpenAI's form."""

    def answer(
        request: Request, status: int, message: str, *,
        param: str | None = None, code: str | None = None, **headers: str,
    ) -> Response:  # fmt: skip
        desk: Desk = request.app.state.desk
        desk.meters.answers.labels("http", str(status)).inc()
        kind = "invalid_request_error" if status < 500 else "server_error"
        if status == 404 and param == "model":
            code = "model_not_found"
        error = {"message": message, "type": kind, "param": param, "code": code}
        return JSONResponse({"error": error}, status, {name.replace("_", "-"): v for name, v in headers.items()})

    @app.exception_handler(RequestError)
    async def cannot(request: Request, error: RequestError) -> Response:
        if isinstance(error, Withheld):
            return answer(request, 400, str(error), code="content_policy_violation")
        return answer(request, 404 if isinstance(error, UnknownModel) else 400, str(error), param=error.where or None)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"][1:])[:80]
        return answer(request, 400, f"{place}: {fault['msg']}"[:300], param=place or None)

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> Response:
        return answer(request, 503, str(error), Retry_After=str(error.retry_after))

    @app.exception_handler(TooFast)
    async def fast(request: Request, error: TooFast) -> Response:
        return answer(request, 429, str(error), code="rate_limit_exceeded", Retry_After=str(error.retry_after))

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return answer(request, CLIENT_GONE, "the client has left")

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return answer(request, error.status_code, str(error.detail), **(dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return answer(request, 500, "The picture could not be drawn.")
