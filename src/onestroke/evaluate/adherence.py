"""How much of what prompts name is in the pictures, by the word of a judge, corrected for chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onestroke.errors import DataError


@dataclass(frozen=True)
class AttributeScore:
    """How often one named attribute was found. `corrected` is None where one value only was named: nothing to find."""

    named: int
    found: int
    chance: float
    corrected: float | None


@dataclass(frozen=True)
class AdherenceScore:
    """`value`: the mean over attributes of the chance-corrected share found; 0 is guessing, 1 all found.

    `found`: the plain share of all named attributes. `per_prompt`: one number a prompt whose mean is exactly `value`
    (each attribute weighs the same, so rare ones weigh more in the prompts that name them); the difference of two
    models' numbers on the same prompts goes to `paired_bootstrap`.
    """

    value: float
    found: float
    attributes: Mapping[str, AttributeScore]
    per_prompt: tuple[float, ...]


def chance_corrected_adherence(found: float, chance: float) -> float:
    """`(found - chance) / (1 - chance)`: 0 for a guesser, 1 for no error (Cohen's kappa). `chance` in [0, 1)."""
    return (found - chance) / (1 - chance)


def adherence(
    named: Sequence[Mapping[str, str]],
    judged: Sequence[Mapping[str, str]],
    *,
    reference: Sequence[Mapping[str, str]] | None = None,
) -> AdherenceScore:
    """How well pictures show what their prompts name, by a judge's word.

    `named[i]`: attribute -> value of prompt i; `judged[i]`: the judge's value of every attribute in picture i.
    Chance is that of guessing from the frequencies in `reference` (by default `named`): sum_v p_v^2. A collapsed model
    that always draws the commonest value can lie a little above 0. Pass one `reference` where several sets of prompts
    are compared. Raises DataError on unequal counts or an attribute that the judge does not know.
    """
    if len(named) != len(judged):
        raise DataError(
            f"{len(named)} prompts against {len(judged)} judged pictures", fix="Judge one picture a prompt."
        )
    if not any(named):
        raise DataError("no prompt names an attribute, so that there is no adherence to measure")
    hits = [_hits(wanted, seen, i) for i, (wanted, seen) in enumerate(zip(named, judged, strict=True))]
    chances = _chances(reference if reference is not None else named)
    scores = {name: _attribute_score(hits, name, chances.get(name, 0.0)) for name in sorted(set().union(*hits))}
    corrected = {name: score.corrected for name, score in scores.items() if score.corrected is not None}
    if not corrected:
        raise DataError("every named attribute has one value only", fix="Take prompts that name different values.")
    total = sum(score.named for score in scores.values())
    return AdherenceScore(
        value=sum(corrected.values()) / len(corrected),
        found=sum(score.found for score in scores.values()) / total,
        attributes=scores,
        per_prompt=tuple(_prompt_score(hit, scores, len(corrected), len(hits)) for hit in hits),
    )


def _hits(wanted: Mapping[str, str], seen: Mapping[str, str], index: int) -> dict[str, bool]:
    unknown = [name for name in wanted if name not in seen]
    if unknown:
        raise DataError(
            f"the judge says nothing about {unknown[0]!r}",
            where=f"picture {index}",
            fix="Judge with a network that knows every attribute of the prompts.",
        )
    return {name: seen[name] == value for name, value in wanted.items()}


def _chances(reference: Sequence[Mapping[str, str]]) -> dict[str, float]:
    values: dict[str, Counter[str]] = {}
    for prompt in reference:
        for name, value in prompt.items():
            values.setdefault(name, Counter())[value] += 1
    return {name: sum((n / counts.total()) ** 2 for n in counts.values()) for name, counts in values.items()}


def _attribute_score(hits: Sequence[Mapping[str, bool]], name: str, chance: float) -> AttributeScore:
    of_name = [hit[name] for hit in hits if name in hit]
    share = sum(of_name) / len(of_name)
    corrected = chance_corrected_adherence(share, chance) if chance < 1 else None
    return AttributeScore(len(of_name), sum(of_name), chance, corrected)


def _prompt_score(
    hit: Mapping[str, bool], scores: Mapping[str, AttributeScore], num_scored: int, num_prompts: int
) -> float:
    terms = (
        chance_corrected_adherence(float(found), scores[name].chance) / scores[name].named
        for name, found in hit.items()
        if scores[name].corrected is not None
    )
    return num_prompts * sum(terms) / num_scored
