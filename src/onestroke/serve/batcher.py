"""What is drawn together, and when: a bounded queue before one worker thread.

The event loop never draws. An order that is cancelled before its batch begins costs no model call.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import numpy as np

from onestroke.errors import OnestrokeError
from onestroke.serve.order import Order

Picture = np.ndarray  # h w 3, uint8
Drawing = Callable[[], Sequence[Picture | OnestrokeError]]  # waits for the pictures of a batch that has begun


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
    lock: threading.Lock  # of its batcher: guards `started`
    arrived: float = field(default_factory=time.perf_counter)
    started: bool = False

    def drop(self) -> bool:
        """Take it back. False if it is too late: its batch has begun or is done."""
        with self.lock:
            return not self.started and self.future.cancel()


@dataclass(frozen=True)
class _Batch:
    """Orders that are being drawn together."""

    jobs: list[Job]
    began: float
    drawing: Drawing

    @property
    def orders(self) -> list[Order]:
        return [job.order for job in self.jobs]

    @property
    def key(self) -> Hashable:
        """None of an order that is drawn alone."""
        first = self.jobs[0].order
        return None if first.strict else first.key


@dataclass(frozen=True)
class Pace:
    """How the batcher trades delay for throughput."""

    wait: float = 0.005  # seconds that a first order waits for others of its key
    max_batch: int = 16
    max_queue: int = 128  # orders that wait


class Batcher:
    """Draws the oldest order that waits, together with those of its key.

    The worker thread goes from batch to batch by itself for as long as one is ready: under load it does not wait for
    the event loop, which is busy with the pictures of the last one. A full batch that may be drawn beside the last is
    begun before that one ends, so that no core waits for the others.
    """

    def __init__(
        self,
        begin: Callable[[Sequence[Order]], Drawing],
        pace: Pace = Pace(),
        *,
        overlaps: Callable[[Sequence[Order]], bool] = lambda orders: False,
        observe: Callable[[Sequence[Job], float], None] = lambda jobs, seconds: None,
        on_dropped: Callable[[], None] = lambda: None,
    ) -> None:
        """`begin` runs in the worker thread, and so does what it returns, which gives the pictures, or an error in a
        picture's place. `overlaps`: whether one more batch of these orders' key may begin before theirs ends.
        `observe(jobs, seconds)` runs in the event loop, after each batch; `on_dropped` in either."""
        self._begin, self._overlaps, self.pace = begin, overlaps, pace
        self._observe, self._on_dropped = observe, on_dropped
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()  # under the lock, as is `started` of each
        self._arrived = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="onestroke-draw")
        self._order_seconds = 0.1  # of one order, a running mean
        self._ended = 0.0  # of the worker: the last batch
        self._must_return = 0  # of the worker: calls that wait for it, and the end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_task: asyncio.Task | None = None

    def start(self) -> None:
        """Begin to draw, in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop_task = self._loop.create_task(self._run(), name="batcher")

    async def stop(self) -> None:
        """End after the batch that is being drawn; whoever still waits is told."""
        self._must_return += 1
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        for job in list(self._waiting):
            job.future.cancel()
        await asyncio.to_thread(self._worker.shutdown)

    async def in_worker(self, call: Callable[[], None]) -> None:
        """Run `call` between batches, in the thread that draws."""
        self._must_return += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self._worker, call)
        finally:
            self._must_return -= 1

    @property
    def num_waiting(self) -> int:
        """Orders that wait and are still wanted."""
        return sum(not job.future.done() for job in list(self._waiting))  # a copy: other threads ask too

    def submit(self, orders: Sequence[Order]) -> list[Job]:
        """Take all of `orders` or none. Raises `QueueFull`."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if len(self._waiting) + len(orders) > self.pace.max_queue:
                self._forget_dropped()
            if len(self._waiting) + len(orders) > self.pace.max_queue:
                raise QueueFull(max(1, math.ceil(len(self._waiting) * self._order_seconds)))
            jobs = [Job(order, loop.create_future(), self._lock) for order in orders]
            self._waiting.extend(jobs)
        self._arrived.set()
        return jobs

    async def _run(self) -> None:
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather_company()
            await asyncio.get_running_loop().run_in_executor(self._worker, self._draw_all_ready)

    async def _gather_company(self) -> None:
        """Wait until a batch is ready."""
        while (left := self._patience()) > 0:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    def _patience(self) -> float:
        """Seconds that the oldest order still waits for company; 0 where its batch is full, or nothing waits."""
        with self._lock:
            first = next((job for job in self._waiting if not job.future.done()), None)
            if first is None or first.order.strict:
                return 0.0
            company = sum(job.order.key == first.order.key for job in self._waiting)
            if company >= self.pace.max_batch:
                return 0.0
            return max(0.0, first.arrived + self.pace.wait - time.perf_counter())

    def _forget_dropped(self) -> None:
        before = len(self._waiting)
        self._waiting = deque(job for job in self._waiting if not job.future.done())
        for _ in range(before - len(self._waiting)):
            self._on_dropped()

    def _take_batch(self, *, beside: _Batch | None) -> list[Job]:
        """The oldest order that is still wanted, and those that can be drawn with it, in order of arrival; `beside`
        another batch only a full one of its key."""
        with self._lock:
            self._forget_dropped()
            if not self._waiting:
                return []
            first = self._waiting[0]
            if first.order.strict:
                batch = [first]
            else:
                mates = [job for job in self._waiting if job.order.key == first.order.key and not job.order.strict]
                batch = mates[: self.pace.max_batch]
            if beside is not None and not (len(batch) == self.pace.max_batch and first.order.key == beside.key):
                return []
            taken = set(map(id, batch))
            self._waiting = deque(job for job in self._waiting if id(job) not in taken)
            for job in batch:
                job.started = True
            return batch

    # in the worker thread

    def _draw_all_ready(self) -> None:
        """Draw a batch, and further ones as long as they are ready at once."""
        batch, spoilt = self._next_batch(), []
        while batch is not None:
            ahead = self._next_batch(beside=batch)
            spoilt += self._finish(batch)
            if ahead is None:
                for job in spoilt:
                    self._finish(self._begun([job]))
                spoilt = []
                if self._must_return or self._patience() > 0:
                    return
                ahead = self._next_batch()
            batch = ahead

    def _next_batch(self, *, beside: _Batch | None = None) -> _Batch | None:
        if beside is not None and (self._must_return or not self._overlaps(beside.orders)):
            return None
        jobs = self._take_batch(beside=beside)
        return self._begun(jobs) if jobs else None

    def _begun(self, jobs: list[Job]) -> _Batch:
        began = time.perf_counter()
        try:
            drawing = self._begin([job.order for job in jobs])
        except Exception as error:
            drawing = partial(_raise, error)
        return _Batch(jobs, began, drawing)

    def _finish(self, batch: _Batch) -> list[Job]:
        """Wait for the pictures and hand them over; returns the jobs that have to be drawn one by one."""
        try:
            pictures = batch.drawing()
        except Exception as error:  # whatever a pipeline raises is the answer to those who asked
            if len(batch.jobs) > 1:  # one of them may have spoilt it for all
                return batch.jobs
            self._tell(_fail, batch.jobs[0], error)
            return []
        began, self._ended = max(batch.began, self._ended), time.perf_counter()
        seconds = self._ended - began
        self._order_seconds += 0.1 * (seconds / len(batch.jobs) - self._order_seconds)
        self._tell(self._answer, batch.jobs, pictures, began, seconds)
        return []

    def _tell(self, call: Callable[..., None], *arguments) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(call, *arguments)

    # in the event loop

    def _answer(
        self, jobs: list[Job], pictures: Sequence[Picture | OnestrokeError], began: float, seconds: float
    ) -> None:
        for job, picture in zip(jobs, pictures, strict=True):
            if isinstance(picture, OnestrokeError):
                _fail(job, picture)
            elif not job.future.done():
                job.future.set_result(Drawn(picture, began - job.arrived, seconds, len(jobs)))
        self._observe(jobs, seconds)


def _raise(error: Exception) -> NoReturn:
    raise error


def _fail(job: Job, error: Exception) -> None:
    if not job.future.done():
        job.future.set_exception(error)
