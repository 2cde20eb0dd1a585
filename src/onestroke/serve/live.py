"""Live drawing over one WebSocket: the newest request of a panel wins.

A client sends text frames, `{"type": "draw", "panel": "p1", "id": 7, "prompt": ...}`, "cancel" or "ping". A picture
comes as one binary frame: the length of a JSON header (4 bytes, big-endian), the header, the file. Every "draw" gets
one answer that carries its panel and id: a picture, "superseded", or "error".

A request whose batch has begun is finished and delivered though a newer one waits: whoever types without pause would
see nothing otherwise. Its header says `"current": false`; a picture never follows one of a newer request of its panel.
"""

from __future__ import annotations

import asyncio
import json
import struct
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastapi import WebSocket
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.websockets import WebSocketDisconnect, WebSocketState

from onestroke.errors import OnestrokeError
from onestroke.serve.allowance import TooFast
from onestroke.serve.batcher import Job, QueueFull
from onestroke.serve.desk import Desk
from onestroke.serve.guard import PROTOCOL
from onestroke.serve.openai_api import address_of
from onestroke.serve.order import Notice, Order, RequestError, Start
from onestroke.serve.pictures import MEDIA_TYPES, read_base64, start_of

SEND_SECONDS = 15.0  # after which a client that does not read is left
MAX_BAD_FRAMES = 20  # after which one that sends rubbish is
LARGE_TEXT = 65_536  # characters that are parsed outside the event loop

Panel = Annotated[str, Field(min_length=1, max_length=64)]
Id = Annotated[int, Field(ge=0, lt=2**53)]


class Draw(BaseModel):
    """Draw a panel."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["draw"]
    panel: Panel
    id: Id
    prompt: str
    model: str | None = None
    seed: int | None = None
    steps: int | None = None
    size: str | None = None
    image: str | None = None  # base64, where drawing starts from a picture
    mask: str | None = None  # base64, of the image's size
    strength: float = 0.6
    format: Literal["png", "jpeg", "webp"] = "png"
    strict: bool = False
    lora: str | None = None
    lora_scale: float = 1.0


class Cancel(BaseModel):
    """Give up what waits for a panel."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["cancel"]
    panel: Panel


