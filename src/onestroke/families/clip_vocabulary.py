"""The CLIP tokenizer that SD 1.x, SD 2.x and SDXL share, built from the merges packaged in `configs`.

`configs/clip_merges.txt.gz` holds the 48,894 byte-pair merges that CLIP uses, one a line, in order of rank: lines 2 to
48,895 of OpenAI's `bpe_simple_vocab_16e6.txt` (github.com/openai/CLIP, MIT licence, copyright 2021 OpenAI), taken from
open_clip_torch 3.3.0 (MIT licence).
"""

from __future__ import annotations

import gzip
from functools import cache
from importlib import resources

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """One printable character for each byte value, as GPT-2's byte-level BPE has them, printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    num_others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(num_others)]


@cache
def _merges() -> tuple[tuple[str, str], ...]:
    packed = resources.files("onestroke.families").joinpath("configs/clip_merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    return tuple((left, right) for left, right in (line.split() for line in lines))


def clip_vocabulary() -> dict[str, int]:
    """CLIP's 49,408 tokens and their ids: bytes, bytes that end a word, merges, start and end of text."""
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *(a + b for a, b in _merges()), START, END]
    return {token: i for i, token in enumerate(tokens)}


def clip_tokenizer(*, pad_token: str = END, model_max_length: int = 77) -> CLIPTokenizer:
    """CLIP's tokenizer. `pad_token` is END for SD 1.x and SDXL's first encoder, "!" for SD 2.x and SDXL's second."""
    return CLIPTokenizer(
        vocab=clip_vocabulary(),
        merges=list(_merges()),
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=pad_token,
        model_max_length=model_max_length,
    )
