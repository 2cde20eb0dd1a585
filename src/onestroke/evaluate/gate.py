"""The gate: conditions on measures, each tested at the interval's worse end, for the exit status of a pipeline."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from onestroke.errors import RecipeError
from onestroke.evaluate.catalog import MEASURES
from onestroke.evaluate.findings import Measured, Missing, Outcome
from onestroke.evaluate.measures import Networks

_CONDITION = re.compile(
    r"(?P<key>[A-Za-z_][\w-]*)(\((?P<network>[^()]+)\))?(@(?P<steps>\d+))?"
    r"\s*(?P<bound><=|>=)\s*(?P<limit>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)"
)
HOW = "Write for example fd_ratio@1<=1.1, adherence_drop@1<=0.02; a network in brackets: fd(dinov2-large)@4<=30"


@dataclass(frozen=True)
class Condition:
    """`key(network)@steps bound limit`; without steps it holds at every number of steps."""

    text: str
    key: str
    network: str | None
    steps: int | None
    is_upper: bool  # at most; else at least
    limit: float


def parse_gate(text: str, *, steps: Collection[int]) -> tuple[Condition, ...]:
    """The conditions, comma-separated. Raises RecipeError for what no run can meet, naming the nearest measure."""
    return tuple(_parse(part.strip(), steps) for part in text.split(",") if part.strip())


def _parse(text: str, steps: Collection[int]) -> Condition:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise RecipeError("this is no condition", where=f"--gate {text!r}", fix=HOW)
    key = match["key"].replace("-", "_")
    if key not in MEASURES:
        near = difflib.get_close_matches(key, MEASURES, n=1, cutoff=0.4)
        fix = f"Did you mean {near[0]!r}?" if near else f"Measures: {', '.join(MEASURES)}."
        raise RecipeError(f"no measure is called {match['key']!r}", where=f"--gate {text!r}", fix=fix)
    at = int(match["steps"]) if match["steps"] else None
    if at is not None and at not in steps:
        drawn = ", ".join(map(str, sorted(steps)))
        raise RecipeError(f"the student is not drawn at {at} steps", where=f"--gate {text!r}", fix=f"Drawn: {drawn}.")
    return Condition(text, key, match["network"], at, match["bound"] == "<=", float(match["limit"]))


def judge_gate(
    conditions: Sequence[Condition], measured: Sequence[Measured], networks: Networks, missing: Sequence[Missing] = ()
) -> tuple[Outcome, ...]:
    """An outcome for each condition and number of steps; and one more, not passed, where a model failed on prompts.

    Features that the discriminator saw gate nothing; a measure that was not taken does not pass.
    """
    students = [m for m in measured if m.role == "student" and not m.column]
    outcomes = [outcome for condition in conditions for outcome in _outcomes(condition, students, networks, missing)]
    for one in measured:
        if one.key == "failed" and one.value and one.role in ("student", "teacher"):
            outcomes.append(Outcome(False, f"{one.label}: failed on {one.value:.0f} of {one.count} pictures"))
    return tuple(outcomes)


def _outcomes(
    condition: Condition, students: Sequence[Measured], networks: Networks, missing: Sequence[Missing]
) -> list[Outcome]:
    found = [m for m in students if m.key == condition.key and condition.steps in (None, m.steps)]
    if condition.network is not None:
        found = [m for m in found if m.network == condition.network]
    elif any(m.network == networks.primary for m in found):
        found = [m for m in found if m.network == networks.primary]
    if not found:
        lacking = "; ".join(f"{one.name}: {one.why}. {one.fix}" for one in missing)
        return [Outcome(False, f"{condition.text}: not measured" + (f" ({lacking})" if lacking else ""))]
    return [_outcome(condition, one, networks) for one in found]


def _outcome(condition: Condition, one: Measured, networks: Networks) -> Outcome:
    name = f"{one.key}({one.network})" if one.network else one.key
    name += f"@{one.steps}" if one.steps is not None else ""
    if one.network in networks.trained_against:
        return Outcome(False, f"{condition.text}: {one.network} was trained against, and gates nothing")
    worse = one.high if condition.is_upper else one.low
    worse = one.value if worse is None else worse
    passed = worse <= condition.limit if condition.is_upper else worse >= condition.limit
    interval = "" if one.low is None else f", 95% interval {one.low:.4g} to {one.high:.4g}"
    sign = {(True, True): "<=", (True, False): ">", (False, True): ">=", (False, False): "<"}[
        condition.is_upper, passed
    ]
    line = f"{name} = {one.value:.4g}{interval} (n = {one.count}): {worse:.4g} {sign} {condition.limit:g}"
    return Outcome(passed, line)