class Ping(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["ping"]


FRAMES: TypeAdapter[Draw | Cancel | Ping] = TypeAdapter(Annotated[Draw | Cancel | Ping, Field(discriminator="type")])


@dataclass(eq=False)
class Waiting:
    """A request that is not answered yet."""

    ask: Draw
    number: int  # of the requests of this connection, in order of arrival
    job: Job


@dataclass
class PanelState:
    newest: int = 0  # number of the newest request
    delivered: int = 0  # number of the newest one whose picture was sent
    waiting: list[Waiting] = field(default_factory=list)


class Live:
    """One connection."""

    def __init__(self, socket: WebSocket, desk: Desk) -> None:
        self.socket, self.desk = socket, desk
        self.panels: dict[str, PanelState] = {}
        self.count, self.bad_frames = 0, 0
        self.tasks: set[asyncio.Task] = set()
        self.sending = asyncio.Lock()

    async def run(self) -> None:
        """Serve the connection until either side ends it; what it waits for is dropped then."""
        offered = PROTOCOL if PROTOCOL in self.socket.scope["subprotocols"] else None
        await self.socket.accept(subprotocol=offered)
        self.desk.meters.live.inc()
        try:
            while self.bad_frames < MAX_BAD_FRAMES:
                message = await self.socket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                await self._take(message.get("text"))
            await self._close(1008, "too many frames that are no requests")
        except (WebSocketDisconnect, TimeoutError, RuntimeError):  # starlette raises RuntimeError for a closed socket
            await self._close(1011, "the connection does not take what is sent")
        finally:
            self.desk.meters.live.dec()
            for state in self.panels.values():
                for waiting in state.waiting:
                    waiting.job.drop()
            for task in self.tasks:
                task.cancel()

    async def _take(self, text: str | None) -> None:
        try:
            frame = await self._parse(text)
        except RequestError as error:
            self.bad_frames += 1
            await self._send_json({"type": "error", "panel": None, "id": None, "message": str(error)})
            return
        if isinstance(frame, Ping):
            await self._send_json({"type": "pong"})
        elif isinstance(frame, Cancel):
            await self._tell_superseded(_drop(self.panels.get(frame.panel, PanelState())))
        else:
            await self._draw(frame)

    async def _parse(self, text: str | None) -> Draw | Cancel | Ping:
        if text is None or len(text) > self.desk.limits.upload_bytes:
            raise RequestError("this frame is no request", fix="Send JSON as a text frame, pictures in base64.")
        try:
            if len(text) > LARGE_TEXT:
                return await asyncio.to_thread(FRAMES.validate_json, text)
            return FRAMES.validate_json(text)
        except (ValidationError, UnicodeEncodeError) as error:
            raise RequestError(_first_fault(error), where="frame", fix="Read /v1/live in the README.") from error

    async def _draw(self, ask: Draw) -> None:
        try:
            if sum(len(state.waiting) for state in self.panels.values()) >= self.desk.limits.panels:
                raise RequestError("too many requests wait", fix=f"Ask for at most {self.desk.limits.panels} at once.")
            plan = self.desk.plan(
                prompt=ask.prompt, model=ask.model, seed=ask.seed, steps=ask.steps, size=ask.size, strict=ask.strict,
                lora=ask.lora, lora_scale=ask.lora_scale,
            )  # fmt: skip
            self.desk.allowance.take(address_of(self.socket), 1)
            start = None if ask.image is None else await asyncio.to_thread(self._start, ask, plan.size)
        except OnestrokeError as error:
            await self._send_error(ask, error)
            return
        await self._enqueue(ask, plan.order(start=start), plan.notices)

    async def _enqueue(self, ask: Draw, order: Order, notices: tuple[Notice, ...]) -> None:
        """Nothing is awaited between what is dropped and what takes its place."""
        state = self.panels.get(ask.panel, PanelState())
        superseded = _drop(state)
        try:
            (job,) = self.desk.batcher.submit([order])
        except QueueFull as error:
            await self._tell_superseded(superseded)
            await self._send_error(ask, error)
            return
        self.count += 1
        waiting = Waiting(ask, self.count, job)
        state.newest = self.count
        state.waiting.append(waiting)
        self.panels[ask.panel] = state
        task = asyncio.create_task(self._deliver(state, waiting, notices))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        await self._tell_superseded(superseded)

    def _start(self, ask: Draw, size: tuple[int, int]) -> Start:
        assert ask.image is not None
        image = read_base64(ask.image, self.desk.limits, where="image")
        mask = None if ask.mask is None else read_base64(ask.mask, self.desk.limits, where="mask")
        return start_of(image, size, strength=ask.strength, mask=mask)

    async def _tell_superseded(self, dropped: list[Waiting]) -> None:
        for waiting in dropped:
            self.desk.meters.answers.labels("live", "superseded").inc()
            await self._send_json({"type": "superseded", "panel": waiting.ask.panel, "id": waiting.ask.id})

    async def _deliver(self, state: PanelState, waiting: Waiting, notices: tuple[Notice, ...]) -> None:
        """Send the picture once it is drawn; nothing if the request was dropped, which has been answered then."""
        await asyncio.wait({waiting.job.future})
        if waiting.job.future.cancelled():
            return
        try:
            await self._send_picture(state, waiting, notices)
        except (WebSocketDisconnect, TimeoutError, RuntimeError):
            await self._close(1011, "the connection does not take what is sent")
        finally:
            if waiting in state.waiting:
                state.waiting.remove(waiting)
            if not state.waiting and self.panels.get(waiting.ask.panel) is state:
                del self.panels[waiting.ask.panel]

    async def _send_picture(self, state: PanelState, waiting: Waiting, notices: tuple[Notice, ...]) -> None:
        ask, order = waiting.ask, waiting.job.order
        error = waiting.job.future.exception()
        if error is not None:
            await self._send_error(ask, error)
            return
        drawn = waiting.job.future.result()
        data, encode_seconds = await self.desk.encode(order, drawn, ask.format)
        async with self.sending:
            if waiting.number < state.delivered:
                await self._send_now(json.dumps({"type": "superseded", "panel": ask.panel, "id": ask.id}))
                return
            state.delivered = waiting.number
            header = {
                "type": "picture", "panel": ask.panel, "id": ask.id, "current": waiting.number == state.newest,
                "model": order.model, "seed": order.seed, "steps": order.steps,
                "size": f"{order.size[1]}x{order.size[0]}", "media_type": MEDIA_TYPES[ask.format],
                "notices": [{"kind": n.kind, "message": n.message, "detail": n.detail} for n in notices],
                "timings": {
                    "queue": round(1000 * drawn.queue_seconds, 1), "draw": round(1000 * drawn.draw_seconds, 1),
                    "encode": round(1000 * encode_seconds, 1), "batch_size": drawn.batch_size,
                },
            }  # fmt: skip
            text = json.dumps(header).encode()
            await self._send_now(struct.pack(">I", len(text)) + text + data)
        self.desk.meters.answers.labels("live", "picture").inc()

    async def _send_error(self, ask: Draw, error: BaseException) -> None:
        known = isinstance(error, OnestrokeError)
        answer = {
            "type": "error",
            "panel": ask.panel,
            "id": ask.id,
            "message": str(error) if known else "The picture could not be drawn.",
        }
        if isinstance(error, QueueFull | TooFast):
            answer["retry_after"] = error.retry_after
        self.desk.meters.answers.labels("live", "error").inc()
        await self._send_json(answer)

    async def _send_json(self, answer: dict) -> None:
        async with self.sending:
            await self._send_now(json.dumps(answer))

    async def _send_now(self, frame: str | bytes) -> None:
        send = self.socket.send_text(frame) if isinstance(frame, str) else self.socket.send_bytes(frame)
        async with asyncio.timeout(SEND_SECONDS):  # `wait_for` makes a task for each frame
            await send

    async def _close(self, code: int, reason: str) -> None:
        if self.socket.client_state is WebSocketState.CONNECTED:
            try:
                await asyncio.wait_for(self.socket.close(code, reason), 1.0)
            except (RuntimeError, TimeoutError, WebSocketDisconnect):
                return


def _drop(state: PanelState) -> list[Waiting]:
    """Take back what waits for the panel, unless its batch has begun."""
    dropped = [waiting for waiting in state.waiting if waiting.job.drop()]
    state.waiting = [waiting for waiting in state.waiting if waiting not in dropped]
    return dropped


def _first_fault(error: ValidationError | UnicodeEncodeError) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "the text is not Unicode"
    fault = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, fault["loc"]))[:80]
    return f"{place}: {fault['msg']}"[:200] if place else fault["msg"][:200]
