"""A book of several pages in Chromium: its sheet of characters, and what leaves the studio as PNG, PDF and CBZ."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
import zipfile

import numpy as np
import pypdfium2
import pytest
from PIL import Image

from tests.browsers import app_of, current, needs_chromium, opened, pixel, scribes, until
from tests.servers import running

pytestmark = needs_chromium


def write(page, index: int, prompt: str) -> None:
    page.locator(".panel").nth(index).click()
    page.fill("#prompt", prompt)
    current(page)


def test_a_sheet_is_written_into_every_panel_that_names_it(browser):
    student, _ = scribes()
    with running(app_of(student)) as address, opened(browser, address) as page:
        current(page)
        page.click("#character-add")
        words = page.locator(".attribute input:nth-child(2)")
        words.nth(0).fill("a person")
        words.nth(1).fill("pink hair")
        words.nth(3).fill("a red scarf")
        page.fill("#style", "in thin ink")
        write(page, 0, "@Mara, laughing")
        write(page, 1, "a dog beside @mara.hair and @Bob")
        assert "not on the character sheet: @Bob" in page.inner_text("#spoken")
        assert {prompt for batch in student.prompts for prompt in batch} >= {
            "a person with pink hair and a red scarf, laughing, in thin ink",
            "a dog beside pink hair and @Bob, in thin ink",
        }
        drawn = len(student.batches)
        words.nth(1).fill("green hair")  # once, and both panels follow
        asked = {
            "a person with green hair and a red scarf, laughing, in thin ink",
            "a dog beside green hair and @Bob, in thin ink",
        }
        for _ in range(200):  # the page waits a moment before it asks
            if asked <= (seen := {prompt for batch in student.prompts[drawn:] for prompt in batch}):
                break
            page.wait_for_timeout(50)
        assert asked <= seen
        current(page)
        # the prompt completes a name; a name that no prompt could hold is put back
        page.fill("#prompt", "")
        page.locator("#prompt").press_sequentially("@ma")
        page.locator("#completions li").first.wait_for()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        assert page.input_value("#prompt") == "@Mara"
        name = page.locator(".character .name")
        name.fill("no/name")
        name.press("Tab")
        assert name.input_value() == "Mara"
        # undone like everything else
        page.click(".character .danger")
        assert page.locator(".character").count() == 0
        page.click("#undo")
        assert page.locator(".character .name").input_value() == "Mara"


def test_pages_are_added_moved_removed_and_undone(browser):
    student, _ = scribes()
    with running(app_of(student)) as address, opened(browser, address) as page:
        write(page, 0, "first")
        page.click("#page-add")
        assert page.input_value("#prompt") == "" and page.locator("#pages li").count() == 2
        page.select_option("#layout", "splash")
        page.fill("#seed", "77")
        write(page, 0, "second")
        page.locator("#seed").press("Tab")
        current(page)
        assert pixel(page) == [77, 1, 0]
        page.click("#page-earlier")
        assert page.locator("#pages [aria-current=page]").get_attribute("aria-label") == "Page 1 of 2"
        page.locator("#pages button").nth(1).click()
        assert page.input_value("#prompt") == "first" and page.input_value("#layout") == "three"
        page.click("#page-remove")
        assert page.input_value("#prompt") == "second" and page.is_disabled("#page-remove")
        page.click("#undo")  # undoing turns to the page where it was done
        assert page.input_value("#prompt") == "first" and page.locator("#pages li").count() == 2
        until(page, "document.querySelector('#saved').textContent === 'Saved in this browser'")
        page.reload()
        page.wait_for_selector("body[data-ready]")
        assert page.locator("#pages li").count() == 2 and page.input_value("#prompt") == "second"


def export(page, kind: str, tmp_path) -> bytes:
    page.click("#export")
    page.click(f"label[for=export-{kind}]")
    page.locator("#export-go:enabled").wait_for()
    with page.expect_download() as exporting:
        page.click("#export-go")
    assert exporting.value.suggested_filename.endswith(f".{kind}")
    exporting.value.save_as(tmp_path / f"book.{kind}")
    return (tmp_path / f"book.{kind}").read_bytes()


@pytest.fixture(scope="module")
def exported(browser, tmp_path_factory):
    """Two pages, one of them never looked at since it was opened, as PNG, PDF, CBZ and the panel's own picture."""
    path, found = tmp_path_factory.mktemp("book"), {}
    student, _ = scribes()
    with running(app_of(student)) as address, opened(browser, address) as page:
        page.fill("#title", "Tom & <Jerry> \U0001f600")
        page.select_option("#direction", "rtl")
        write(page, 0, "a cat & a mouse")
        for kind, words in (("speech", "Where to, AVA?"), ("effect", "KRAK"), ("shout", "日本"), ("caption", "Later")):
            page.click(f"[data-letter={kind}]")
            page.fill("#balloon-text", words)
        page.click("#page-add")
        page.select_option("#layout", "two")
        write(page, 1, "a house")
        for kind in ("png", "pdf", "cbz"):
            if kind == "png":
                page.locator("#pages button").nth(0).click()
                current(page)
            found[kind] = export(page, kind, path)
        with page.expect_download() as saving:
            page.click("#save-picture")
        saving.value.save_as(path / "panel.png")
        found["panel"] = (path / "panel.png").read_bytes()
    return found


