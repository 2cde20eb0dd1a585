"""Where requests become orders and orders become pictures: what HTTP and WebSocket share."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from onestroke.errors import OnestrokeError
from onestroke.serve.allowance import Allowance
from onestroke.serve.batcher import Batcher, Drawing, Drawn, Pace, Picture
from onestroke.serve.drawer import Drawer, check_text
from onestroke.serve.meters import Meters
from onestroke.serve.order import MAX_SEED, Limits, Notice, Order, RequestError, Start, UnknownModel
from onestroke.serve.pictures import picture_bytes
from onestroke.serve.safety import Safety
from onestroke.serve.shelf import Shelf

MAX_LORA_SCALE = 2.0
QUICK = 3 * 256 * 256  # bytes of a picture that the event loop writes as PNG itself: half a millisecond
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


class Gone(Exception):
    """Whoever asked has left."""


@dataclass(frozen=True)
class Plan:
    """A checked request before its start picture, if any, is known."""

    drawer: Drawer
    prompt: str
    seed: int
    steps: int
    size: tuple[int, int]  # height, width
    notices: tuple[Notice, ...]
    strict: bool = False
    lora: tuple[str, float] | None = None

    def order(self, *, start: Start | None = None, offset: int = 0) -> Order:
        """The order of the picture whose seed lies `offset` after the plan's."""
        seed = (self.seed + offset) % (MAX_SEED + 1)
        return Order(self.drawer.name, self.prompt, seed, self.steps, self.size, start, self.strict, self.lora)


