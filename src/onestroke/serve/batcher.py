"""What is drawn together, and when: a bounded queue before one worker thread.

The event loop never draws. An order that is cancelled before its batch begins costs no model call.
"""

from __future__ import annotations

import asyncio
import math
import threading
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
    lock: threading.Lock  # of its batcher: guards `started`
    arrived: float = field(default_factory=time.perf_counter)
    started: bool = False

    def drop(self) -> bool:
        """Take it back. False if it is too late: its batch has begun or is done."""
        with self.lock:
            return not self.started and self.future.cancel()


@dataclass(frozen=True)
class Pace:
    """How the batcher trades delay for throughput."""

    wait: float = 0.005  # seconds that a first order waits for others of its key
    max_batch: int = 16
    max_queue: int = 128  # orders that wait


class Batcher:
    """Draws the oldest order that waits, together with those of its key.

    The worker thread goes from batch to batch by itself for as long as one is ready: under load it does not wait for
    the event loop, which is busy with the pictures of the last one.
    """

    def __init__(
        self,
        draw: Callable[[Sequence[Order]], Sequence[Picture | OnestrokeError]],
        pace: Pace = Pace(),
        *,
        observe: Callable[[Sequence[Job], float], None] = lambda jobs, seconds: None,
        on_dropped: Callable[[], None] = lambda: None,
    ) -> None:
        """`draw` runs in the worker thread and may give an error in a picture's place; `observe(jobs, seconds)` runs in
        the event loop, after each batch; `on_dropped` in either."""
        self._draw, self.pace, self._observe, self._on_dropped = draw, pace, observe, on_dropped
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()  # under the lock, as is `started` of each
        self._arrived = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="onestroke-draw")
        self._order_seconds = 0.1  # of one order, a running mean
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

    def _take_batch(self) -> list[Job]:
        """The oldest order that is still wanted, and those that can be drawn with it, in order of arrival."""
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
            taken = set(map(id, batch))
            self._waiting = deque(job for job in self._waiting if id(job) not in taken)
            for job in batch:
                job.started = True
            return batch

    # in the worker thread

    def _draw_all_ready(self) -> None:
        """Draw a batch, and further ones as long as they are ready at once."""
        while jobs := self._take_batch():
            self._draw_batch(jobs)
            if self._must_return or self._patience() > 0:
                return

    def _draw_batch(self, jobs: list[Job]) -> None:
        began = time.perf_counter()
        try:
            pictures = self._draw([job.order for job in jobs])
        except Exception as error:  # whatever a pipeline raises is the answer to those who asked
            if len(jobs) == 1:
                self._tell(_fail, jobs[0], error)
            else:  # one of them may have spoilt it for all
                for job in jobs:
                    self._draw_batch([job])
            return
        seconds = time.perf_counter() - began
        self._order_seconds += 0.1 * (seconds / len(jobs) - self._order_seconds)
        self._tell(self._answer, jobs, pictures, began, seconds)

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


def _fail(job: Job, error: Exception) -> None:
    if not job.future.done():
        job.future.set_exception(error)
