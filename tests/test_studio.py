"""The artist's path through the studio in Chromium: type, variants, sketch, balloon, undo, save, reopen, export."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image

from tests.browsers import app_of, current, needs_chromium, opened, pixel, scribes, until
from tests.servers import Scribe, running

pytestmark = needs_chromium


def test_the_artists_path(browser, tmp_path):
    student, teacher = scribes()
    with running(app_of(student, teacher)) as address, opened(browser, address) as page:
        draw_a_page(page, student)
        letter_it(page)
        project = save_and_reopen(page, student, tmp_path)
        export(page, project, tmp_path)


def draw_a_page(page, student: Scribe) -> None:
    # type
    current(page)
    assert pixel(page) == [1, 1, 0]  # seed 1, 1 step
    page.locator(".panel").nth(1).click()
    page.fill("#prompt", "")
    page.locator("#prompt").press_sequentially("a person with pi")
    page.locator("#completions li").first.wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.input_value("#prompt") == "a person with pink hair"
    current(page)
    assert pixel(page, 1) == [2, 1, 0] and student.prompts[-1] == ["a person with pink hair"]
    # more steps, by the label as a finger would
    page.click("label[for=steps-4]")
    until(page, "document.querySelector('#steps-4').checked")
    current(page)
    until(page, "!document.querySelector('.panel[data-state=drawing]')")
    assert pixel(page, 1) == [2, 4, 0]
    # variants, one kept by its key
    page.click("#variants")
    until(page, "document.querySelectorAll('#variant-grid canvas').length === 8")
    page.keyboard.press("3")
    seed = int(re.search(r"seed (\d+)", page.locator("#variant-grid button").nth(2).get_attribute("aria-label"))[1])
    assert page.input_value("#seed") == str(seed)
    assert pixel(page, 1) == [seed % 256, 4, 0]
    # undo and redo show the pictures again without drawing them
    drawn = len(student.batches)
    page.click("#undo")
    assert page.input_value("#seed") == "2" and pixel(page, 1) == [2, 4, 0]
    page.click("#redo")
    assert page.input_value("#seed") == str(seed) and len(student.batches) == drawn
    # sketch
    page.click("#sketch")
    box = page.locator("[data-sketch=mask]").bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 120, steps=3)
    page.mouse.up()
    page.click("[data-sketch=keep]")
    current(page)
    assert student.batches[-1][0].start.strength == pytest.approx(0.6)
    assert np.ptp(student.batches[-1][0].start.image[..., 1]) > 10  # the pen's ink arrived on the flat picture


def letter_it(page) -> None:
    """A balloon, its words, its place by keyboard and by hand."""
    page.click("[data-letter=caption]")
    page.click("#balloon-delete")
    assert page.locator(".balloon").count() == 0
    page.click("[data-letter=speech]")
    page.fill("#balloon-text", "<img src=x onerror=alert(1)>")
    balloon = page.locator(".balloon").first
    balloon.focus()
    before = balloon.locator(".tail").get_attribute("cx")
    page.keyboard.press("Alt+ArrowRight")
    assert float(page.locator(".balloon .tail").get_attribute("cx")) == float(before) + 6
    tip = page.locator(".balloon .tail").bounding_box()
    page.mouse.move(tip["x"] + tip["width"] / 2, tip["y"] + tip["height"] / 2)
    page.mouse.down()
    page.mouse.move(tip["x"] + 60, tip["y"] + 50, steps=3)
    page.mouse.up()
    assert float(page.locator(".balloon .tail").get_attribute("cx")) > float(before) + 20


def save_and_reopen(page, student: Scribe, tmp_path) -> dict:
    """The same project and the same pictures, nothing drawn."""
    with page.expect_download() as saving:
        page.keyboard.press("Control+s")
    first = tmp_path / "first.json"
    saving.value.save_as(first)
    page.fill("#prompt", "something else")
    page.select_option("#layout", "nine")
    until(page, "document.querySelectorAll('.panel').length === 9")
    current(page)
    drawn = len(student.batches)
    page.set_input_files("#open-file", str(first))
    until(page, "document.querySelectorAll('.panel').length === 3")
    assert page.input_value("#prompt") == "a person with pink hair"
    with page.expect_download() as saving:
        page.click("#save")
    saving.value.save_as(tmp_path / "second.json")
    assert json.loads(first.read_text()) == json.loads((tmp_path / "second.json").read_text())
    assert len(student.batches) == drawn
    return json.loads(first.read_text())


def export(page, project: dict, tmp_path) -> None:
    page.click("#export")
    assert "effectively" in page.inner_text("#export-panels")
    with page.expect_download() as exporting:
        page.click("#export-go")
    exporting.value.save_as(tmp_path / "page.png")
    image = Image.open(tmp_path / "page.png")
    assert image.width == 1988 and image.info["dpi"][0] == pytest.approx(300, abs=0.1)
    panels = json.loads(image.text["onestroke"])["panels"]
    assert panels[1]["enlarged"]["by"].startswith("Lanczos") and panels[1]["enlarged"]["times"] > 10
    assert panels[1]["enlarged"]["effective_dpi"] == pytest.approx(300 / panels[1]["enlarged"]["times"], abs=1)
    expected = project["pages"][0]["panels"][1]
    assert {name: panels[1][name] for name in ("prompt", "seed", "steps")}.items() <= expected.items()
    assert len(image.convert("RGB").getcolors(2**24)) > 20  # frames, pictures, letters


def test_a_strangers_file_runs_nothing(browser):
    with running(app_of(*scribes())) as address, opened(browser, address) as page:
        current(page)
        page.evaluate("void (window.alert = () => { window.owned = true; })")  # playwright calls a function it gets
        good = {
            "format": "onestroke-project", "version": 1, "title": "<script>alert(1)</script>", "layout": "three",
            "direction": "ltr", "balloons": [], "pictures": {},
            "panels": [{"prompt": "<b onload=alert(1)>", "seed": 5, "steps": 1, "model": "", "fit": "whole"}] * 9,
        }  # fmt: skip
        for bad in (
            {"layout": "__proto__"}, {"panels": []}, {"version": 2}, {"version": 3},
            {"balloons": [{"kind": "speech", "text": 7}]},
            {"pictures": {"k": "javascript:alert(1)"}}, {"pictures": {"k": "data:image/svg+xml;base64,AAAA"}},
        ):  # fmt: skip
            page.set_input_files("#open-file", file_with(good | bad))
            until(page, "/cannot be opened|is of version/.test(document.querySelector('#toast').textContent)")
            page.evaluate("document.querySelector('#toast').textContent = ''")
            assert page.input_value("#seed") == "1"
        page.set_input_files("#open-file", file_with(good))
        until(page, "document.querySelector('#seed').value === '5'")
        assert page.input_value("#title") == good["title"]
        assert page.evaluate("window.owned") is None


def test_the_teacher_is_compared_and_kept_and_a_lost_connection_loses_nothing(browser):
    student, teacher = scribes()
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        address = first.enter_context(running(app_of(student, teacher)))
        page = stack.enter_context(opened(browser, address))
        current(page)
        page.click("#compare")
        page.wait_for_selector("[data-compare=keep]:enabled")
        page.click("[data-compare=keep]")
        current(page)
        assert pixel(page) == [1, 25, 0] and len(teacher.batches) == 1
        first.close()  # the server goes, the artist goes on
        page.wait_for_selector("#connection[data-state=lost]")
        page.fill("#prompt", "typed without a server")
        page.wait_for_selector("#panel-state[data-state=offline]")
        assert pixel(page) == [1, 25, 0]  # the last picture stays, and says that it is not current
        stack.enter_context(running(app_of(student, teacher), int(address.rpartition(":")[2])))
        current(page)
        assert teacher.prompts[-1] == ["typed without a server"]
        until(page, "document.querySelector('#saved').textContent === 'Saved in this browser'")
        page.reload()
        page.wait_for_selector("body[data-ready]")
        assert page.input_value("#prompt") == "typed without a server"


def test_a_lora_is_chosen_where_the_server_has_some_and_undone_saved_and_told(browser, tmp_path):
    student, teacher = scribes()
    student.loras = {"ink": tmp_path / "ink.safetensors", "wash": tmp_path / "wash.safetensors"}
    with running(app_of(student, teacher)) as address, opened(browser, address) as page:
        current(page)
        assert page.locator("#lora option").all_inner_texts() == ["None", "ink", "wash"]
        assert page.is_disabled("#lora-scale")
        page.select_option("#lora", "wash")
        until(page, "document.querySelector('#panel-state').dataset.state === 'current'")
        assert pixel(page) == [1, 1, 100] and student.batches[-1][0].lora == ("wash", 1.0)
        page.fill("#lora-scale", "0.5")
        until(page, "document.querySelector('#panel-state').dataset.state === 'current'")
        assert pixel(page) == [1, 1, 50] and page.inner_text("#lora-told") == "0.50"
        page.click(".panel >> nth=1")
        assert page.input_value("#lora") == ""  # a panel's own
        page.click(".panel >> nth=0")
        # undo and redo, without drawing
        drawn = len(student.batches)
        page.click("#undo")
        assert pixel(page) == [1, 1, 100]
        page.click("#undo")
        assert pixel(page) == [1, 1, 0] and page.input_value("#lora") == ""
        page.click("#redo")
        page.click("#redo")
        assert pixel(page) == [1, 1, 50] and len(student.batches) == drawn
        # the project's file, the exported page and the saved picture say it
        with page.expect_download() as saving:
            page.click("#save")
        project = json.loads(saving.value.path().read_text())
        assert project["pages"][0]["panels"][0]["lora"] == {"name": "wash", "scale": 0.5}
        with page.expect_download() as saving:
            page.click("#save-picture")
        assert Image.open(saving.value.path()).text["lora"] == "wash at 0.5"
        page.click("#export")
        with page.expect_download() as exporting:
            page.click("#export-go")
        told = json.loads(Image.open(exporting.value.path()).text["onestroke"])["panels"][0]
        assert told["lora"] == {"name": "wash", "scale": 0.5}
        # the teacher has none of them: it is compared and kept without
        page.click("#compare")
        page.wait_for_selector("[data-compare=keep]:enabled")
        page.click("[data-compare=keep]")
        current(page)
        assert pixel(page) == [1, 25, 0] and page.is_hidden("#lora-area")
        page.click("#undo")
        assert page.input_value("#lora") == "wash"
        # a file that names another one keeps it, and says that this server has none of that name
        other = project["pages"][0]["panels"][0]["lora"] = {"name": "from-elsewhere", "scale": -1.5}
        page.set_input_files("#open-file", file_with(project))
        page.wait_for_selector("#panel-state[data-state=fault]")
        assert "there is no LoRA 'from-elsewhere'" in page.inner_text("#notices")
        assert page.locator("#lora option:checked").inner_text() == "from-elsewhere (not on this server)"
        with page.expect_download() as saving:
            page.click("#save")
        assert json.loads(saving.value.path().read_text())["pages"][0]["panels"][0]["lora"] == other
        project["pages"][0]["panels"][0]["lora"] = {"name": "ink", "scale": 3}
        page.set_input_files("#open-file", file_with(project))
        until(page, "/LoRA's strength is no number from -2 to 2/.test(document.querySelector('#toast').textContent)")


def test_without_loras_the_page_offers_none(browser):
    with running(app_of(*scribes())) as address, opened(browser, address) as page:
        current(page)
        assert page.is_hidden("#lora-area")


def file_with(project: dict) -> dict:
    return {"name": "project.json", "mimeType": "application/json", "buffer": json.dumps(project).encode()}
