"""`onestroke demo`: the embedded teacher becomes a few-step student while you watch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import join

from rich.console import Console

from onestroke.api import distill
from onestroke.build import pipeline_of, source_of, teacher_of
from onestroke.commands.evaluate import (
    INTERVAL_NOTE,
    JUDGE_NOTE,
    SHOWN_PROMPTS,
)
from onestroke.commands.evaluate_output import EvaluationDisplay, machine_facts, print_report
from onestroke.commands.machine import use_machine
from onestroke.commands.progress import Display
from onestroke.commands.quiet import quiet_libraries
from onestroke.config import Recipe, load_recipe, recipe_text
from onestroke.embedded import GUIDANCE, TEACHER, embedded_judge
from onestroke.embedded.held_out import JUDGE, comic_pictures, comic_prompts, judge_observer, value_namer
from onestroke.evaluate.collect import OnProgress
from onestroke.evaluate.compare import (
    SPREAD_SEEDS,
    Looking,
    Task,
    Ways,
    compare_grid,
    find,
    pipelines_to_ways,
    report_of,
)
from onestroke.evaluate.drawing import contenders
from onestroke.evaluate.findings import Note
from onestroke.evaluate.grids import grid_image
from onestroke.evaluate.latency import PartTimer, measure_latency
from onestroke.evaluate.measures import NEEDED
from onestroke.evaluate.observer import looks
from onestroke.evaluate.plots import Chart, Series
from onestroke.evaluate.report import Report, write_report
from onestroke.evaluate.scored import Networks
from onestroke.fast import make_fast
from onestroke.train.anchoring import seconds_an_anchor
from onestroke.train.folder import RECIPE
from onestroke.train.tracking import read_metrics

DEMO_IMAGES = 1000  # pictures of each set in the demo's figures, where there is time for them
FEWEST_IMAGES = 100
SPREAD_SHARE = 10  # one prompt in so many is drawn with several seeds too
DRAWING_SECONDS = 70.0  # what all of them may take, so that a slow machine's demo ends in its minutes plus 3
TIMED_IMAGES = 16
SHORTEST_ANCHORED = 2.0  # minutes
FEWEST_ANCHORS, ANCHORS_A_MINUTE = 100, 100  # pictures that the teacher first draws for the student to begin with
DRAWING_SHARE = 1 / 6  # of the minutes, on a slow machine, for these to be drawn; to learn them takes about as long
SHOWINGS = 4
ANCHORED_IMAGES = 40_000  # more than a demo sees: its learning rate stays
SHOWN_TEACHER_STEPS, SHOWN_STUDENT_STEPS = (1, 4, 25, 50), (1, 2, 4)
REAL = "real pictures"
SHORT_NOTE = Note(
    "A short run",
    "This student is some minutes old, and so are its figures. `onestroke evaluate` measures any student, the shipped "
    "one by default, against the teacher's 50 steps.",
)


def run_demo(out: Path, *, minutes: float, seed: int, console: Console) -> Report:
    """Distil for `minutes`, then measure; leaves the student, logs and report.html in `out`."""
    quiet_libraries()
    use_machine()
    started = time.monotonic()
    recipe = demo_recipe(out, minutes=minutes, seed=seed)
    console.print(
        f"ADD on the embedded comic pictures for {minutes:g} minutes, seed {seed}; stop with Ctrl-C, run again "
        "to continue."
    )

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with Display(console, recipe.train.num_images, "distilling") as observe:
        left = minutes - (time.monotonic() - started) / 60
        folder = distill(recipe, out, minutes=left, observe=observe, tell=tell)
    console.print("measuring student and teacher")
    started = time.monotonic()
    with EvaluationDisplay(console) as progress:
        report = demo_report(recipe, folder, out, minutes=minutes, on_progress=progress)
    print_report(report, console)
    console.print(f"measured in {time.monotonic() - started:.0f} s")
    console.print(f"\nreport: [bold]{out / 'report.html'}[/bold]\nnext:")
    for line in next_commands(folder, out, minutes=minutes, seed=seed):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    return report


def next_commands(student_folder: Path, out: Path, *, minutes: float, seed: int) -> Sequence[str]:
    """Three lines for a shell: draw with the student, go on with this run, distil a model of one's own."""
    longer = max(30, int(3 * minutes))
    seeded = ["--seed", str(seed)] if seed else []
    return (
        'onestroke generate "a laughing person with pink hair and round glasses" '
        + join(["--model", str(student_folder), "--steps", "4", "--seed", "7"]),
        join(["onestroke", "demo", "--minutes", str(longer), *seeded, "--out", str(out)]) + "   # goes on from here",
        "onestroke distill --teacher YOUR_MODEL --data YOUR_PICTURES",
    )


def demo_recipe(out: Path, *, minutes: float, seed: int) -> Recipe:
    """`mini`; where there is time for anchors, `mini-long` with as many as take about a third of it at most.

    A run that goes on in `out` keeps what it has begun with.
    """
    settings = [f"seed={seed}", "train.sample_images=0"]
    begun = next((path for path in (out / "anchoring" / RECIPE, out / RECIPE) if path.exists()), None)
    count = num_anchors(minutes, seed=seed) if begun is None else load_recipe(begun).anchors.count
    return load_recipe("mini-long", [*settings, *_anchored(count)]) if count else load_recipe("mini", settings)


def _anchored(count: int) -> list[str]:
    anchored = [f"anchors.count={count}", f"anchors.images={SHOWINGS * count}", f"train.num_images={ANCHORED_IMAGES}"]
    return [*anchored, "anchors.kept=0", "sharpen.images=0"]  # not measured in so short a run


