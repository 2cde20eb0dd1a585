"""Which runs an ablation takes: settings in groups, each a recipe with some keys changed, over some seeds."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from onestroke.config import Recipe, load_recipe, recipe_from
from onestroke.errors import RecipeError

JUDGED_SIZE = 128  # pixels a side of what the comic judge knows
FIXED = {  # what no setting may change: the option that changes it for all
    "train.num_images": "--num-images, which is every run's budget",
    "seed": "--seeds",
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _distinct(section: _Section, names: Sequence[str]) -> _Section:
    if len(set(names)) < len(names):
        raise ValueError(f"two are called {max(names, key=names.count)!r}")
    return section


class Setting(_Section):
    """One row of the table."""

    label: str
    set: dict[str, Any] = {}  # recipe keys with their values, over the study's own
    paper: str = ""  # what a paper found for it, shown beside
    seeds: tuple[int, ...] | None = Field(None, min_length=1)  # None: the group's


class Group(_Section):
    """Rows that are compared with each other."""

    title: str
    settings: tuple[Setting, ...] = Field(min_length=1)
    seeds: tuple[int, ...] | None = Field(None, min_length=1)  # None: the study's

    @model_validator(mode="after")
    def _told_apart(self):
        return _distinct(self, [setting.label for setting in self.settings])


class Study(_Section):
    """An ablation: what all runs share, and the groups."""

    title: str = "Ablation"
    summary: str = ""
    recipe: str = "mini"
    set: dict[str, Any] = {}  # recipe keys that all runs share
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    count: int = Field(2000, ge=100)  # pictures that each student is measured on
    groups: tuple[Group, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _told_apart(self):
        return _distinct(self, [group.title for group in self.groups])


@dataclass(frozen=True)
class Run:
    """One training. Equal recipes are one run, in whatever groups they stand."""

    name: str  # of its folder
    recipe: Recipe


@dataclass(frozen=True)
class Entry:
    """A row before it is measured: its runs, one a seed."""

    group: str
    setting: Setting
    runs: tuple[Run, ...]


def load_study(path: Path) -> Study:
    """A study file (YAML). Raises RecipeError, for an unknown key with the nearest known one."""
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"the study cannot be read ({' '.join(str(error).split())})", where=str(path)) from error
    return study_from(tree, where=str(path))


def study_from(tree: Any, *, where: str = "study") -> Study:
    """A study from nested mappings."""
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place, fix = ".".join(map(str, first["loc"])), ""
        if first["type"] == "extra_forbidden":
            known = sorted({*Study.model_fields, *Group.model_fields, *Setting.model_fields})
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
            fix = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
        raise RecipeError(f"{place or 'the file'}: {first['msg']}", where=where, fix=fix) from error


def is_study(path: Path) -> bool:
    """Whether a YAML file is a study rather than a recipe: it has groups."""
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(tree, Mapping) and "groups" in tree


def study_over(
    recipe: str, over: Sequence[str], *, shared: Mapping[str, Any], is_grid: bool = False, **facts: Any
) -> Study:
    """The study of `--over key=value,value` lines: a group a line, or one group of all combinations.

    `shared`: recipe keys of all runs. `facts`: seeds and count where they are given.
    """
    axes = dict(parse_over(line) for line in over)
    if len(axes) < len(over):
        raise RecipeError("one key is varied twice", where="--over", fix="Give all its values after one --over.")
    if is_grid:
        rows = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
        groups = [{"title": " x ".join(axes), "settings": [_setting(row) for row in rows]}]
    else:
        groups = [{"title": key, "settings": [_setting({key: v}) for v in values]} for key, values in axes.items()]
    title = f"{recipe}: {', '.join(axes)}"
    return study_from(
        {"title": title, "recipe": recipe, "set": dict(shared), "groups": groups, **facts}, where="--over"
    )


def parse_over(line: str) -> tuple[str, list[Any]]:
    """ "key=a,b" as the key and its values, each YAML; lists of values in brackets."""
    key, separator, text = line.partition("=")
    fix = "Write --over section.key=value,value."
    if not separator or not key.strip():
        raise RecipeError("there is no key with values", where=f"--over {line}", fix=fix)
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError as error:
        raise RecipeError("the values are not YAML", where=f"--over {line}", fix=fix) from error
    if not values:
        raise RecipeError("there is no value", where=f"--over {line}", fix=fix)
    if len({json.dumps(value, sort_keys=True, default=str) for value in values}) < len(values):
        raise RecipeError("a value stands twice", where=f"--over {line}", fix="Give each once; --seeds repeats runs.")
    return key.strip(), values


def entries_of(study: Study) -> tuple[Entry, ...]:
    """Every row with its runs. Raises RecipeError for a key that does not exist, naming the nearest."""
    base = recipe_from(load_recipe(study.recipe).model_dump(), _lines(study.set), where="what all runs share")
    _check_judged(base, "what all runs share")
    return tuple(
        Entry(
            group.title,
            setting,
            tuple(_run(base, setting, group.title, seed) for seed in _seeds(study, group, setting)),
        )
        for group in study.groups
        for setting in group.settings
    )


def _seeds(study: Study, group: Group, setting: Setting) -> tuple[int, ...]:
    return tuple(dict.fromkeys(setting.seeds or group.seeds or study.seeds))


def runs_of(entries: Sequence[Entry]) -> list[Run]:
    """Each run once: every row's first seed before any second one, so that a table soon has all its rows."""
    rounds = itertools.zip_longest(*(entry.runs for entry in entries))
    return list({run.name: run for runs in rounds for run in runs if run is not None}.values())


def _setting(values: Mapping[str, Any]) -> dict:
    return {"label": ", ".join(f"{key}={_written(value)}" for key, value in values.items()), "set": dict(values)}


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _run(base: Recipe, setting: Setting, group: str, seed: int) -> Run:
    where = f"{group}: {setting.label}"
    for key, option in FIXED.items():
        if key in setting.set:
            raise RecipeError(f"{key} cannot differ between runs", where=where, fix=f"Use {option}.")
    recipe = recipe_from(base.model_dump(), [*_lines(setting.set), f"seed={seed}"], where=where)
    _check_judged(recipe, where)
    resolved = recipe.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:8]
    changed = "_".join(_changes(base.model_dump(mode="json"), resolved)) or "base"
    slug = re.sub(r"[^A-Za-z0-9.=_-]+", "-", changed)[:60].strip("-_.")
    return Run(f"{slug}-seed{seed}-{digest}", recipe)


def _changes(before: Mapping, after: Mapping) -> Iterator[str]:
    """ "key=value" of every leaf but the seed that differs."""
    for key, value in after.items():
        if isinstance(value, Mapping) and isinstance(before.get(key), Mapping):
            yield from _changes(before[key], value)
        elif value != before.get(key) and key != "seed":
            yield f"{key}={_written(value)}"


def _lines(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]


def _check_judged(recipe: Recipe, where: str) -> None:
    if recipe.data.source != "comicset" or recipe.data.size != JUDGED_SIZE:
        raise RecipeError(
            f"{recipe.data.source} at {recipe.data.size} px cannot be judged",
            where=where,
            fix=f"Ablations are measured by the comic judge: data.source has to be comicset, data.size {JUDGED_SIZE}.",
        )