def test_a_panels_own_picture_carries_what_it_was_drawn_from(exported):
    text = Image.open(io.BytesIO(exported["panel"])).text
    assert {name: text[name] for name in ("prompt", "seed", "steps", "model")} == {
        "prompt": "a cat & a mouse", "seed": "1", "steps": "1", "model": "student",
    }  # fmt: skip


def test_the_pdf_shows_the_page_and_its_lettering_is_text(exported):
    pdf = pypdfium2.PdfDocument(exported["pdf"])
    assert len(pdf) == 2 and pdf[0].get_size() == pytest.approx((477, 738))
    words = re.findall(
        r"\w+", pdf[0].get_textpage().get_text_range()
    )  # PDFium turns the words of a book in manga order
    assert {"WHERE", "TO", "AVA", "LATER"} <= set(words) and "KRAK" in "".join(words) and "日" not in "".join(words)
    fonts = [block for block in exported["pdf"].split(b"\n") if b"/FontFile2" in block]
    assert len(fonts) == 2  # both embedded
    assert pdf.get_metadata_dict()["Title"] == "Tom & <Jerry> \U0001f600"
    # The same page as the PNG of it: frames, pictures, balloons and letters stand where they stood.
    png = Image.open(io.BytesIO(exported["png"])).convert("L").resize((663, 1025), Image.Resampling.BOX)
    rendered = pdf[0].render(scale=663 / 477).to_pil().convert("L").resize((663, 1025))
    difference = np.abs(np.asarray(png, float) - np.asarray(rendered, float))
    assert difference.mean() < 1.5 and np.mean(difference > 96) < 0.002
    assert np.asarray(png).std() > 40


def test_the_pdf_holds_what_its_pictures_were_drawn_from(exported):
    start = exported["pdf"].rindex(b"/onestroke <feff") + len(b"/onestroke <feff")
    written = bytes.fromhex(exported["pdf"][start : exported["pdf"].index(b">", start)].decode()).decode("utf-16-be")
    first, second = json.loads(written)["pages"]
    assert first[0].items() >= {"prompt": "a cat & a mouse", "seed": 1, "model": "student", "steps": 1}.items()
    assert [panel["prompt"] for panel in second] == ["", "a house"] and second[0]["enlarged"] is None


def test_the_cbz_holds_all_pages_and_what_readers_show(exported):
    book = zipfile.ZipFile(io.BytesIO(exported["cbz"]))
    assert book.testzip() is None
    assert book.namelist() == ["ComicInfo.xml", "page-001.png", "page-002.png"]
    info = ET.fromstring(book.read("ComicInfo.xml"))
    told = {name: info.findtext(name) for name in ("Title", "PageCount", "Manga")}
    assert told == {"Title": "Tom & <Jerry> \U0001f600", "PageCount": "2", "Manga": "YesAndRightToLeft"}
    for number, entry in enumerate(info.iter("Page"), 1):
        file = book.read(f"page-{number:03}.png")
        image = Image.open(io.BytesIO(file))
        assert entry.attrib["ImageSize"] == str(len(file))
        assert (entry.attrib["ImageWidth"], entry.attrib["ImageHeight"]) == tuple(map(str, image.size))
        assert json.loads(image.text["onestroke"])["page"] == number
    assert json.loads(image.text["onestroke"])["panels"][1]["prompt"] == "a house"


def test_enlarging_keeps_flat_colours_and_makes_edges_steep(browser):
    with running(app_of(*scribes())) as address, opened(browser, address) as page:
        script = """async () => {
          const { enlarged } = await import("/studio/enlarge.js");
          const small = new OffscreenCanvas(8, 8), context = small.getContext("2d");
          context.fillStyle = "#204060"; context.fillRect(0, 0, 8, 8);
          context.fillStyle = "#f0e0d0"; context.fillRect(4, 0, 4, 8);
          const rows = {};
          for (const filter of ["smooth", "crisp"]) {
            const { data } = enlarged(small, 80, 80, filter).getContext("2d").getImageData(0, 40, 80, 1);
            rows[filter] = Array.from({ length: 80 }, (_, x) => data[4 * x]);
          }
          return rows;
        }"""
        rows = page.evaluate(script)
    for name, row in rows.items():
        assert row[:5] == [0x20] * 5 and row[-5:] == [0xF0] * 5, name
        assert row[39] < 0x88 < row[40]  # the edge stays in its place
    between = {name: sum(0x28 < value < 0xE8 for value in row) for name, row in rows.items()}
    assert between["crisp"] <= 2 < 6 <= between["smooth"]
