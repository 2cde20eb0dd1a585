"""Calls of one function, done in this process or in several. An engine is anything that does the same elsewhere."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Protocol

from threadpoolctl import threadpool_limits

from onestroke.errors import ResourceError


class Engine(Protocol):
    """Does all calls of a function, in any order; yields as each is done, and raises what a call raises."""

    num_workers: int  # calls that are done at once

    def __call__(self, function: Callable, calls: Sequence[tuple]) -> Iterator[None]: ...


@dataclass(frozen=True)
class Processes:
    """The engine of one machine; one worker is this process.

    Each works in one thread: the matrices are small, and BLAS threads that wait for more of them keep a core busy.
    """

    num_workers: int = 1

    def __call__(self, function: Callable, calls: Sequence[tuple]) -> Iterator[None]:
        if self.num_workers <= 1 or len(calls) <= 1:
            for call in calls:
                with threadpool_limits(1):
                    function(*call)
                yield
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["onestroke.data.curation.run"])
        pool = ProcessPoolExecutor(min(self.num_workers, len(calls)), context, _start_worker)
        waiting = set()
        try:
            for call in calls:
                waiting.add(pool.submit(function, *call))
                if len(waiting) >= 2 * self.num_workers:
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        except BrokenProcessPool as error:
            fix = "Run it again: it goes on where it stopped; give fewer --workers if memory ran out"
            raise ResourceError("a worker was killed", where="curate", fix=fix) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle, and a worker whose parent was killed goes as well."""
    threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
