"""Servers to ask: a model that notes what it draws, tiny pipelines, and uvicorn in a thread."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from onestroke.sample import student_scheduler
from onestroke.serve.app import build_app
from onestroke.serve.drawer import Canvas, Drawer
from onestroke.serve.order import Order
from tests.pipelines import tiny_sdxl


class Scribe:
    """Stands where a `Drawer` stands: flat pictures of the colour (seed, steps, 100 x LoRA's scale), each batch noted.

    `free` keeps the worker until it is set; a prompt "fail" raises. `ahead`: batches may begin before the last ends.
    """

    steps, guidance, max_tokens, unknown_words = 1, 0.0, 62, None
    canvas, phrases, loras = Canvas(64, 8), ("pink hair",), {}
    fit, notices = Drawer.fit, lambda self, prompt: []

    def __init__(self, name: str = "scribe", *, held: bool = False, ahead: bool = False) -> None:
        self.name, self.ahead = name, ahead
        self.batches: list[list[Order]] = []
        self.free, self.began = threading.Event(), threading.Event()
        if not held:
            self.free.set()

    def warm(self) -> None:
        pass

    def overlaps(self, orders: Sequence[Order]) -> bool:
        return self.ahead

    def begin(self, orders: Sequence[Order]) -> Callable[[], list[np.ndarray]]:
        self.batches.append(list(orders))
        self.began.set()
        return partial(self.draw, orders)

    def draw(self, orders: Sequence[Order]) -> list[np.ndarray]:
        assert self.free.wait(20)
        if any(order.prompt == "fail" for order in orders):
            raise ValueError("the model broke: /secret/path")
        colors = [(o.seed % 256, o.steps, round(100 * o.lora[1]) if o.lora else 0) for o in orders]
        return [np.full((*o.size, 3), color, np.uint8) for o, color in zip(orders, colors, strict=True)]

    @property
    def prompts(self) -> list[list[str]]:
        return [[order.prompt for order in batch] for batch in self.batches]


def tiny_drawer(name: str = "tiny") -> Drawer:
    """A random SDXL student for 64 px."""
    pipeline = tiny_sdxl("v_prediction", zero_snr=True)
    pipeline.scheduler = student_scheduler(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return Drawer(name, pipeline)


def client_of(*drawers, headers: dict | None = None, **settings) -> TestClient:
    """A client that addresses the server as 127.0.0.1; use it as a context to start the batcher."""
    return client_to(build_app(list(drawers), **settings), headers=headers)


def client_to(app, *, headers: dict | None = None) -> TestClient:
    """The same to an application."""
    return TestClient(app, base_url="http://127.0.0.1", headers={"host": "127.0.0.1"} | (headers or {}))


def picture_in(answer: dict, index: int = 0) -> np.ndarray:
    """The picture of an answer in OpenAI's form."""
    return pixels_of(base64.b64decode(answer["data"][index]["b64_json"]))


def pixels_of(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def file_of(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures."""
    error = np.mean((one.astype(float) - two.astype(float)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@contextmanager
def running(app, port: int = 0) -> Iterator[str]:
    """`app` under uvicorn on `port` of 127.0.0.1, a free one for 0; its address."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws_max_size=2**20, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
