"""Does a character stay itself while the words around it change? 200 edits of panels, read by the judge.

    python benchmarks/sheet_edits.py [--edits 200] [--model embedded] [--ways page,caption,...] [--out figures.json]

Each edit is a panel of the studio: a held-out character's sheet (hair, its colour, glasses, beard, clothes, skin ...),
an expression, a gesture and a background, and a style. The edit changes the expression, the background or both; the
seed is locked. The judge reads the panel before and after. For each way to draw the edited panel:

survive of the sheet's attributes that the panel shows, those that it still shows after the edit (goal 95%)
kept    of all the sheet's attributes, those that the judge reads after the edit as before it, right or wrong
all     of the edits, those after which every attribute of the sheet is read as before
shown   of the sheet's attributes, those that the edited panel shows as the sheet says
edit    of the changed words, those that the edited panel shows

Each is a mean over edits with a 95% bootstrap interval. `survive` says whether an edit loses what the artist saw, and
`shown` what the model got wrong from the start, which an edit may set right. Both can be had by never changing
anything: read them beside `edit`. "real" draws both panels with the artists' own parts: what the judge's errors cost.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.commands.serve import drawer_of
from onestroke.data.comicset.character import Character, draw_character, generator
from onestroke.data.comicset.render import render
from onestroke.data.comicset.vocabulary import load_style
from onestroke.embedded import GUIDANCE, TEACHER, embedded_judge
from onestroke.embedded.held_out import judge_observer, value_namer
from onestroke.evaluate.intervals import Interval, paired_bootstrap
from onestroke.serve.drawer import Drawer
from onestroke.serve.order import Order, Start
from onestroke.serve.pictures import start_of

AROUND = ("expression", "gesture", "background")  # what the words around a character say
EDITED = (("expression",), ("background",), ("expression", "background"))  # in turn
GOAL = 0.95
BATCH = 16
STRENGTHS = {"redraw 0.3": 0.3, "redraw 0.5": 0.5, "redraw 0.7": 0.7}
WAYS = ("real", "page", "caption", "2 steps", "4 steps", *STRENGTHS)


@dataclass(frozen=True)
class Edit:
    """A character in its panel before and after; `changed` are attributes of the words around it."""

    before: Character
    after: Character
    changed: tuple[str, ...]
    seed: int

    @property
    def sheet(self) -> dict[str, str]:
        return {name: value for name, value in self.before.values.items() if name not in (*AROUND, "eyes", "cheeks")}


def edits_of(count: int) -> list[Edit]:
    found = []
    for index in range(count):
        before, rng = draw_character(index, split="held-out"), generator(0, "held-out", index, 2)
        seen = tuple(name for name in EDITED[index % len(EDITED)] if name in before.values)
        changed = seen or ("background",)  # what hides an expression is no reason to tell one
        after = before
        for name in changed:
            after = with_other(after, name, rng)
        found.append(Edit(before, after, changed, int(rng.integers(2**32))))
    return found


def with_other(character: Character, name: str, rng: np.random.Generator) -> Character:
    """The same character with another value of one attribute, in words and in drawing."""
    style = load_style(character.style)

    def spoils(fact: tuple[str, str]) -> bool:
        """Whether it takes something of the character out of the picture."""
        gone = (*style.hides.get(fact, ()), *style.excludes.get(fact, ()))
        return any(attribute in character.values for attribute in gone)

    values = [v for v in style[name].values if v.name != character.values[name] and not spoils((name, v.name))]
    value = values[rng.integers(len(values))]
    drawn = {option: [choices[rng.integers(len(choices))]] for option, choices in value.draw.items()}
    return replace(character, values={**character.values, name: value.name}, options={**character.options, **drawn})


def phrases_of(character: Character) -> dict[str, list[str]]:
    """The first phrase of each value by its role; a hair colour is told with the hair."""
    style, told = load_style(character.style), {}
    for attribute in style.attributes:
        value = character.values.get(attribute.name)
        if value is None or attribute.name in ("eyes", "cheeks") or attribute.role == "hair color":
            continue
        phrase = attribute[value].phrases[0].replace("{color}", character.values.get("hair color", ""))
        told.setdefault(attribute.role, []).append(" ".join(phrase.split()))
    return told


def listed(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def page_words(character: Character) -> str:
    """As the studio's page writes "@Mara, smiling, waving, on a blue background" and a style (studio/sheet.js)."""
    told = phrases_of(character)
    sheet = f"a person with {listed([*told['hair'], *told.get('with', []), *told.get('wearing', [])])}"
    around = [*told.get("adjective", []), *told.get("doing", []), f"on {told['background'][0]}"]
    return ", ".join([sheet, *around, load_style(character.style).phrases[0]])


