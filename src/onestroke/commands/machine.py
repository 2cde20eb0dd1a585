"""Make a process use the machine that it runs on."""

from __future__ import annotations

import ctypes
import os

KEPT = 2**30  # bytes
# Of glibc's malloc.h: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, and M_ARENA_MAX, for an arena that is not the first hands
# memory back in any case.
MALLOPT = {-1: KEPT, -3: KEPT, -8: 1}


def use_machine() -> None:
    """All cores, and memory that was let go ready for the next step."""
    cap_threads()
    keep_memory()


def cap_threads() -> None:
    """As many threads as there are cores for this process (a container may show more than it grants).

    Fewer where OMP_NUM_THREADS says so. Processes that torchrun started on one machine share its cores; there
    OMP_NUM_THREADS is torchrun's own 1.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "LOCAL_WORLD_SIZE" in os.environ:
        cores = max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"]))
    elif "OMP_NUM_THREADS" in os.environ:
        cores = min(cores, torch.get_num_threads())
    if torch.get_num_threads() != cores:
        torch.set_num_threads(cores)


def keep_memory() -> None:
    """Let glibc keep memory that is let go, where nobody said otherwise (`MALLOC_*`, `GLIBC_TUNABLES`).

    Each step and each batch asks for the same large blocks again. Handed back to the system, they come page by page,
    each cleared anew: a twentieth of a step of training, and of a batch's drawing. Other C libraries are left alone.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option, value in MALLOPT.items():
            mallopt(option, value)
