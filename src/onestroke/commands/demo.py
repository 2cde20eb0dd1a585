"""`onestroke demo`: the embedded teacher becomes a few-step student while you watch."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from onestroke.api import distill
from onestroke.build import pipeline_of
from onestroke.commands.evaluate import (
    INTERVAL_NOTE,
    JUDGE_NOTE,
    SHOWN_PROMPTS,
)
from onestroke.commands.evaluate_output import EvaluationDisplay, machine_facts, print_report
from onestroke.commands.progress import Display
from onestroke.commands.quiet import cap_threads, quiet_libraries
from onestroke.config import Recipe, load_recipe
from onestroke.embedded import GUIDANCE, TEACHER, embedded_judge
from onestroke.embedded.held_out import JUDGE, comic_pictures, comic_prompts, judge_observer, value_namer
from onestroke.evaluate.collect import OnProgress
from onestroke.evaluate.compare import Looking, Task, compare_grid, find, pipelines_to_ways, report_of
from onestroke.evaluate.drawing import contenders
from onestroke.evaluate.findings import Note
from onestroke.evaluate.grids import grid_image
from onestroke.evaluate.latency import PartTimer, measure_latency
from onestroke.evaluate.measures import Networks
from onestroke.evaluate.observer import looks
from onestroke.evaluate.plots import Chart, Series
from onestroke.evaluate.report import Report, write_report
from onestroke.sample import make_fast
from onestroke.train.tracking import read_metrics

DEMO_IMAGES = 1000  # pictures of each set in the demo's figures
SHOWN_TEACHER_STEPS = (1, 4, 25, 50)
REAL = "real pictures"
SHORT_NOTE = Note(
    "A short run",
    "This student is some minutes old, and so are its figures. `onestroke evaluate` measures any student, the shipped "
    "one by default, against the teacher's 50 steps.",
)


def run_demo(out: Path, *, minutes: float, seed: int, console: Console) -> Report:
    """Distil for `minutes`, then measure; leaves the student, logs and report.html in `out`."""
    quiet_libraries()
    cap_threads()
    recipe = load_recipe("mini", [f"seed={seed}", "train.sample_images=0"])
    console.print(
        f"ADD on the embedded comic pictures for {minutes:g} minutes, seed {seed}; stop with Ctrl-C, run again "
        "to continue."
    )
    with Display(console, recipe.train.num_images, "distilling") as observe:
        folder = distill(recipe, out, minutes=minutes, observe=observe)
    console.print("measuring student and teacher")
    started = time.monotonic()
    with EvaluationDisplay(console) as tell:
        report = demo_report(recipe, folder, out, minutes=minutes, on_progress=tell)
    print_report(report, console)
    console.print(f"measured in {time.monotonic() - started:.0f} s")
    console.print(f"\nreport: [bold]{out / 'report.html'}[/bold]\nnext:")
    for line in (
        f'onestroke generate "a laughing person with pink hair and round glasses" --model {folder} --steps 4 --seed 7',
        f"onestroke demo --minutes {max(30, int(3 * minutes))} --out {out}   # goes on from here",
        "onestroke distill --teacher YOUR_MODEL --data YOUR_PICTURES",
    ):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    return report


def demo_report(recipe: Recipe, student_folder: Path, out: Path, *, minutes: float, on_progress: OnProgress) -> Report:
    """Figures on 1,000 pictures, the grid and the latencies of a finished demo run; the teacher is drawn at 1 step."""
    student, teacher = make_fast(pipeline_of(str(student_folder))), make_fast(pipeline_of(TEACHER))
    steps = {"guidance": GUIDANCE, "student_steps": (1, 4)}
    task = Task(
        pipelines_to_ways(student, teacher, teacher_steps=(1,), **steps),
        comic_prompts(DEMO_IMAGES),
        *(comic_pictures(DEMO_IMAGES, odd=odd, label=label) for odd, label in ((True, "reference"), (False, REAL))),
        DEMO_IMAGES,
        out / "cache",
        vae_of=teacher,
        with_floor=False,
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
    shown = pipelines_to_ways(student, teacher, teacher_steps=SHOWN_TEACHER_STEPS, **steps)
    grid = compare_grid(shown, SHOWN_PROMPTS, out / "cache")
    timer = PartTimer()
    latency = measure_latency(contenders(student, teacher, timer, guidance=GUIDANCE), timer, num_runs=3)
    facts = {"pictures seen": f"{images:,}", "seed": str(recipe.seed), "teacher's guidance": f"{GUIDANCE:g}"}
    report = replace(
        report,
        facts=machine_facts() | facts,
        recipe=(out / "recipe.yaml").read_text("utf-8"),
        grids=(grid,),
        latency=latency,
        charts=_charts(rows),
        notes=(SHORT_NOTE, JUDGE_NOTE, INTERVAL_NOTE),
    )
    write_report(report, out / "report.html")
    grid_image(grid).save(out / "grid.png")
    return report


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
