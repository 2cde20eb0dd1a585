"""The report page: self-contained, escaped, honest about its targets, and whole on disk or not there."""

import base64
import dataclasses
import io
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from onestroke.errors import DataError, ResourceError
from onestroke.evaluate.adherence import AttributeScore
from onestroke.evaluate.findings import (
    Figure,
    Flag,
    GroupTable,
    Highlight,
    Measured,
    Missing,
    Note,
    Outcome,
    Reading,
    Target,
)
from onestroke.evaluate.grids import ACCENT, Column, Gallery, Grid, GridRow, Tile, data_uri, grid_image
from onestroke.evaluate.latency import LatencyRow
from onestroke.evaluate.plots import Chart, Series, interval_strip, line_chart, linear_ticks, log_ticks, short
from onestroke.evaluate.report import (
    Report,
    figure_value,
    read_report,
    report_html,
    report_json,
    seconds,
    write_report,
)

NASTY = "<script>alert('x')</script> & \"a fox\" {{ 7 * 7 }} https://example.org"
COLORS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))


def flat(color: tuple[int, int, int], side: int = 16) -> np.ndarray:
    return np.full((side, side, 3), color, np.uint8)


def small_grid(label: str = "a fox") -> Grid:
    columns = (Column("1 step", "teacher"), Column("50 steps", "teacher"), Column("1 step", "student"))
    return Grid("Side by side", columns, (GridRow(label, tuple(map(flat, COLORS))),), caption=label)


def full_report(text: str = "a fox") -> Report:
    reading = Reading(text, 1.5, 1.2, 1.8, "student", (Target("at most", 2.0, text),))
    return Report(
        title=text,
        summary=text,
        facts={text: text},
        recipe=text,
        highlights=(Highlight(text, text),),
        grids=(small_grid(text), small_grid(text)),
        gate=(Outcome(False, text), Outcome(True, text)),
        flags=(Flag(text, "grid", text, text, 2.0, 1.5, 2.5),),
        figures=(Figure(text, text, (reading,), features=text, count=5000, question=text, is_trained_against=True),),
        groups=(GroupTable(text, text, ((text, text, "times"),), ((text, 30, (reading,)), (text, 20, (None,)))),),
        galleries=(Gallery(text, text, (Tile(text, text, *map(flat, COLORS[:2])),)),),
        failures={text: (text,)},
        missing=(Missing(text, text, text),),
        measures=(Measured("fd", text, 1.5, 1.2, None, 5000, 1, text, "student", text, text),),
        latency=(LatencyRow(text, 50, 4.0, 16, 2.0, 1.9, 2.2, {"text": 0.1, "unet": 1.8, text: 0.1}, 1.0, 5),),
        adherence={text: {text: AttributeScore(10, 8, 0.5, 0.6), "only one": AttributeScore(10, 9, 1.0, None)}},
        charts=(Chart(text, (Series(text, ((0, 1.0), (10, math.nan), (20, 3.0))),), text, text, caption=text),),
        notes=(Note(text, text),),
    )