def num_anchors(minutes: float, *, seed: int) -> int:
    """How many anchors this machine has time for in a demo of so many minutes, in tens; 0 where that is too few."""
    if minutes < SHORTEST_ANCHORED:
        return 0
    most = int(ANCHORS_A_MINUTE * minutes)
    recipe = load_recipe("mini-long", [f"seed={seed}", *_anchored(most)])
    seconds = seconds_an_anchor(teacher_of(recipe), source_of(recipe.data, seed=seed), recipe)
    count = min(most, int(60 * minutes * DRAWING_SHARE / seconds) // 10 * 10)
    return count if count >= FEWEST_ANCHORS else 0


def demo_report(recipe: Recipe, student_folder: Path, out: Path, *, minutes: float, on_progress: OnProgress) -> Report:
    """Figures, grid and latencies of a finished demo run; the teacher is drawn at 1 step.

    On 1,000 pictures of each set, or as many as can be drawn in `DRAWING_SECONDS`; latency then of single pictures.
    """
    student, teacher = make_fast(pipeline_of(str(student_folder))), make_fast(pipeline_of(TEACHER))
    ways = pipelines_to_ways(student, teacher, guidance=GUIDANCE, student_steps=(1, 4), teacher_steps=(1,))
    count = images_within(DRAWING_SECONDS, seconds_a_picture(ways))
    task = Task(
        ways,
        comic_prompts(count),
        *(comic_pictures(count, odd=odd, label=label) for odd, label in ((True, "reference"), (False, REAL))),
        count,
        out / "cache",
        vae_of=teacher,
        with_floor=False,
        spread_prompts=max(NEEDED, count // SPREAD_SHARE),
        group_by=(),
    )
    judge = judge_observer(embedded_judge())
    networks = Networks({JUDGE: ("fd",)}, judge=JUDGE, name_values=value_namer(embedded_judge()))
    looking = Looking((judge, looks()), (judge,), networks, {})
    rows = read_metrics(out / "logs")
    images = int(rows[-1]["images"]) if rows else 0
    report = report_of(
        find(task, looking, on_progress=on_progress),
        looking,
        title="A comic model learns to draw in one step",
        summary=f"{minutes:g} minutes of Adversarial Diffusion Distillation ({images:,} pictures) on this machine, "
        "from the teacher's weights on.",
    )
    shown = pipelines_to_ways(
        student, teacher, guidance=GUIDANCE, student_steps=SHOWN_STUDENT_STEPS, teacher_steps=SHOWN_TEACHER_STEPS
    )
    grid = compare_grid(shown, SHOWN_PROMPTS, out / "cache")
    timer = PartTimer()
    batch_sizes = (1, 16) if count == DEMO_IMAGES else (1,)  # 50 steps of 16 pictures take a slow machine a minute
    racing = contenders(student, teacher, timer, guidance=GUIDANCE)
    latency = measure_latency(racing, timer, batch_sizes=batch_sizes, num_runs=3)
    facts = {"pictures seen": f"{images:,}", "seed": str(recipe.seed), "teacher's guidance": f"{GUIDANCE:g}"}
    report = replace(
        report,
        facts=machine_facts() | facts,
        recipe=recipe_text(recipe),
        grids=(grid,),
        latency=latency,
        charts=_charts(rows),
        notes=(SHORT_NOTE, JUDGE_NOTE, INTERVAL_NOTE),
    )
    write_report(report, out / "report.html")
    grid_image(grid).save(out / "grid.png")
    return report


def seconds_a_picture(ways: Ways) -> float:
    """How long one picture by every way takes, drawn in a batch."""
    prompts, seeds = ["a person"] * TIMED_IMAGES, range(TIMED_IMAGES)
    seconds = 0.0
    for way in (*ways.student.values(), *ways.teacher.values()):
        started = time.monotonic()
        way.draw(prompts, seeds)
        seconds += time.monotonic() - started
    return seconds / TIMED_IMAGES


def images_within(budget: float, seconds: float) -> int:
    """How many pictures of `seconds` each, and those of the spread over seeds beside them, fit in `budget`.

    In tens, from `FEWEST_IMAGES` to `DEMO_IMAGES`.
    """
    seconds *= 1 + SPREAD_SEEDS / SPREAD_SHARE
    return max(FEWEST_IMAGES, min(DEMO_IMAGES, int(budget / seconds) // 10 * 10))


def _charts(rows: list[dict[str, float]]) -> tuple[Chart, ...]:
    """Loss curves and logits over the pictures seen."""

    def series(label: str, key: str) -> Series:
        return Series(label, tuple((row["images"], row[key]) for row in rows if key in row))

    def mean(label: str, prefix: str) -> Series:
        keys = [k for k in (rows[0] if rows else {}) if k.startswith(prefix) and k[len(prefix) :].isdigit()]
        return Series(label, tuple((row["images"], sum(row[k] for k in keys) / len(keys)) for row in rows if keys))

    return (
        Chart(
            "Losses",
            (
                series("discriminator (hinge)", "discriminator/hinge"),
                series("student (adversarial)", "student/adversarial"),
            ),
            "loss",
        ),
        Chart(
            "Distillation", (series("squared distance to the teacher", "student/distillation"),), "c(t) x squared error"
        ),
        Chart(
            "The discriminator's opinion",
            (mean("real pictures", "discriminator/real_"), mean("the student's", "discriminator/fake_")),
            "mean logit",
        ),
    )
