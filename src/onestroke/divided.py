"""A batch drawn on the CPU by several threads, each with rows and cores of its own.

Threads that share every layer wait for each other at the end of each; a layer of a small model lasts some hundredths of
a millisecond, and one thread that another program holds up holds up all. Threads that share a batch wait once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import copy, deepcopy
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

ROWS = 4  # least of a thread: with fewer, threads that share each layer are as fast
Item, Result = TypeVar("Item"), TypeVar("Result")


def num_parts(pipeline: DiffusionPipeline, num_rows: int) -> int:
    """How many threads a batch of `num_rows` is best divided between; 1 where it must be drawn as a whole.

    That is on a GPU, under autocast (which is a thread's own), in a run of several processes (whose modules may
    communicate, in one order) and where modules are compiled.
    """
    parts = threads_for(num_rows)
    if parts < 2 or not hasattr(pipeline, "encode_prompt") or torch.is_autocast_enabled("cpu"):
        return 1
    if pipeline._execution_device.type != "cpu":  # where offloaded weights are not
        return 1
    return parts if may_be_shared(pipeline.unet, pipeline.vae) else 1


def threads_for(num_rows: int) -> int:
    """How many threads may share so many rows where nothing forbids it: as many cores each, and no core left over."""
    cores = torch.get_num_threads()
    most = max(1, min(cores, num_rows // ROWS))
    return next(count for count in range(most, 0, -1) if cores % count == 0)


def may_be_shared(*modules: nn.Module) -> bool:
    """Whether several threads may call these at once, and are the faster for it: on a CPU, in a run of one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    if any(next(module.parameters()).device.type != "cpu" for module in modules):
        return False
    return all(m._compiled_call_impl is None for module in modules for m in module.modules())


def mapped(function: Callable[[Item], Result], items: Iterable[Item], num_parts: int) -> list[Result]:
    """`function` of each item, by `num_parts` threads that have the cores between them."""
    return list(_threads(num_parts, torch.get_num_threads()).map(function, items))


def draw_divided(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    num_parts: int,
    finish: Callable[[Float[Tensor, "m 3 h w"]], Result],
    *,
    generator: Sequence[torch.Generator],
    **settings,
) -> list[Future[Result]]:
    """Begin to draw `pipeline(prompts, ...)` in `num_parts` threads: what `finish` makes of each part's pictures;
    `settings`: of the pipeline's call."""

    @torch.inference_mode()
    def draw(rows: slice) -> Result:
        mine = _own(pipeline)
        return finish(mine(prompt=list(prompts[rows]), generator=list(generator[rows]), **settings).images)

    bounds = [len(prompts) * part // num_parts for part in range(num_parts + 1)]
    shares = [slice(first, last) for first, last in pairwise(bounds)]
    pool = _threads(num_parts, torch.get_num_threads())
    return [pool.submit(draw, share) for share in shares]


def wait_for_all(parts: Sequence[Future[Result]]) -> Sequence[Future[Result]]:
    """The parts once all are done, failed ones too: what comes next may change the weights that they read."""
    wait(parts)
    return parts


def _own(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline for this thread: weights are shared; tokenizers, and where a sampler stands, are its own."""
    mine = copy(pipeline)
    mine.scheduler = deepcopy(pipeline.scheduler)
    for name in ("tokenizer", "tokenizer_2"):
        if (tokenizer := getattr(pipeline, name, None)) is not None:
            setattr(mine, name, _copied(tokenizer))
    return mine


class _Kept(threading.local):
    """A thread's copies of tokenizers, which hold their truncation as state and take longer to copy than to use."""

    def __init__(self) -> None:
        self.copies: WeakKeyDictionary[PreTrainedTokenizerBase, PreTrainedTokenizerBase] = WeakKeyDictionary()


_kept = _Kept()


def _copied(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    found = _kept.copies.get(tokenizer)
    if found is None or len(found) != len(tokenizer):  # words may have been added since
        found = _kept.copies[tokenizer] = deepcopy(tokenizer)
    return found


@lru_cache(maxsize=4)
def _threads(count: int, total: int) -> ThreadPoolExecutor:
    """`count` threads that compute with `total` threads among them."""
    all_there = threading.Barrier(count)

    def begin(_: int) -> None:
        torch.get_num_threads()  # a thread takes the number last set when it is first asked
        torch.set_num_threads(max(1, total // count))
        all_there.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="onestroke-part")
    list(pool.map(begin, range(count)))
    torch.set_num_threads(total)  # for threads that come later
    return pool


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of its parent's threads