def caption_words(character: Character) -> str:
    """The same in the order of the captions that the model was trained on."""
    told = phrases_of(character)
    text = f"a {' '.join([*told.get('adjective', []), 'person'])} with {listed([*told['hair'], *told.get('with', [])])}"
    text += f", wearing {listed(told['wearing'])}" if "wearing" in told else ""
    text += f", {listed(told['doing'])}" if "doing" in told else ""
    return f"{text} on {told['background'][0]}, {load_style(character.style).phrases[0]}"


def drawn(
    drawer: Drawer, prompts: Sequence[str], seeds: Sequence[int], steps: int, starts: Sequence[Start] | None = None
) -> list[np.ndarray]:
    size = (drawer.canvas.default,) * 2
    begun = starts or [None] * len(prompts)
    rows = zip(prompts, seeds, begun, strict=True)
    orders = [Order(drawer.name, prompt, seed, steps, size, start) for prompt, seed, start in rows]
    return [picture for i in range(0, len(orders), BATCH) for picture in drawer.draw(orders[i : i + BATCH])]


def panels(drawer: Drawer, edits: Sequence[Edit], way: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Every panel before and after its edit."""
    if way == "real":
        return [render(edit.before) for edit in edits], [render(edit.after) for edit in edits]
    words = caption_words if way == "caption" else page_words
    steps = int(way[0]) if way.endswith("steps") else drawer.steps
    seeds = [edit.seed for edit in edits]
    first = drawn(drawer, [words(edit.before) for edit in edits], seeds, steps)
    prompts = [words(edit.after) for edit in edits]
    if way not in STRENGTHS:
        return first, drawn(drawer, prompts, seeds, steps)
    size = (drawer.canvas.default,) * 2
    starts = [start_of(Image.fromarray(picture), size, strength=STRENGTHS[way]) for picture in first]
    return first, drawn(drawer, prompts, seeds, steps, starts)


def measured(
    edits: Sequence[Edit], before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]]
) -> dict[str, Interval]:
    """What the docstring's words mean; `before` and `after` are the judge's readings."""
    rows = list(zip(edits, before, after, strict=True))
    survive = [
        [two[name] == value for name, value in edit.sheet.items() if one[name] == value] for edit, one, two in rows
    ]
    kept = [[one[name] == two[name] for name in edit.sheet] for edit, one, two in rows]
    shown = [[two[name] == value for name, value in edit.sheet.items()] for edit, _, two in rows]
    changed = [[two[name] == edit.after.values[name] for name in edit.changed] for edit, _, two in rows]
    whole = [[all(row)] for row in kept]
    scores = {"survive": survive, "kept": kept, "all": whole, "shown": shown, "edit": changed}
    return {name: paired_bootstrap(np.array([np.mean(row) for row in found if row])) for name, found in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    ways = [way.strip() for way in options.ways.split(",")]
    if unknown := set(ways) - set(WAYS):
        parser.error(f"there is no way {', '.join(sorted(unknown))}: choose of {', '.join(WAYS)}")
    quiet_libraries()
    use_machine()
    teacher = options.model == TEACHER
    drawer = drawer_of(options.model, steps=25 if teacher else 1, guidance=GUIDANCE if teacher else 0.0)
    edits, judge = edits_of(options.edits), embedded_judge()
    observer, name_values = judge_observer(judge), value_namer(judge)

    def read(pictures: Sequence[np.ndarray]) -> Sequence[Mapping[str, str]]:
        return name_values(observer.observe(np.stack(pictures), []))

    size = np.mean([len(edit.sheet) for edit in edits])
    print(f"{options.model}, {len(edits)} edits, {size:.1f} attributes a sheet; share and 95% interval, in %")
    print(f"  before: {page_words(edits[0].before)}\n  after:  {page_words(edits[0].after)}")
    figures = {}
    for way in ways:
        before, after = panels(drawer, edits, way)
        found = measured(edits, read(before), read(after))
        shares = [f"{name} {100 * i.value:5.1f} ({100 * i.low:.1f} to {100 * i.high:.1f})" for name, i in found.items()]
        met = "goal met" if found["survive"].value >= GOAL else "goal missed"
        print(f"{way:11} {'  '.join(shares)}  {met}", flush=True)
        figures[way] = {name: [i.value, i.low, i.high] for name, i in found.items()}
    if options.out:
        options.out.write_text(json.dumps({"model": options.model, "edits": len(edits), "ways": figures}, indent=1))


if __name__ == "__main__":
    main()
