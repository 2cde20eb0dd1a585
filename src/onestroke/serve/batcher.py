"""What is drawn together, and when: a bounded queue before one worker thread.

The event loop never draws. An order that is cancelled before its batch begins costs no model call.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from onestroke.errors import OnestrokeError
from onestroke.serve.order import Order

Picture = np.ndarray  # h w 3, uint8


class QueueFull(OnestrokeError):
    """Too many orders wait; `retry_after` is the seconds after which there should be room."""

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__("the server has as many requests as it can hold", fix=f"Try again in {retry_after} s.")


@dataclass(frozen=True)
class Drawn:
    """A picture, and where its time went."""

    picture: Picture
    queue_seconds: float  # until its batch began
    draw_seconds: float  # of the whole batch
    batch_size: int


@dataclass(eq=False)
class Job:
    """An order that waits, is being drawn, or is done."""

    order: Order
    future: asyncio.Future[Drawn]
    arrived: float = field(default_factory=time.perf_counter)
    started: bool = False

    def drop(self) -> bool:
        """Take it back. False if it is too late: its batch has begun or is done."""
        return not self.started and self.future.cancel()


@dataclass(frozen=True)
class Pace:
    """How the batcher trades delay for throughput."""

    wait: float = 0.005  # seconds that a first order waits for others of its key
    max_batch: int = 16
    max_queue: int = 128  # orders that wait


class Batcher:
    """Draws the oldest order that waits, together with those of its key."""

    def __init__(
        self,
        draw: Callable[[Sequence[Order]], Sequence[Picture | OnestrokeError]],
        pace: Pace = Pace(),
        *,
        observe: Callable[[Sequence[Job], float], None] = lambda jobs, seconds: None,
        on_dropped: Callable[[], None] = lambda: None,
    ) -> None:
        """`draw` runs in the worker thread and may give an error in a picture's place; `observe(jobs, seconds)` runs in
        the event loop, after each batch."""
        self._draw, self.pace, self._observe, self._on_dropped = draw, pace, observe, on_dropped
        self._waiting: deque[Job] = deque()
        self._arrived = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="onestroke-draw")
        self._order_seconds = 0.1  # of one order, a running mean
        self._loop_task: asyncio.Task | None = None

    def start(self) -> None:
        """Begin to draw, in the running event loop."""
        self._loop_task = asyncio.get_running_loop().create_task(self._run(), name="batcher")

    async def stop(self) -> None:
        """End after the batch that is being drawn; whoever still waits is told."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        for job in self._waiting:
            job.future.cancel()
        await asyncio.to_thread(self._worker.shutdown)

    async def in_worker(self, call: Callable[[], None]) -> None:
        """Run `call` between batches, in the thread that draws."""
        await asyncio.get_running_loop().run_in_executor(self._worker, call)

    @property
    def num_waiting(self) -> int:
        """Orders that wait and are still wanted."""
        return sum(not job.future.done() for job in list(self._waiting))  # a copy: other threads ask too

    def submit(self, orders: Sequence[Order]) -> list[Job]:
        """Take all of `orders` or none. Raises `QueueFull`."""
        if len(self._waiting) + len(orders) > self.pace.max_queue:
            self._forget_dropped()
        if len(self._waiting) + len(orders) > self.pace.max_queue:
            raise QueueFull(max(1, math.ceil(len(self._waiting) * self._order_seconds)))
        loop = asyncio.get_running_loop()
        jobs = [Job(order, loop.create_future()) for order in orders]
        self._waiting.extend(jobs)
        self._arrived.set()
        return jobs

    async def _run(self) -> None:
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather_company(self._waiting[0])
            jobs = self._take_batch()
            if jobs:
                await self._draw_batch(jobs)

    async def _gather_company(self, first: Job) -> None:
        """Wait until the batch of `first` is full, or its time is up; it may be up from the start."""
        while not first.future.done() and not first.order.strict:
            left = first.arrived + self.pace.wait - time.perf_counter()
            company = sum(job.order.key == first.order.key for job in self._waiting)
            if left <= 0 or company >= self.pace.max_batch:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    def _forget_dropped(self) -> None:
        before = len(self._waiting)
        self._waiting = deque(job for job in self._waiting if not job.future.done())
        for _ in range(before - len(self._waiting)):
            self._on_dropped()

    def _take_batch(self) -> list[Job]:
        """The oldest order that is still wanted, and those that can be drawn with it, in order of arrival."""
        self._forget_dropped()
        if not self._waiting:
            return []
        first = self._waiting[0]
        if first.order.strict:
            batch = [first]
        else:
            mates = [job for job in self._waiting if job.order.key == first.order.key and not job.order.strict]
            batch = mates[: self.pace.max_batch]
        taken = set(map(id, batch))
        self._waiting = deque(job for job in self._waiting if id(job) not in taken)
        return batch

    async def _draw_batch(self, jobs: list[Job]) -> None:
        began = time.perf_counter()
        for job in jobs:
            job.started = True
        loop = asyncio.get_running_loop()
        try:
            pictures = await loop.run_in_executor(self._worker, self._draw, [job.order for job in jobs])
        except asyncio.CancelledError:
            for job in jobs:
                job.future.cancel()
            raise
        except Exception as error:  # whatever a pipeline raises is the answer to those who asked
            if len(jobs) == 1:
                if not jobs[0].future.done():
                    jobs[0].future.set_exception(error)
            else:  # one of them may have spoilt it for all
                for job in jobs:
                    await self._draw_batch([job])
            return
        seconds = time.perf_counter() - began
        self._order_seconds += 0.1 * (seconds / len(jobs) - self._order_seconds)
        for job, picture in zip(jobs, pictures, strict=True):
            if job.future.done():
                continue
            if isinstance(picture, OnestrokeError):
                job.future.set_exception(picture)
            else:
                job.future.set_result(Drawn(picture, began - job.arrived, seconds, len(jobs)))
        self._observe(jobs, seconds)
