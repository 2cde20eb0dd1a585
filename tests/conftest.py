"""What several test files share."""

import pytest

from tests.browsers import CHROMIUM, FLAGS


@pytest.fixture(scope="module")  # playwright's event loop runs as long, and asyncio.run cannot be called beside it
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()
