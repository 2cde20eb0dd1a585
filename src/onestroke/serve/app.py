"""The whole server as one ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from onestroke.serve import openai_api, page
from onestroke.serve.batcher import Pace, QueueFull
from onestroke.serve.desk import Desk, Gone
from onestroke.serve.drawer import Drawer
from onestroke.serve.guard import Guard, Rules
from onestroke.serve.live import Live
from onestroke.serve.order import Limits, RequestError, UnknownModel

CLIENT_GONE = 499  # nginx's number; nobody is there to read it, but the log and the metrics are


def build_app(
    drawers: Sequence[Drawer],
    *,
    rules: Rules = Rules(),
    limits: Limits = Limits(),
    pace: Pace = Pace(),
    with_page: bool = False,
    version: str = "0",
) -> FastAPI:
    """A server of `drawers`, the first of which is the default; `with_page` adds the studio at /."""
    desk = Desk(drawers, limits, pace, software=f"onestroke {version}")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        desk.batcher.start()
        warming = asyncio.create_task(desk.warm())
        yield
        warming.cancel()
        await desk.batcher.stop()

    # FastAPI's own pages of the API load scripts from other addresses: the description alone is served.
    app = FastAPI(title="onestroke", version=version, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.desk = desk
    app.include_router(openai_api.router)
    if with_page:
        app.include_router(page.router)
    _add_errors(app)
    _add_probes(app, desk, version)

    @app.websocket("/v1/live")
    async def live(socket: WebSocket) -> None:
        await Live(socket, desk).run()

    app.add_middleware(Guard, rules=rules)
    return app


def _add_probes(app: FastAPI, desk: Desk, version: str) -> None:
    @app.get("/health", tags=["probes"])
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok", "version": version}

    @app.get("/ready", tags=["probes"])
    async def ready(response: Response) -> dict[str, bool]:
        """200 once every model has drawn its first picture, 503 before."""
        response.status_code = 200 if desk.is_warm else 503
        return {"ready": desk.is_warm}

    @app.get("/metrics", tags=["probes"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus's figures."""
        return Response(desk.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    """Errors in OpenAI's form."""

    def answer(request: Request, status: int, message: str, *, param: str | None = None, **headers: str) -> Response:
        desk: Desk = request.app.state.desk
        desk.meters.answers.labels("http", str(status)).inc()
        kind = "invalid_request_error" if status < 500 else "server_error"
        code = "model_not_found" if status == 404 and param == "model" else None
        error = {"message": message, "type": kind, "param": param, "code": code}
        return JSONResponse({"error": error}, status, {name.replace("_", "-"): v for name, v in headers.items()})

    @app.exception_handler(RequestError)
    async def cannot(request: Request, error: RequestError) -> Response:
        return answer(request, 404 if isinstance(error, UnknownModel) else 400, str(error), param=error.where or None)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"][1:])[:80]
        return answer(request, 400, f"{place}: {fault['msg']}"[:300], param=place or None)

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> Response:
        return answer(request, 503, str(error), Retry_After=str(error.retry_after))

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return answer(request, CLIENT_GONE, "the client has left")

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return answer(request, error.status_code, str(error.detail), **(dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return answer(request, 500, "The picture could not be drawn.")
