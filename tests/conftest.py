"""What several test files share."""

import os

# Before torch is there, and for commands too: what one thread computes is the same to the bit.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from onestroke import divided, embedded
from onestroke.data.comicset import ComicSource
from onestroke.embedded.architecture import build_pipeline
from onestroke.embedded.autoencoder import build_autoencoder
from onestroke.embedded.judge import new_judge, save_judge
from tests.browsers import CHROMIUM, FLAGS


@pytest.fixture(scope="module")  # playwright's event loop runs as long, and asyncio.run cannot be called beside it
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    divided._threads.cache_clear()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def untrained_weights(tmp_path_factory) -> Path:
    """The embedded models before their first step, laid out as in the package."""
    folder = tmp_path_factory.mktemp("weights")
    source = ComicSource(100)
    pipeline = build_pipeline(build_autoencoder(), [source.caption(index) for index in range(len(source))])
    pipeline.save_pretrained(folder / "teacher")
    pipeline.unet.save_pretrained(folder / "student" / "unet")
    save_judge(new_judge(), folder / "judge.safetensors")
    return folder


@pytest.fixture
def weights(untrained_weights, monkeypatch) -> Iterator[Path]:
    monkeypatch.setattr(embedded, "weights_folder", lambda: untrained_weights)
    embedded.embedded_judge.cache_clear()
    yield untrained_weights
    embedded.embedded_judge.cache_clear()
