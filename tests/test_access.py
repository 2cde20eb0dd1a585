"""axe-core looks at the studio: every state of the page, in light and in dark, on a desk and on a tablet."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.browsers import app_of, current, needs_chromium, opened, scribes, until
from tests.servers import running

pytestmark = needs_chromium
TABLET = {"viewport": {"width": 820, "height": 1180}, "has_touch": True}


def faults(page) -> list[str]:
    """What axe calls serious or critical, each as rule and element."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {node['html'][:120]} ({node['failureSummary'][:200]})"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("device", ["desk", "tablet"])
def test_axe_finds_nothing_serious(browser, theme, device):
    with (
        running(app_of(*scribes())) as address,
        opened(browser, address, **(TABLET if device == "tablet" else {})) as page,
    ):
        current(page)
        if page.evaluate("document.documentElement.dataset.theme") != theme:
            page.click("#theme")
        page.click("#character-add")
        page.click("#page-add")
        page.locator("#pages button").first.click()
        page.fill("#prompt", "a cat beside @Nobody")
        current(page)
        page.click("#variants")
        until(page, "document.querySelectorAll('#variant-grid canvas').length === 8")
        page.click("[data-letter=speech]")
        page.click("summary")
        assert faults(page) == []
        for button, dialog, close in (
            ("#sketch", "#sketch-dialog", "[data-sketch=keep]"),
            ("#compare", "#compare-dialog", "[data-compare=close]"),
            ("#export", "#export-dialog", "#export-dialog [data-close]"),
        ):
            page.click(button)
            page.wait_for_selector(f"{dialog}[open]")
            page.wait_for_timeout(300)
            assert faults(page) == [], dialog
            page.click(close)


def test_axe_would_find_a_fault(browser):
    with running(app_of(*scribes())) as address, opened(browser, address) as page:
        page.evaluate(
            "document.querySelector('#theme').removeAttribute('aria-label'), document.body.style.color = '#ddd'"
        )
        assert {fault.split(":")[0] for fault in faults(page)} >= {"button-name", "color-contrast"}


def test_the_panel_stays_in_sight_while_its_words_are_typed_on_a_tablet(browser):
    with running(app_of(*scribes())) as address, opened(browser, address, **TABLET) as page:
        page.locator("#prompt").focus()
        page.evaluate("document.querySelector('aside').scrollIntoView({block: 'end'})")  # as far as a hand may scroll
        page.fill("#prompt", "a cat")
        current(page)
        prompt, panel = (page.locator(what).bounding_box() for what in ("#prompt", "#page"))
        height = TABLET["viewport"]["height"]
        assert panel["y"] >= 0 and panel["y"] + panel["height"] <= prompt["y"] and prompt["y"] < height
