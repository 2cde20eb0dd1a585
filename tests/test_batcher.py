"""The batcher: what is drawn together and when, what is dropped, what waits."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from onestroke.serve.batcher import Batcher, Pace, QueueFull
from onestroke.serve.desk import Desk, Gone
from onestroke.serve.order import Order
from tests.servers import Scribe


def order(prompt: str = "a", seed: int = 0, *, steps: int = 1, size=(64, 64), strict: bool = False) -> Order:
    return Order("scribe", prompt, seed, steps, size, None, strict)


def drive(batcher: Batcher, script):
    """Run `script()` beside the batcher, in an event loop of its own."""

    async def main():
        batcher.start()
        try:
            return await asyncio.wait_for(script(), 20)
        finally:
            await batcher.stop()

    return asyncio.run(main())


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10)


def test_orders_of_one_key_are_drawn_together_and_the_oldest_key_goes_first():
    scribe = Scribe(held=True)
    batcher = Batcher(scribe.begin, Pace(wait=0.0, max_batch=3))

    async def script():
        jobs = batcher.submit([order("first")])
        await until(scribe.began)
        jobs += batcher.submit([order("a"), order("b", steps=2), order("c"), order("d"), order("e", size=(64, 32))])
        jobs += batcher.submit([order("f")])
        scribe.free.set()
        return await asyncio.gather(*(job.future for job in jobs))

    drawn = drive(batcher, script)
    assert scribe.prompts == [["first"], ["a", "c", "d"], ["b"], ["e"], ["f"]]
    assert [one.batch_size for one in drawn] == [1, 3, 1, 3, 3, 1, 1]


def test_a_first_order_waits_a_moment_for_company_and_no_longer():
    scribe = Scribe()
    batcher = Batcher(scribe.begin, Pace(wait=0.2))

    async def script():
        first = batcher.submit([order("a")])
        await asyncio.sleep(0.02)
        jobs = first + batcher.submit([order("b")])
        return await asyncio.gather(*(job.future for job in jobs))

    drawn = drive(batcher, script)
    assert scribe.prompts == [["a", "b"]]
    assert 0.15 < drawn[0].queue_seconds < 1.0


def test_a_full_batch_and_a_strict_order_do_not_wait():
    scribe = Scribe()
    batcher = Batcher(scribe.begin, Pace(wait=30.0, max_batch=2))

    async def script():
        jobs = batcher.submit([order("a"), order("b"), order("alone", strict=True)])
        return await asyncio.gather(*(job.future for job in jobs))

    drive(batcher, script)
    assert scribe.prompts == [["a", "b"], ["alone"]]


def test_a_dropped_order_costs_no_model_call_and_one_that_began_cannot_be_dropped():
    scribe, dropped = Scribe(held=True), []
    batcher = Batcher(scribe.begin, Pace(wait=0.0), on_dropped=lambda: dropped.append(1))

    async def script():
        (began,) = batcher.submit([order("began")])
        await until(scribe.began)
        waiting, kept = batcher.submit([order("waiting"), order("kept")])
        assert not began.drop()
        assert waiting.drop()
        assert batcher.num_waiting == 1
        scribe.free.set()
        await kept.future
        return (await began.future).picture

    assert drive(batcher, script)[0, 0].tolist() == [0, 1, 0]
    assert scribe.prompts == [["began"], ["kept"]]
    assert dropped == [1]


def test_a_full_queue_refuses_all_of_a_request_and_says_when_to_come_again():
    scribe = Scribe(held=True)
    batcher = Batcher(scribe.begin, Pace(wait=0.0, max_queue=3))

    async def script():
        batcher.submit([order("drawing")])
        await until(scribe.began)
        jobs = batcher.submit([order("a"), order("b")])
        with pytest.raises(QueueFull) as full:
            batcher.submit([order("c"), order("d")])
        assert full.value.retry_after >= 1
        jobs[0].drop()
        jobs += batcher.submit([order("e"), order("f")])  # a dropped order takes no room
        scribe.free.set()
        await asyncio.gather(*(job.future for job in jobs[1:]))

    drive(batcher, script)
    assert scribe.prompts == [["drawing"], ["b", "e", "f"]]


def test_an_order_that_breaks_the_model_spoils_no_other():
    scribe = Scribe()
    batcher = Batcher(scribe.begin, Pace(wait=0.05))

    async def script():
        jobs = batcher.submit([order("a", 1), order("fail"), order("b", 2)])
        return await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)

    one, error, two = drive(batcher, script)
    assert (one.picture[0, 0, 0], two.picture[0, 0, 0]) == (1, 2)
    assert isinstance(error, ValueError)


def test_the_event_loop_runs_on_while_the_model_draws():
    scribe = Scribe(held=True)
    batcher = Batcher(scribe.begin, Pace(wait=0.0))

    async def script():
        (job,) = batcher.submit([order()])
        await until(scribe.began)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not job.future.done()
        scribe.free.set()
        await job.future

    drive(batcher, script)


def test_batches_that_are_ready_follow_one_another_without_the_event_loop():
    scribe = Scribe(held=True)
    batcher = Batcher(scribe.begin, Pace(wait=0.0))

    async def script():
        jobs = batcher.submit([order("a"), order("b", steps=2), order("c", steps=3)])
        await until(scribe.began)
        scribe.free.set()
        deadline = time.monotonic() + 10
        while len(scribe.prompts) < 3:  # nothing is awaited: the event loop stands still
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert not any(job.future.done() for job in jobs)
        return await asyncio.gather(*(job.future for job in jobs))

    assert [one.batch_size for one in drive(batcher, script)] == [1, 1, 1]


def test_a_full_batch_of_the_same_key_begins_before_the_last_one_ends():
    scribe = Scribe(held=True, ahead=True)
    batcher = Batcher(scribe.begin, Pace(wait=0.0, max_batch=2), overlaps=scribe.overlaps)

    async def script():
        jobs = batcher.submit([order(name) for name in "abcdefg"])
        while len(scribe.prompts) < 2:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert scribe.prompts == [["a", "b"], ["c", "d"]] and not any(job.drop() for job in jobs[:4])
        scribe.free.set()
        return await asyncio.gather(*(job.future for job in jobs))

    assert [one.batch_size for one in drive(batcher, script)] == [2, 2, 2, 2, 2, 2, 1]
    assert scribe.prompts == [["a", "b"], ["c", "d"], ["e", "f"], ["g"]]


@pytest.mark.parametrize(
    "waiting",
    [
        [order("c")],
        [order("c", steps=2), order("d", steps=2)],
        [order("c", strict=True), order("d"), order("e")],
        [order("c", size=(64, 32)), order("d"), order("e")],
    ],
)
def test_no_other_batch_begins_before_the_last_one_ends(waiting):
    scribe = Scribe(held=True, ahead=True)
    batcher = Batcher(scribe.begin, Pace(wait=0.0, max_batch=2), overlaps=scribe.overlaps)

    async def script():
        jobs = batcher.submit([order("a"), order("b"), *waiting])
        await until(scribe.began)
        await asyncio.sleep(0.05)
        begun = list(scribe.prompts)
        scribe.free.set()
        assert begun == [["a", "b"]]
        await asyncio.gather(*(job.future for job in jobs))

    drive(batcher, script)
    assert scribe.prompts[1][0] == "c"


def test_who_was_spoilt_is_drawn_again_once_nothing_else_is_being_drawn():
    scribe = Scribe(held=True, ahead=True)
    batcher = Batcher(scribe.begin, Pace(wait=0.0, max_batch=2), overlaps=scribe.overlaps)

    async def script():
        jobs = batcher.submit([order("a", 1), order("fail"), order("c", 3), order("d", 4), order("e", 5, steps=2)])
        await until(scribe.began)
        scribe.free.set()
        return await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)

    one, error, *others = drive(batcher, script)
    assert isinstance(error, ValueError) and [drawn.picture[0, 0, 0] for drawn in (one, *others)] == [1, 3, 4, 5]
    assert scribe.prompts == [["a", "fail"], ["c", "d"], ["a"], ["fail"], ["e"]]


def test_the_end_comes_after_the_batch_that_is_being_drawn():
    scribe = Scribe(held=True)
    batcher = Batcher(scribe.begin, Pace(wait=0.0))

    async def script():
        began, waiting = batcher.submit([order("began"), order("waiting", steps=2)])
        await until(scribe.began)
        ending = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0.05)
        scribe.free.set()
        await ending
        return (await began.future).batch_size, waiting.future.cancelled()

    assert drive(batcher, script) == (1, True)
    assert scribe.prompts == [["began"]]


def test_who_leaves_takes_the_orders_along():
    scribe = Scribe(held=True)
    desk = Desk([scribe], pace=Pace(wait=0.0))

    async def script():
        (began,) = desk.batcher.submit([order("began")])
        await until(scribe.began)
        with pytest.raises(Gone):
            await desk.draw([order("left 1"), order("left 2")], lambda: asyncio.sleep(0.05))
        scribe.free.set()
        await began.future
        (after,) = desk.batcher.submit([order("after")])
        await after.future

    drive(desk.batcher, script)
    assert scribe.prompts == [["began"], ["after"]]