class Desk:
    """The models of a server, what it allows, and the batcher before them."""

    def __init__(
        self,
        drawers: Sequence[Drawer],
        limits: Limits = Limits(),
        pace: Pace = Pace(),
        *,
        software: str = "onestroke",
        memory: int | None = None,
        per_minute: float | None = None,
        safety: Safety | None = None,
    ) -> None:
        """`drawers`: the first is drawn with where a request names none. `software`: its name inside the pictures.
        `memory`: bytes of weights loaded at once. `per_minute`: pictures that one client may ask for."""
        self.shelf, self.safety, self.allowance = Shelf(drawers, memory), safety, Allowance(per_minute)
        self.software = software
        self.drawers = {drawer.name: drawer for drawer in drawers}
        self.limits, self.meters, self.is_warm = limits, Meters(), False
        self.batcher = Batcher(
            self._begin, pace, overlaps=self._overlaps, observe=self.meters.batch_done,
            on_dropped=lambda: self.meters.dropped.inc(),
        )  # fmt: skip
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="onestroke-write")  # Pillow holds the interpreter
        self.meters.watch(lambda: self.batcher.num_waiting, lambda: self.shelf.num_bytes if memory else 0)

    def _begin(self, orders: Sequence[Order]) -> Drawing:
        drawer = self.drawers[orders[0].model]
        self.shelf.bring(drawer)
        drawing = drawer.begin(orders)
        return drawing if self.safety is None else partial(self._checked, self.safety, drawing)

    def _checked(self, safety: Safety, drawing: Drawing) -> list[Picture | OnestrokeError]:
        pictures = drawing()
        return [why or picture for why, picture in zip(safety.check(pictures), pictures, strict=True)]

    def _overlaps(self, orders: Sequence[Order]) -> bool:
        return self.drawers[orders[0].model].overlaps(orders)

    async def warm(self) -> None:
        """Draw with each model once; `is_warm` from then on."""
        for drawer in reversed(self.drawers.values()):  # the default is the one that stays under a tight budget

            def warm(drawer: Drawer = drawer) -> None:
                self.shelf.bring(drawer)
                drawer.warm()

            await self.batcher.in_worker(warm)
        self.is_warm = True

    def drawer(self, model: str | None) -> Drawer:
        """The model of that name; the first one for none. Raises `UnknownModel`."""
        if model is None:
            return next(iter(self.drawers.values()))
        if model not in self.drawers:
            raise UnknownModel(
                f"there is no model {model[:80]!r}", where="model", fix=f"Choose one of {', '.join(self.drawers)}."
            )
        return self.drawers[model]

    def plan(
        self,
        *,
        prompt: str,
        model: str | None = None,
        seed: int | None = None,
        steps: int | None = None,
        size: str | None = None,
        strict: bool = False,
        lora: str | None = None,
        lora_scale: float = 1.0,
    ) -> Plan:
        """Check a request. Raises `RequestError` or `UnknownModel`; what is merely changed becomes a notice."""
        drawer = self.drawer(model)
        check_text(prompt, self.limits)
        steps = drawer.steps if steps is None else _within(steps, 1, self.limits.steps, "num_inference_steps")
        seed = secrets.randbelow(MAX_SEED + 1) if seed is None else _within(seed, 0, MAX_SEED, "seed")
        fitted, snapped = drawer.fit(_size_in(size), self.limits)
        return Plan(
            drawer,
            prompt,
            seed,
            steps,
            fitted,
            (*snapped, *drawer.notices(prompt)),
            strict,
            _lora(drawer, lora, lora_scale),
        )

    async def draw(self, orders: Sequence[Order], left: Callable[[], Awaitable[None]]) -> list[Drawn]:
        """All of `orders`, together in the queue. Raises `QueueFull`, and `Gone` once `left()` is done first."""
        jobs = self.batcher.submit(orders)
        leaving = asyncio.ensure_future(left())
        drawing = asyncio.gather(*(job.future for job in jobs))
        try:
            await asyncio.wait({leaving, drawing}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                raise Gone
            return drawing.result()
        finally:
            leaving.cancel()
            for job in jobs:
                job.drop()
            drawing.cancel()

    async def encode(self, order: Order, drawn: Drawn, kind: str) -> tuple[bytes, float]:
        """The picture's file, what it was drawn from inside, and the seconds that writing it took."""
        metadata = {
            "prompt": order.prompt,
            "seed": str(order.seed),
            "steps": str(order.steps),
            "model": order.model,
            "software": self.software,
        }
        if order.lora is not None:
            metadata["lora"] = f"{order.lora[0]} at {order.lora[1]:g}"
        if order.start is not None:
            metadata["strength"] = f"{order.start.strength:g}"
        began = time.perf_counter()
        write = partial(picture_bytes, drawn.picture, kind, metadata)
        if kind == "png" and drawn.picture.size <= QUICK:
            data = write()
        else:
            data = await asyncio.get_running_loop().run_in_executor(self._writer, write)
        return data, time.perf_counter() - began


def _lora(drawer: Drawer, name: str | None, scale: float) -> tuple[str, float] | None:
    if name is None:
        return None
    if name not in drawer.loras:
        known = ", ".join(sorted(drawer.loras)[:20])
        fix = f"Choose one of {known}." if known else "Leave it out: this server was started without --loras."
        raise RequestError(f"there is no LoRA {name[:80]!r}", where="lora", fix=fix)
    if not -MAX_LORA_SCALE <= scale <= MAX_LORA_SCALE:
        fix = f"Send {-MAX_LORA_SCALE:g} to {MAX_LORA_SCALE:g}."
        raise RequestError(f"{scale} is out of range", where="lora_scale", fix=fix)
    return (name, scale)


def _within(value: int, low: int, high: int, where: str) -> int:
    if not low <= value <= high:
        raise RequestError(f"{value} is out of range", where=where, fix=f"Send {low} to {high}.")
    return value


def _size_in(text: str | None) -> tuple[int, int] | None:
    """Height and width in "WIDTHxHEIGHT"; None for none and "auto"."""
    if text is None or text == "auto":
        return None
    match = SIZE.fullmatch(text)
    if match is None or "0" in (match[1].strip("0") or "0", match[2].strip("0") or "0"):
        raise RequestError(f"{text[:40]!r} is no size", where="size", fix='Send WIDTHxHEIGHT, as in "128x128".')
    return int(match[2]), int(match[1])
