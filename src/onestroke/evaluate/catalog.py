"""Every measure by its name: which question it answers, how it reads, what is aimed at, and when a student is broken.

The names are those of `--gate` and of report.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onestroke.evaluate.findings import Form, Target

REAL, FOLLOWS, DIVERSE, HIDDEN, STEADY, SPEED = QUESTIONS = (
    "Like real pictures, like the teacher's?",
    "Follows the prompt?",
    "Still diverse?",
    "Broken in ways averages hide?",
    "One style across prompts?",
    "How fast?",
)


@dataclass(frozen=True)
class Measure:
    """One measure. A student whose whole interval lies below `alarm[0]` or above `alarm[1]` is flagged."""

    question: str
    title: str
    meaning: str  # for a reader who has never met it
    better: str = "lower"  # lower | higher | neither
    form: Form = "number"
    alarm: tuple[float | None, float | None] = (None, None)
    alarm_says: str = ""


_RATIO = "The student's, as a multiple of the teacher's on the same prompts and seeds."

MEASURES: Mapping[str, Measure] = {
    "fd": Measure(
        REAL, "Fréchet distance to real pictures",
        "How far the pictures of a model, as a crowd, are from real held-out ones: their average look and their "
        "variety in one number. Two sets of real pictures are not at 0 either: they are the floor at this number "
        "of pictures.",
    ),
    "fd_ratio": Measure(REAL, "Fréchet distance to real pictures, times the teacher's", _RATIO, form="times"),
    "fd_teacher": Measure(
        REAL, "Fréchet distance to the teacher's pictures",
        "The same against what the teacher draws. The teacher itself with other seeds is the floor.",
    ),
    "kd": Measure(
        REAL, "Kernel distance to real pictures",
        "Another distance of two crowds of pictures. It has no bias: two sets of one kind are at 0 on average.",
    ),
    "kd_teacher": Measure(REAL, "Kernel distance to the teacher's pictures", "The same against the teacher."),
    "cmmd": Measure(REAL, "CMMD to real pictures", "A kernel distance on CLIP's embeddings (arXiv 2401.09603)."),
    "cmmd_teacher": Measure(REAL, "CMMD to the teacher's pictures", "The same against the teacher."),
    "precision": Measure(
        REAL, "Precision", "The share of pictures that lie among the real ones: are they real enough?",
        "higher", "percent",
    ),
    "density": Measure(
        REAL, "Density", "How densely real pictures lie around a model's, 1 being as among themselves.", "higher",
    ),
    "recall": Measure(
        REAL, "Recall", "The share of real pictures that lie among the model's: are all kinds there?",
        "higher", "percent",
    ),
    "coverage": Measure(
        REAL, "Coverage", "The share of real pictures with one of the model's close by.", "higher", "percent",
    ),
    "adherence": Measure(
        FOLLOWS, "Prompt adherence",
        "The share of what prompts name that the judge finds in the picture, averaged over attributes, beyond what "
        "guessing would find.", "higher", "percent",
    ),
    "adherence_drop": Measure(
        FOLLOWS, "Prompt adherence, lost against the teacher", "Teacher minus student, prompt by prompt.",
        form="points",
    ),
    "adherence_kept": Measure(
        FOLLOWS, "Prompt adherence, share of the teacher's", _RATIO, "higher", "percent",
        alarm=(0.5, None), alarm_says="ignores much of the prompt",
    ),
    **{
        f"{key}{suffix}": measure
        for key, title, meaning in (
            ("clip_score", "CLIP score", "The cosine between the picture's and the prompt's embedding."),
            ("pickscore", "PickScore", "How people would choose, as a model of their choices predicts."),
            ("hpsv2", "HPSv2.1", "How people would choose, as another model of their choices predicts."),
        )
        for suffix, measure in (
            ("", Measure(FOLLOWS, title, meaning, "higher")),
            ("_drop", Measure(FOLLOWS, f"{title}, lost against the teacher", "Teacher minus student.")),
            ("_kept", Measure(
                FOLLOWS, f"{title}, heed of the prompt",
                "How much better a picture fits its own prompt than another one, as a share of the teacher's.",
                "higher", "percent", alarm=(0.5, None), alarm_says="ignores much of the prompt",
            )),
        )
    },
    "spread": Measure(
        DIVERSE, "Spread over seeds",
        "How different the pictures of one prompt are, averaged over prompts. A model that draws one picture for a "
        "prompt, whatever the seed, has 0.", "higher",
    ),
    "spread_ratio": Measure(
        DIVERSE, "Spread over seeds, times the teacher's", _RATIO, "higher", "times",
        alarm=(0.6, None), alarm_says="draws much the same picture whatever the seed",
    ),
    **{
        f"{key}{suffix}": measure
        for key, title, meaning, alarm, says in (
            ("saturation", "Saturation", "How strong the colours are: the greatest minus the least of R, G and B.",
             (0.65, 1.5), "colours far from the teacher's"),
            ("contrast", "Contrast", "The standard deviation of the brightness.",
             (0.65, 1.5), "contrast far from the teacher's"),
            ("sharpness", "Sharpness of lines", "How strongly brightness changes from pixel to pixel: low is smeared, "
             "high is noisy.", (0.5, 2.0), "lines far smoother or noisier than the teacher's"),
        )
        for suffix, measure in (
            ("", Measure(HIDDEN, title, meaning, "neither")),
            ("_ratio", Measure(
                HIDDEN, f"{title}, times the teacher's", _RATIO, "neither", "times", alarm=alarm, alarm_says=says,
            )),
        )
    },
    "grid": Measure(
        HIDDEN, "Periodic grid",
        "What a model's pictures repeat at a fixed distance and the teacher's do not, in grey levels of 255. A student "
        "that games its discriminator leaves such a pattern.",
        # lines some five levels deep; heads that a student draws in one place leave about one
        alarm=(None, 2.0), alarm_says="a periodic grid over its pictures",
    ),
    "style_spread": Measure(
        STEADY, "Style spread",
        "How much the style of pictures (line, texture, tone) varies between prompts that ask for one style.",
    ),
    "style_spread_ratio": Measure(STEADY, "Style spread, times the teacher's", _RATIO, form="times"),
    "failed": Measure(HIDDEN, "Prompts that failed", "Pictures that the model could not draw.", form="count"),
    "latency": Measure(SPEED, "Time for one picture", "Milliseconds from prompt to picture, one at a time."),
    "speedup": Measure(
        SPEED, "Speed, times the teacher's", "One picture at a time, the models taking turns.", "higher", "times",
    ),
}  # fmt: skip


def goals(key: str, steps: int | None) -> tuple[Target, ...]:
    """What the project asks of a student against its teacher: required, and aimed at."""
    if key == "fd_ratio" and steps in (1, 4):
        required, aim = {1: (2.0, 1.10), 4: (1.25, 1.00)}[steps]
        return Target("at most", required, "required"), Target("at most", aim, "aim")
    if key == "adherence_drop":
        return (Target("at most", 0.02, "required"),)
    return (Target("at least", 0.85, "required"),) if key == "spread_ratio" else ()
