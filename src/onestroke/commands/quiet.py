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
