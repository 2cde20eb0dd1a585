"""The measurement of character sheets under edits: what is edited, how it is told, and what is counted."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from onestroke.data.comicset.character import Character
from onestroke.data.comicset.render import render

PATH = Path(__file__).parent.parent / "benchmarks" / "sheet_edits.py"
spec = importlib.util.spec_from_file_location("sheet_edits", PATH)
sheet_edits = importlib.util.module_from_spec(spec)
sys.modules["sheet_edits"] = sheet_edits  # its dataclasses look themselves up
spec.loader.exec_module(sheet_edits)

MARA = Character(
    "notionists",
    {"hair": "a bun", "expression": "sad", "clothes": "a hoodie", "glasses": "round glasses", "background": "blue",
     "gesture": "waving"},
    {},
)  # fmt: skip


def test_an_edit_changes_words_around_the_character_in_words_and_in_the_picture():
    edits = sheet_edits.edits_of(12)
    for edit in edits:
        after = edit.after.values
        assert {name: after[name] for name in edit.sheet} == edit.sheet and "hair" in edit.sheet
        assert {name for name in after if after[name] != edit.before.values.get(name)} == set(edit.changed)
        assert not set(edit.changed) & set(edit.sheet)
        assert sheet_edits.page_words(edit.before) != sheet_edits.page_words(edit.after)
    for edit in edits[:3]:
        assert not np.array_equal(render(edit.before), render(edit.after))
    assert edits[0] == sheet_edits.edits_of(1)[0] and edits[0].seed != edits[1].seed


def test_the_same_character_is_told_as_the_page_tells_it_and_as_captions_do():
    page, caption = sheet_edits.page_words(MARA), sheet_edits.caption_words(MARA)
    hair, glasses, clothes = "a bun", "round glasses", "a hoodie"
    assert page.startswith(f"a person with {hair}, {glasses} and {clothes}, sad, waving, on a blue background, ")
    assert caption.startswith(
        f"a sad person with {hair} and {glasses}, wearing {clothes}, waving on a blue background, "
    )


def test_what_survives_is_counted_by_attribute_and_by_edit():
    other = {"hair": "a bob", "expression": "sad", "clothes": "a hoodie", "background": "blue", "gesture": "waving"}
    first = sheet_edits.Edit(
        MARA, sheet_edits.with_other(MARA, "expression", np.random.default_rng(0)), ("expression",), 1
    )
    second = sheet_edits.Edit(
        Character("notionists", other, {}), Character("notionists", other, {}), ("background",), 2
    )
    read = [{**MARA.values, "hair": "a turban"}, other]  # the judge misreads one from the start
    after = [
        {**read[0], "glasses": "sunglasses", "expression": first.after.values["expression"]},
        {**other, "background": "red"},
    ]
    nothing = dict.fromkeys(MARA.values, "nothing")  # a panel that shows nothing of its sheet has nothing to lose
    found = sheet_edits.measured([first, second, first], [*read, nothing], [*after, nothing])
    assert found["survive"].value == pytest.approx((1 / 2 + 1) / 2)  # of glasses and clothes, the clothes
    found = sheet_edits.measured([first, second], read, after)
    assert found["kept"].value == pytest.approx((2 / 3 + 1) / 2)  # the glasses of three attributes are lost
    assert found["all"].value == pytest.approx(1 / 2)
    assert found["shown"].value == pytest.approx((1 / 3 + 1) / 2)  # clothes alone are as the sheet says
    assert found["edit"].value == pytest.approx(1 / 2)
