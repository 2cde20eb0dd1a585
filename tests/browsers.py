"""Chromium with the studio open in it."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import contextmanager

import pytest

from onestroke.serve.app import build_app
from onestroke.serve.batcher import Pace
from tests.servers import Scribe

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="the studio's tests need Chromium: apt-get install chromium"
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-extensions", "--no-first-run"]  # fmt: skip
PATIENCE = float(os.environ.get("ONESTROKE_BROWSER_SECONDS", "30")) * 1000  # of one wait, on a busy machine


@contextmanager
def opened(browser, address: str, **settings):
    """A page of the studio at `address`; fails if a script failed or another address was asked for anything."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "accept_downloads": True} | settings)
    context.set_default_timeout(PATIENCE)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request", lambda request: request.url.startswith((address, "blob:", "data:")) or faults.append(request.url)
    )
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    try:
        yield page
    finally:
        context.close()
    assert faults == []


def scribes() -> tuple[Scribe, Scribe]:
    """Student and teacher whose pictures are flat: red is the seed, green the steps."""
    student, teacher = Scribe("student"), Scribe("teacher")
    teacher.steps = 25
    return student, teacher


def app_of(*drawers):
    return build_app(drawers, pace=Pace(wait=0.0), with_page=True)


def current(page) -> None:
    page.wait_for_selector("#panel-state[data-state=current]")


def until(page, script: str) -> None:
    """Wait until `script` is true; playwright's own waiting evaluates in the page, whose policy forbids it."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(script):
        assert time.monotonic() < deadline, script
        page.wait_for_timeout(30)


def pixel(page, panel: int = 0) -> list[int]:
    """The middle of a panel as the page shows it."""
    script = """i => { const c = document.querySelectorAll(".panel canvas")[i];
      return [...c.getContext("2d").getImageData(c.width / 2, c.height / 2, 1, 1).data].slice(0, 3); }"""
    return page.evaluate(script, panel)
