"""The words of the embedded comic pictures and what each of them draws."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import combinations

import yaml

HELD_OUT_SHARE = 0.1
STYLE_NAMES = ("adventurer", "lorelei", "notionists", "open-peeps")


@dataclass(frozen=True)
class Value:
    """One word of one attribute: DiceBear options it draws, and the phrases that name it."""

    name: str
    draw: Mapping[str, tuple[str, ...]]  # DiceBear option -> the choices that look like the word
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class Attribute:
    name: str
    role: str  # adjective | hair | hair color | with | wearing | doing | background
    values: tuple[Value, ...]
    absent: float = 0.0  # probability that nothing is drawn
    components: tuple[str, ...] = ()  # DiceBear components switched off when absent

    def __getitem__(self, value_name: str) -> Value:
        return next(value for value in self.values if value.name == value_name)


Fact = tuple[str, str]  # (attribute, value)


@dataclass(frozen=True)
class Style:
    """One artist's drawing style: its attributes, and what may be drawn or named together."""

    name: str
    phrases: tuple[str, ...]
    credit: Mapping[str, str]
    scale: tuple[float, float]
    shift_x: tuple[float, float]  # % of the picture
    shift_y: tuple[float, float]  # % of the picture, positive is down
    bust: bool  # the drawing's lower edge has to stay outside the picture
    fixed: Mapping[str, object]
    free: Mapping[str, tuple[str, ...]]
    attributes: tuple[Attribute, ...]
    uncolored: frozenset[str]  # hair variants that take no hair colour
    hides: Mapping[Fact, tuple[str, ...]]
    excludes: Mapping[Fact, tuple[str, ...]]
    held_out: frozenset[frozenset[Fact]]

    def __getitem__(self, attribute_name: str) -> Attribute:
        return next(a for a in self.attributes if a.name == attribute_name)

    def allows(self, fact: Fact, others: Mapping[str, str]) -> bool:
        """Whether `fact` beside `others` makes no held-out pair."""
        return not any(frozenset((fact, other)) in self.held_out for other in others.items())


def _component_attribute(name: str, spec: Mapping) -> Attribute:
    values = tuple(
        Value(
            value,
            {f"{component}Variant": tuple(variants) for component, variants in entry["draw"].items()},
            tuple(entry["phrases"]),
        )
        for value, entry in spec["values"].items()
    )
    components = tuple({component for entry in spec["values"].values() for component in entry["draw"]})
    return Attribute(name, spec["role"], values, spec.get("absent", 0.0), tuple(sorted(components)))


def _color_attribute(name: str, option: str, palette: Mapping) -> Attribute:
    values = tuple(
        Value(color, {option: (code,)}, (palette.get("phrase", "{}").format(color),))
        for color, code in palette["values"].items()
    )
    return Attribute(name, palette["role"], values)


def _facts(spec: Mapping) -> dict[Fact, tuple[str, ...]]:
    return {(a, v): tuple(names) for a, values in spec.items() for v, names in values.items()}


def _held_out_pairs(style: str, attributes: tuple[Attribute, ...], impossible: Mapping[Fact, tuple[str, ...]]):
    """A tenth of the style's value pairs, picked by hash: the same on every machine and in every version."""
    facts = [(attribute.name, value.name) for attribute in attributes for value in attribute.values]
    pairs = [
        (one, two)
        for one, two in combinations(facts, 2)
        if one[0] != two[0] and two[0] not in impossible.get(one, ()) and one[0] not in impossible.get(two, ())
    ]
    pairs.sort(key=lambda pair: hashlib.sha256(repr((style, pair)).encode()).digest())
    return frozenset(frozenset(pair) for pair in pairs[: round(HELD_OUT_SHARE * len(pairs))])


@cache
def load_style(name: str) -> Style:
    """The style `name`, one of `STYLE_NAMES`, read from its YAML page."""
    here = files(__package__)
    spec = yaml.safe_load(here.joinpath(f"styles/{name}.yaml").read_text("utf-8"))
    palettes = yaml.safe_load(here.joinpath("palettes.yaml").read_text("utf-8"))
    attributes = tuple(_component_attribute(n, a) for n, a in spec["attributes"].items()) + tuple(
        _color_attribute(n, option, palettes[n]) for n, option in spec["colors"].items()
    )
    uncolored = frozenset(v for variants in spec.get("uncolored", {}).values() for v in variants)
    hides, excludes = _facts(spec.get("hides", {})), _facts(spec.get("excludes", {}))
    never_named = dict(hides)
    for fact, names in excludes.items():
        never_named[fact] = never_named.get(fact, ()) + names
    for value in next(a for a in attributes if a.role == "hair").values:
        if uncolored.issuperset(*value.draw.values()):
            fact = ("hair", value.name)
            never_named[fact] = (*never_named.get(fact, ()), "hair color")
    place = spec["placement"]
    return Style(
        name,
        tuple(spec["phrases"]),
        spec["credit"],
        tuple(place["scale"]),
        tuple(place["x"]),
        tuple(place["y"]),
        place["bust"],
        spec["fixed"],
        {f"{component}Variant": tuple(variants) for component, variants in spec["free"].items()},
        attributes,
        uncolored,
        hides,
        excludes,
        _held_out_pairs(name, attributes, never_named),
    )


@cache
def judged_values() -> dict[str, tuple[str, ...]]:
    """Every attribute's value names over all styles, sorted: what the judge tells apart."""
    values: dict[str, set[str]] = {"style": set(STYLE_NAMES)}
    for style in map(load_style, STYLE_NAMES):
        for attribute in style.attributes:
            values.setdefault(attribute.name, set()).update(value.name for value in attribute.values)
    return {name: tuple(sorted(names)) for name, names in sorted(values.items())}
