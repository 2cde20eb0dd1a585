"""Keep other libraries' chatter out of the terminal."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Errors only from diffusers, transformers and the hub; no progress bars of theirs."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for library in ("transformers", "torchao", "torch.utils._pytree"):  # the last two speak when torchao is imported
        logging.getLogger(library).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """The same for libraries that are imported by now."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


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
