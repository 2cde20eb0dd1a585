"""The arena's page in a real browser: a whole session by keyboard alone, and what a voter gets to see."""

import shutil
import threading
import time

import pytest
import uvicorn

from onestroke.arena.order import make_trials
from onestroke.arena.server import create_app, open_socket
from onestroke.arena.session import Session
from onestroke.arena.votes import VoteLog
from tests.test_arena import LABELS, write_pairs

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    sync_playwright is None or CHROMIUM is None, reason="needs playwright and an installed chromium"
)

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def session(tmp_path):
    with VoteLog(tmp_path / "votes.jsonl") as log:
        trials = make_trials(3, voter="me")
        yield Session(write_pairs(tmp_path / "pictures", 3), LABELS, trials, log, voter="me")


@pytest.fixture
def address(session):
    listener = open_socket(0)
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(create_app(session, port=port), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def page(address):
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 820})
        page.troubles = []
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on("console", lambda message: page.troubles.append(message.text) if message.type == "error" else None)
        page.goto(address)
        yield page
        browser.close()


def is_shown(page, number: int) -> None:
    expect(page.locator("#place")).to_have_text(f"{number} of 3")
    expect(page.locator("form:not(.waiting)")).to_be_visible()


def test_a_session_is_voted_by_keyboard_alone(page, session):
    is_shown(page, 1)
    assert page.locator("#prompt").inner_text() == session.pairs[session.trials[0].pair].prompt  # <b> and all
    for key in ("Enter", "ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown", "Enter"):  # too early, changed, sent
        page.keyboard.press(key)
    is_shown(page, 2)
    assert [(vote.quality, vote.adherence) for vote in session.log.votes] == [("right", "tie")]
    assert not page.locator("input:checked").count()
    for key in ("Tab", "Space", "Tab", "Space", "Enter"):  # as with any form
        page.keyboard.press(key)
    is_shown(page, 3)
    assert [(vote.quality, vote.adherence) for vote in session.log.votes[1:]] == [("left", "left")]
    for key in ("ArrowDown", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    page.wait_for_url("**/results")
    assert "What the votes say" in page.locator("h1").inner_text()
    assert len(session.log.votes) == 3 and all(vote.seconds > 0 for vote in session.log.votes)
    assert not page.troubles


def test_both_questions_have_to_be_answered(page, session):
    is_shown(page, 1)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("Answer both questions first.")
    assert not session.log.votes
    page.get_by_role("group", name="Which shows the words above better?").get_by_text("Right").click()
    page.get_by_role("button", name="Next pair").click()
    is_shown(page, 2)
    assert [(vote.quality, vote.adherence) for vote in session.log.votes] == [("left", "right")]


def test_a_voter_may_stop_and_is_asked_first(page, session):
    is_shown(page, 1)
    for key in ("ArrowLeft", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    is_shown(page, 2)
    page.get_by_role("button", name="Stop here").click()
    page.keyboard.press("Escape")
    assert not session.is_finished
    page.get_by_role("button", name="Stop here").click()
    page.get_by_role("button", name="See the results", exact=True).click()
    page.wait_for_url("**/results")
    assert session.is_finished and len(session.log.votes) == 1


def test_words_are_legible_in_light_and_dark_and_fit_a_narrow_window(page):
    is_shown(page, 1)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for selector in (".place", "#prompt", "legend", ".choices span", ".keys", "#next", ".leave button"):
            assert contrast(page, selector) >= 4.5, f"{selector} in {scheme}"
    page.set_viewport_size({"width": 320, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert page.locator("#left").bounding_box()["width"] >= 130


def contrast(page, selector: str) -> float:
    """WCAG's contrast ratio of the first such element's text and what lies behind it."""
    colors = page.locator(selector).first.evaluate(
        """element => {
            const text = getComputedStyle(element).color;
            let behind = element;
            const isClear = (element) => getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)";
            while (behind && isClear(behind)) behind = behind.parentElement;
            return [text, getComputedStyle(behind ?? document.body).backgroundColor];
        }"""
    )
    bright, dark = sorted((luminance(color) for color in colors), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    channels = [int(part) / 255 for part in color.strip("rgb()").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