class Page(HTMLParser):
    """What a browser would load, run or read."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "srcset", "xlink:href", "data", "action")]

    def handle_data(self, data):
        self.text += data


def test_page_loads_nothing_from_outside_and_runs_no_script():
    html = report_html(full_report())
    page = Page(html)
    assert page.addresses and all(address.startswith(("data:image/webp;base64,", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "http:" not in html and "https:" not in html and "url(" not in html and "@import" not in html
    targets = {address[1:] for address in page.addresses if address.startswith("#")}
    assert targets <= set(re.findall(r'id="(\w+)"', html))


def test_everything_a_user_wrote_is_escaped():
    html = report_html(full_report(NASTY))
    page = Page(html)
    assert "<script" not in html
    assert page.text.count(NASTY) >= 15  # read back, it is what was written
    assert set(page.tags) == set(Page(report_html(full_report())).tags)


def test_pictures_on_the_page_are_the_pictures_given():
    page = Page(report_html(full_report()))
    images = [address for address in page.addresses if address.startswith("data:")]
    assert len(images) == 8
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(images[2].split(",")[1]))))
    np.testing.assert_array_equal(decoded, flat(COLORS[2]))
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    restored = np.asarray(Image.open(io.BytesIO(base64.b64decode(data_uri(noise).split(",")[1]))))
    np.testing.assert_array_equal(restored, noise)
    assert Image.open(io.BytesIO(base64.b64decode(data_uri(noise, longest=32).split(",")[1]))).size == (24, 32)


def test_page_says_which_targets_are_met_and_how_surely():
    limit = (Target("at most", 2.0),)
    readings = {
        "✓ met": Reading("a", 1.5, 1.2, 1.8, targets=limit),
        "✓ met, not certain": Reading("b", 1.9, 1.7, 2.1, targets=limit),
        "✗ missed, not certain": Reading("c", 2.1, 1.9, 2.3, targets=limit),
        "✗ missed": Reading("d", 2.5, 2.3, 2.7, targets=limit),
    }
    for verdict, reading in readings.items():
        page = Page(report_html(Report("t", "s", figures=(Figure("f", "m", (reading,)),))))
        said = re.search(r"[✓✗] [\w, ]*", page.text)
        assert said and said[0].strip() == verdict
    text = Page(report_html(Report("t", "s", figures=(Figure("f", "m", tuple(readings.values())),)))).text
    assert "2 of 4" in text
    assert not Target("at least", 0.85).met(math.nan) and not Target("at most", 1.0).met(math.nan)


def test_the_page_says_what_the_gate_says_and_what_is_broken():
    bad = Page(report_html(full_report())).text
    assert "The gate is not passed" in bad and "Broken" in bad and "trained against" in bad and "Not measured" in bad
    good = Page(report_html(Report("t", "s", gate=(Outcome(True, "fine"),), flags=()))).text
    assert "The gate is passed" in good and "Nothing is broken" in good
    assert "broken" not in Page(report_html(Report("t", "s"))).text.lower()


def test_figures_of_one_question_stand_under_it():
    names = {"Nearness": "How near?", "Speed of light": "How fast?", "Likeness": "How near?"}
    figures = tuple(Figure(name, "m", (Reading("a", 1.0),), question=q) for name, q in names.items())
    text = Page(report_html(Report("t", "s", figures=figures))).text
    order = ("How near?", "Nearness", "Likeness", "How fast?", "Speed of light")
    assert sorted(order, key=text.index) == list(order) and text.count("How near?") == 1


def test_an_almost_empty_report_is_a_page_without_empty_sections():
    page = Page(report_html(Report("Title", "Summary")))
    assert "Title" in page.text and "section" not in page.tags and "a" not in page.tags


def test_json_holds_the_numbers_and_reads_back_as_the_report(tmp_path):
    report = dataclasses.replace(full_report(), charts=(Chart("c", (Series("s", ((0, 1.0), (8, 2.5))),)),))
    write_report(report, tmp_path / "runs" / "report.html")
    raw = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert raw["figures"][0]["readings"][0]["value"] == 1.5
    assert raw["latency"][0]["parts"]["unet"] == 1.8
    assert raw["measures"][0]["key"] == "fd" and raw["gate"][0]["passed"] is False
    assert read_report(tmp_path / "runs" / "report.json") == dataclasses.replace(report, grids=(), galleries=())
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["report.html", "report.json"]


def test_json_is_strict_where_numbers_are_not_finite(tmp_path):
    figure = Figure("f", "m", (Reading("a", math.nan, -math.inf, math.inf),))
    text = report_json(Report("t", "s", figures=(figure,)))
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (tmp_path / "report.json").write_text(text)
    reading = read_report(tmp_path / "report.json").figures[0].readings[0]
    assert math.isnan(reading.value) and reading.high == math.inf
    assert "not a number" in Page(report_html(Report("t", "s", figures=(figure,)))).text


def test_reading_what_is_not_a_report_says_so(tmp_path):
    with pytest.raises(DataError, match="no such report"):
        read_report(tmp_path / "none.json")
    (tmp_path / "report.json").write_text('{"title": "t", "summary": 3}')
    with pytest.raises(DataError, match="summary"):
        read_report(tmp_path / "report.json")


def test_a_report_that_cannot_be_written_leaves_the_old_one_whole(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(Report("old", "s"), path)
    before = path.read_bytes()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ResourceError, match=r"No space left on device.*Free some space"):
        write_report(Report("new", "s"), path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"file/report\.json"):
        write_report(Report("new", "s"), tmp_path / "file" / "report.html")


def test_grid_refuses_a_row_with_gaps():
    with pytest.raises(DataError, match="a fox: 2 pictures for 3 columns"):
        Grid("t", small_grid().columns, (GridRow("a fox", (flat(COLORS[0]),) * 2),))


def test_grid_image_shows_each_picture_in_its_place_under_its_prompt():
    grid = small_grid("a fox " * 40)  # too long for a line
    image = np.asarray(grid_image(grid, cell=16))
    for color in COLORS:
        rows, columns = np.nonzero((image == color).all(axis=-1))
        assert len(rows) == 256 and np.ptp(rows) == np.ptp(columns) == 15
    lefts = [np.nonzero((image == color).all(axis=-1))[1].min() for color in COLORS]
    assert lefts[0] < lefts[1] < lefts[2] and lefts[2] - lefts[1] > lefts[1] - lefts[0]  # groups stand apart
    accent = tuple(bytes.fromhex(ACCENT[1:]))
    rows, columns = np.nonzero((image == accent).all(axis=-1))
    assert columns.min() >= lefts[2]  # only the student's heading
    short_one, double = grid_image(small_grid(), cell=16), grid_image(small_grid(), cell=16, scale=2)
    assert image.shape[0] > short_one.height
    assert abs(double.width - 2 * short_one.width) <= 8


def test_line_chart_places_points_by_hand_and_leaves_gaps():
    svg = str(line_chart(Chart("t", (Series("s", ((0, 0.0), (50, 5.0), (60, math.nan), (100, 10.0))),))))
    # x: 0..100 on 56..506; y: 0..10 on 210..12
    assert "d='M56.0 210.0L281.0 111.0M506.0 12.0'" in svg
    assert "nan" not in svg
    assert "No values" in line_chart(Chart("t", (Series("s", ((0, math.nan),)),)))
    assert "No values" in line_chart(Chart("t", (Series("s", ((0, -1.0),)),), log=True))


def test_long_lines_are_thinned_under_a_line_of_means():
    svg = str(line_chart(Chart("t", (Series("s", tuple((i, float(i % 2)) for i in range(60_000))),))))
    raw, means = re.findall(r"class='(?:raw|line) s0' d='([^']*)'", svg)
    assert raw.count("L") < 400 and means.count("L") == 59
    assert len({point.split()[1] for point in re.split("[ML]", means)[1:]}) == 1  # all 0.5


def test_interval_strip_places_value_interval_and_limit_by_hand():
    svg = str(interval_strip(10, 1, 100, ends=(1, 100), log=True, limits=(100,)))
    assert "cx='160.0'" in svg and "x1='8.0' x2='312.0'" in svg and "class='limit' x1='312.0'" in svg


def test_figures_choose_a_scale_with_room_for_all_they_show():
    wide = Figure("f", "m", (Reading("a", 1.0), Reading("b", 100.0)))
    assert wide.is_log and wide.ends[0] < 1 and wide.ends[1] > 100
    limited = Figure("f", "m", (Reading("a", -1.0, targets=(Target("at least", -2.0),)),))
    assert not limited.is_log and limited.ends[0] < -2 and limited.ends[1] > 0


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 16_000, [0, 5000, 10000, 15000, 20000]),
        (-0.3, 0.1, [-0.3, -0.2, -0.1, 0, 0.1]),
        (3, 3, [2.6, 2.8, 3.0, 3.2, 3.4]),
    ],
)
def test_linear_ticks_are_round_and_cover(low, high, ticks):
    assert linear_ticks(low, high, 5) == pytest.approx(ticks)


def test_log_ticks_are_round_and_cover():
    assert log_ticks(0.03, 0.15, 5) == pytest.approx([0.02, 0.05, 0.1, 0.2])
    assert log_ticks(0.5, 3e4, 5) == pytest.approx([0.1, 10, 1e3, 1e5])
    assert log_ticks(1.0, 1.0, 5)[0] <= 1


def test_numbers_are_written_for_readers():
    assert [figure_value(v) for v in (0, 0.01234, 1.005, 12.34, 366.2, 12345.6, -2.5)] == [
        "0",
        "0.0123",
        "1.00",
        "12.3",
        "366",
        "12,346",
        "−2.50",
    ]
    assert figure_value(9.999) == "10.0"
    assert figure_value(0.8754, "percent") == "87.5%"
    assert [figure_value(v, "points") for v in (-0.014, 0.002, -0.0001)] == ["−1.4 points", "+0.2 points", "0.0 points"]
    assert figure_value(1.63, "times") == "1.63×"
    assert figure_value(12345.0, "count") == "12,345"
    assert [seconds(v) for v in (2.0, 0.0123, 0.9999)] == ["2.00 s", "12.3 ms", "1.00 s"]
    assert [short(v) for v in (20_000, 1_500_000, -0.05, 0)] == ["20k", "1.5M", "−0.05", "0"]
