"""OpenAI's image routes, so that its clients work unchanged; seed, steps and strength are fields of our own."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, File, Form, Request, UploadFile
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import HTTPConnection

from onestroke.serve.batcher import Drawn
from onestroke.serve.desk import Desk, Plan
from onestroke.serve.order import Notice, Order, RequestError
from onestroke.serve.pictures import MEDIA_TYPES, read_picture, start_of

Format = Literal["png", "jpeg", "webp"]
MEANINGLESS = {"user", "quality", "style", "background", "moderation", "output_compression", "partial_images",
               "input_fidelity"}  # of OpenAI's fields; a picture without them is what was asked for  # fmt: skip
NEGATIVE = "negative_prompt: the model draws without guidance, which is what a negative prompt steers."


class Generation(BaseModel):
    """A request for pictures of a prompt."""

    model_config = ConfigDict(extra="allow")

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = Field(None, description='"WIDTHxHEIGHT" or "auto"; snapped to what the model draws')
    response_format: Literal["b64_json", "url"] | None = Field(None, description="url: a data: address")
    output_format: Format | None = None
    stream: bool | None = None
    seed: int | None = Field(None, description="the same seed is the same picture; further pictures count on from it")
    num_inference_steps: int | None = None
    strict: bool = Field(False, description="drawn alone: the same bits every time")
    lora: str | None = Field(None, description="a name that /v1/models lists")
    lora_scale: float = 1.0


class NoticeOut(BaseModel):
    kind: str
    message: str
    detail: list[str] = []


class PictureOut(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int


class Timings(BaseModel):
    """Milliseconds of the slowest picture."""

    queue: float
    draw: float
    encode: float
    batch_size: int


class Pictures(BaseModel):
    """Drawn pictures, and what of the request was changed."""

    created: int
    data: list[PictureOut]
    model: str
    size: str
    steps: int
    output_format: Format
    notices: list[NoticeOut]
    timings: Timings


class ModelOut(BaseModel):
    """A model of this server."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "onestroke"
    size: int
    steps: int
    guidance: float
    max_tokens: int
    square_only: bool
    loras: list[str]


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelOut]


router = APIRouter(prefix="/v1", tags=["images"])


def desk_of(request: Request) -> Desk:
    return request.app.state.desk


def address_of(connection: HTTPConnection) -> str:
    """Of whoever asks, without the port."""
    return connection.client.host if connection.client else ""


@router.get("/models")
async def models(request: Request) -> Models:
    """The models that can be drawn with; the first is the one that a request without `model` gets."""
    return Models(
        data=[
            ModelOut(
                id=drawer.name,
                size=drawer.canvas.default,
                steps=drawer.steps,
                guidance=drawer.guidance,
                max_tokens=drawer.max_tokens,
                square_only=drawer.canvas.square_only,
                loras=sorted(drawer.loras),
            )
            for drawer in desk_of(request).drawers.values()
        ]
    )


class Phrases(BaseModel):
    phrases: list[str]


@router.get("/phrases")
async def phrases(request: Request, model: str | None = None) -> Phrases:
    """What a model was trained to understand, as far as that is known: completions of a prompt."""
    return Phrases(phrases=list(desk_of(request).drawer(model).phrases))


@router.post("/images/generations")
async def generations(request: Request, body: Generation) -> Pictures:
    """Draw `n` pictures of a prompt."""
    if body.stream:
        raise RequestError("pictures are not streamed", where="stream", fix="Leave it out, or use /v1/live.")
    desk = desk_of(request)
    plan = desk.plan(
        prompt=body.prompt,
        model=body.model,
        seed=body.seed,
        steps=body.num_inference_steps,
        size=body.size,
        strict=body.strict,
        lora=body.lora,
        lora_scale=body.lora_scale,
    )
    count = _count(body.n, desk)
    desk.allowance.take(address_of(request), count)
    orders = [plan.order(offset=i) for i in range(count)]
    ignored = _ignored(body.model_extra or {})
    return await _answer(request, plan, orders, ignored, body.output_format or "png", body.response_format)


