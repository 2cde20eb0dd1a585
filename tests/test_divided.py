"""A batch that several threads draw: the pictures of one thread, and when it is not divided."""

import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from pipelines import tiny_sd, tiny_sdxl

from onestroke import divided, sample
from onestroke.divided import num_parts
from onestroke.evaluate.latency import PartTimer
from onestroke.fast import make_fast
from onestroke.sample import draw
from onestroke.serve.order import Order, Start
from tests.servers import tiny_drawer

PROMPTS = [f"a {word} person" for word in ("sad", "glad", "mad", "tall", "small", "old", "young", "kind", "odd")]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("build", [tiny_sdxl, tiny_sd])
def test_a_divided_batch_holds_the_pictures_of_a_whole_one(build, guidance, monkeypatch):
    pipeline, by = make_fast(build()), set()
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda *args, **kinds: (by.add(threading.get_ident()), forward(*args, **kinds))[1]
    found = draw(pipeline, PROMPTS, seeds=range(9), steps=3, guidance=guidance)
    assert len(by) == 2 and threading.get_ident() not in by
    monkeypatch.setattr(sample, "num_parts", lambda pipeline, num_rows: 1)
    whole = draw(pipeline, PROMPTS, seeds=range(9), steps=3, guidance=guidance)
    assert found.shape == whole.shape and len(np.unique(whole)) > 20
    assert np.abs(found.astype(int) - whole).max() <= 2  # bfloat16's rounding


@pytest.mark.usefixtures("two_threads")
def test_each_thread_reads_words_with_tokenizers_of_its_own_that_know_added_ones():
    pipeline = tiny_sdxl()
    readers, encode_prompt = [], type(pipeline).encode_prompt

    def encode(self, *args, **kinds):
        readers.append((threading.get_ident(), self.tokenizer, self.tokenizer_2))
        return encode_prompt(self, *args, **kinds)

    pipeline.__class__ = type("Watched", (type(pipeline),), {"encode_prompt": encode})
    for _ in range(2):
        draw(pipeline, PROMPTS[:8], seeds=range(8), steps=1, guidance=0.0)
    own = {thread: {id(reader) for who, *pair in readers if who == thread for reader in pair} for thread, *_ in readers}
    assert len(readers) == 4 and [len(tokenizers) for tokenizers in own.values()] == [2, 2]  # copied once
    assert len(set().union(*own.values(), {id(pipeline.tokenizer), id(pipeline.tokenizer_2)})) == 6
    pipeline.tokenizer.add_tokens("blorp")
    draw(pipeline, PROMPTS[:8], seeds=range(8), steps=1, guidance=0.0)
    assert all("blorp" in first.get_vocab() and "blorp" not in second.get_vocab() for _, first, second in readers[4:])


@pytest.mark.usefixtures("two_threads")
def test_threads_that_draw_share_the_cores_and_leave_others_theirs():
    seen, pipeline = [], make_fast(tiny_sdxl())
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda *args, **kinds: (seen.append(torch.get_num_threads()), decode(*args, **kinds))[1]
    draw(pipeline, PROMPTS[:8], seeds=range(8), steps=1, guidance=0.0)
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [1, 1, 2] and torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_batch_that_begins_before_the_last_ends_holds_its_own_pictures():
    drawer = tiny_drawer()
    batches = [[Order("tiny", prompt, seed, 2, (64, 64)) for prompt in PROMPTS[:8]] for seed in (1, 2)]
    start = Start(np.zeros((64, 64, 3), np.uint8), 0.5)
    assert drawer.overlaps(batches[0]) and not drawer.overlaps(batches[0][:1])
    assert not drawer.overlaps([replace(order, start=start) for order in batches[0]])
    expected = [drawer.draw(batch) for batch in batches]
    first, second = map(drawer.begin, batches)
    found = [second(), first()][::-1]
    assert np.array_equal(found, expected) and not np.array_equal(*expected)


@pytest.mark.usefixtures("two_threads")
def test_a_part_that_fails_is_told_when_no_other_is_being_drawn_any_more():
    pipeline, done = tiny_sdxl(), []
    encode_prompt = type(pipeline).encode_prompt

    def first_part_fails(self, prompt, *args, **kinds):
        if prompt[0] == PROMPTS[0]:
            raise MemoryError("no room")
        time.sleep(0.3)
        done.append(1)
        return encode_prompt(self, prompt, *args, **kinds)

    pipeline.__class__ = type("Failing", (type(pipeline),), {"encode_prompt": first_part_fails})
    with pytest.raises(MemoryError, match="no room"):
        draw(pipeline, PROMPTS[:8], seeds=range(8), steps=1, guidance=0.0)
    assert done == [1]


@pytest.mark.usefixtures("two_threads")
def test_what_fails_in_one_thread_reaches_who_asked_and_the_next_batch_is_drawn():
    pipeline = make_fast(tiny_sdxl())
    decode, calls = pipeline.vae.decode, []

    def fails_once(*args, **kinds):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        return decode(*args, **kinds)

    pipeline.vae.decode = fails_once
    with pytest.raises(MemoryError, match="no room"):
        draw(pipeline, PROMPTS[:8], seeds=range(8), steps=1, guidance=0.0)
    assert draw(pipeline, PROMPTS[:8], seeds=range(8), steps=1, guidance=0.0).shape == (8, 64, 64, 3)


def test_how_many_threads_a_batch_is_divided_between(monkeypatch):
    pipeline = tiny_sdxl()
    assert num_parts(pipeline, 32) == 1  # one thread is there
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [num_parts(pipeline, rows) for rows in (1, 7, 8, 15, 16, 64)] == [1, 1, 2, 2, 4, 4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert [num_parts(pipeline, rows) for rows in (8, 16, 23, 64)] == [2, 3, 3, 6]  # four would leave two cores idle
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert [num_parts(pipeline, rows) for rows in (16, 28)] == [1, 7]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert num_parts(lambda **settings: None, 64) == 1  # no pipeline of diffusers
    with torch.autocast("cpu", torch.bfloat16):
        assert num_parts(pipeline, 64) == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        assert num_parts(pipeline, 64) == 1
    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline), "_execution_device", torch.device("cuda"))
        assert num_parts(pipeline, 64) == 1
    pipeline.unet.mid_block.compile()  # lazily: nothing is compiled before it is called
    assert num_parts(pipeline, 64) == 1


@pytest.mark.usefixtures("two_threads")
def test_a_child_of_a_process_that_drew_has_no_threads_of_it():
    divided._threads(2, 2)
    child = os.fork()
    if not child:
        os._exit(divided._threads.cache_info().currsize)
    assert os.waitpid(child, 0)[1] == 0 and divided._threads.cache_info().currsize == 1


def test_of_threads_that_draw_at_the_same_time_the_longest_counts(monkeypatch):
    clock = iter((0.0, 1.0, 10.0, 14.0, 20.0, 22.0))
    timer = PartTimer()
    monkeypatch.setattr(timer, "now", lambda: next(clock))

    def spend():
        with timer.part("unet"):
            pass

    spend()
    other = threading.Thread(target=spend)
    other.start()
    other.join()
    spend()  # 1 and 2 seconds in this thread, 4 in the other
    assert timer.take() == {"unet": 4.0} and timer.take() == {}
