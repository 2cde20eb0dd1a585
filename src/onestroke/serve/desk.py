"""Where requests become orders and orders become pictures: what HTTP and WebSocket share."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from onestroke.serve.batcher import Batcher, Drawn, Pace, Picture
from onestroke.serve.drawer import Drawer, check_text
from onestroke.serve.meters import Meters
from onestroke.serve.order import MAX_SEED, Limits, Notice, Order, RequestError, Start, UnknownModel
from onestroke.serve.pictures import picture_bytes

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

    def order(self, *, start: Start | None = None, offset: int = 0) -> Order:
        """The order of the picture whose seed lies `offset` after the plan's."""
        seed = (self.seed + offset) % (MAX_SEED + 1)
        return Order(self.drawer.name, self.prompt, seed, self.steps, self.size, start, self.strict)


class Desk:
    """The models of a server, what it allows, and the batcher before them."""

    def __init__(
        self, drawers: Sequence[Drawer], limits: Limits = Limits(), pace: Pace = Pace(), *, software: str = "onestroke"
    ) -> None:
        """`drawers`: the first is drawn with where a request names none. `software`: its name inside the pictures."""
        self.software = software
        self.drawers = {drawer.name: drawer for drawer in drawers}
        self.limits, self.meters, self.is_warm = limits, Meters(), False
        self.batcher = Batcher(
            self._draw, pace, observe=self.meters.batch_done, on_dropped=lambda: self.meters.dropped.inc()
        )
        self.meters.watch_queue(lambda: self.batcher.num_waiting)

    def _draw(self, orders: Sequence[Order]) -> list[Picture]:
        return self.drawers[orders[0].model].draw(orders)

    async def warm(self) -> None:
        """Draw with each model once; `is_warm` from then on."""
        for drawer in self.drawers.values():
            await self.batcher.in_worker(drawer.warm)
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
    ) -> Plan:
        """Check a request. Raises `RequestError` or `UnknownModel`; what is merely changed becomes a notice."""
        drawer = self.drawer(model)
        check_text(prompt, self.limits)
        steps = drawer.steps if steps is None else _within(steps, 1, self.limits.steps, "num_inference_steps")
        seed = secrets.randbelow(MAX_SEED + 1) if seed is None else _within(seed, 0, MAX_SEED, "seed")
        fitted, snapped = drawer.fit(_size_in(size), self.limits)
        return Plan(drawer, prompt, seed, steps, fitted, (*snapped, *drawer.notices(prompt)), strict)

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

    async def encode(self, order: Order, drawn: Drawn, kind: str, *, quick: bool = False) -> tuple[bytes, float]:
        """The picture's file, what it was drawn from inside, and the seconds that writing it took."""
        metadata = {
            "prompt": order.prompt,
            "seed": str(order.seed),
            "steps": str(order.steps),
            "model": order.model,
            "software": self.software,
        }
        if order.start is not None:
            metadata["strength"] = f"{order.start.strength:g}"
        began = time.perf_counter()
        level = 1 if quick else 6
        data = await asyncio.to_thread(picture_bytes, drawn.picture, kind, metadata, compress_level=level)
        return data, time.perf_counter() - began


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