@router.post("/images/edits")
async def edits(
    request: Request,
    prompt: Annotated[str, Form()],
    image: Annotated[list[UploadFile] | None, File(description="PNG, JPEG or WebP")] = None,
    images: Annotated[list[UploadFile] | None, File(alias="image[]")] = None,
    mask: Annotated[UploadFile | None, File(description="redrawn where transparent, or bright if nowhere so")] = None,
    model: Annotated[str | None, Form()] = None,
    n: Annotated[int | None, Form(ge=1)] = None,
    size: Annotated[str | None, Form()] = None,
    response_format: Annotated[Literal["b64_json", "url"] | None, Form()] = None,
    output_format: Annotated[Format | None, Form()] = None,
    seed: Annotated[int | None, Form()] = None,
    num_inference_steps: Annotated[int | None, Form()] = None,
    strength: Annotated[float, Form(description="in (0, 1]; 1 forgets the picture")] = 0.6,
    strict: Annotated[bool, Form()] = False,
    lora: Annotated[str | None, Form()] = None,
    lora_scale: Annotated[float, Form()] = 1.0,
) -> Pictures:
    """Redraw a picture by a prompt, all of it or where the mask says."""
    desk = desk_of(request)
    uploads = [*(image or []), *(images or [])]
    if len(uploads) != 1:
        raise RequestError(f"{len(uploads)} pictures were sent", where="image", fix="Send one.")
    plan = desk.plan(
        prompt=prompt, model=model, seed=seed, steps=num_inference_steps, size=size, strict=strict,
        lora=lora, lora_scale=lora_scale,
    )  # fmt: skip
    count = _count(n, desk)
    desk.allowance.take(address_of(request), count)
    picture, region = await uploads[0].read(), None if mask is None else await mask.read()

    def read():
        start = read_picture(picture, desk.limits, where="image")
        where = None if region is None else read_picture(region, desk.limits, where="mask")
        return start_of(start, plan.size, strength=strength, mask=where)

    start = await asyncio.to_thread(read)
    orders = [plan.order(start=start, offset=i) for i in range(count)]
    return await _answer(request, plan, orders, [], output_format or "png", response_format)


async def _answer(
    request: Request,
    plan: Plan,
    orders: Sequence[Order],
    ignored: Sequence[Notice],
    kind: Format,
    response_format: Literal["b64_json", "url"] | None,
) -> Pictures:
    desk = desk_of(request)
    drawn = await desk.draw(orders, lambda: _left(request))
    files = [await desk.encode(order, one, kind) for order, one in zip(orders, drawn, strict=True)]
    desk.meters.answers.labels("http", "200").inc()
    return Pictures(
        created=int(time.time()),
        data=[_picture_out(data, order, kind, response_format) for order, (data, _) in zip(orders, files, strict=True)],
        model=plan.drawer.name,
        size=f"{plan.size[1]}x{plan.size[0]}",
        steps=plan.steps,
        output_format=kind,
        notices=[NoticeOut(kind=n.kind, message=n.message, detail=n.detail) for n in (*plan.notices, *ignored)],
        timings=_timings(drawn, sum(seconds for _, seconds in files)),
    )


def _picture_out(data: bytes, order: Order, kind: Format, response_format: str | None) -> PictureOut:
    text = base64.b64encode(data).decode("ascii")
    if response_format == "url":
        return PictureOut(url=f"data:{MEDIA_TYPES[kind]};base64,{text}", seed=order.seed)
    return PictureOut(b64_json=text, seed=order.seed)


def _timings(drawn: Sequence[Drawn], encode_seconds: float) -> Timings:
    slowest = max(drawn, key=lambda one: one.queue_seconds + one.draw_seconds)
    return Timings(
        queue=round(1000 * slowest.queue_seconds, 1),
        draw=round(1000 * slowest.draw_seconds, 1),
        encode=round(1000 * encode_seconds, 1),
        batch_size=slowest.batch_size,
    )


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _count(n: int | None, desk: Desk) -> int:
    count = 1 if n is None else n
    if count > desk.limits.count:
        raise RequestError(f"{count} pictures are too many", where="n", fix=f"Send at most {desk.limits.count}.")
    return count


def _ignored(extra: dict) -> list[Notice]:
    """A notice for each field that changes nothing."""
    names = sorted(name[:40] for name in extra if name not in MEANINGLESS)[:20]
    return [
        Notice("ignored", NEGATIVE if name == "negative_prompt" else f"{name}: there is no such field.", [name])
        for name in names
    ]
