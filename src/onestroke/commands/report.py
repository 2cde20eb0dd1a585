"""`onestroke report`: a student of the embedded kind against its teacher, on held-out pictures."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from onestroke.api import load
from onestroke.commands.quiet import cap_threads, quiet_libraries
from onestroke.embedded import GUIDANCE, embedded_judge
from onestroke.embedded.comic_report import (
    Plan,
    adherence_of,
    compare_grid,
    figures,
    machine_facts,
    measure,
)
from onestroke.evaluate.drawing import contenders
from onestroke.evaluate.grids import grid_image
from onestroke.evaluate.latency import PartTimer, measure_latency
from onestroke.evaluate.report import Note, Report, write_report

PROMPTS = (
    "a laughing person with pink hair and round glasses",
    "an angry character with a green mohawk on a yellow background, lorelei style",
    "a smiling person with long wavy purple hair, adventurer style, blue background",
    "notionists style, a surprised person with a ponytail, wearing a planet shirt",
    "a grinning figure with an afro and sunglasses, wearing red clothes, open peeps style",
    "a sad person with a brown bob and tan skin in front of a purple background",
)


def run_report(
    student: str,
    teacher: str,
    out: Path,
    *,
    num_images: int,
    guidance: float | None,
    with_latency: bool,
    console: Console,
) -> Report:
    """Measure, write `out/report.html`, `out/report.json` and `out/grid.png`, and print the figures."""
    quiet_libraries()
    cap_threads()
    guidance = GUIDANCE if guidance is None else guidance
    student_pipeline, teacher_pipeline = load(student), load(teacher)
    plan = Plan(num_images, guidance, cache=out / "cache")

    def tell(what: str, done: int, total: int) -> None:
        console.print(f"{what}: {done}/{total}")

    measured = measure(student_pipeline, teacher_pipeline, embedded_judge(), plan, on_progress=tell)
    grid = compare_grid(student_pipeline, teacher_pipeline, PROMPTS, guidance=guidance)
    timer = PartTimer()
    latency = ()
    if with_latency:
        console.print("timing")
        ways = contenders(student_pipeline, teacher_pipeline, timer, guidance=guidance)
        latency = measure_latency(ways, timer, num_runs=5)
    scores = adherence_of(measured)
    report = Report(
        f"{student} beside {teacher}",
        f"A student that draws in 1 to 4 steps against its {max(plan.teacher_steps)}-step teacher, on {num_images} "
        "held-out prompts.",
        facts={
            **machine_facts(),
            "prompts and pictures": f"{num_images} held-out",
            "teacher's guidance": f"{guidance:g}",
        },
        grids=(grid,),
        figures=figures(measured),
        latency=latency,
        adherence={label: score.attributes for label, score in scores.items()},
        notes=(
            Note(
                "What the judge is",
                "A small network trained on the embedded pictures alone. It names attributes, and "
                "its features carry the distances. The discriminator never sees it. Its own mistakes count against "
                "every set alike: the row of real pictures shows them.",
            ),
        ),
    )
    write_report(report, out / "report.html")
    grid_image(grid).save(out / "grid.png")
    print_figures(report, console)
    console.print(f"report: {out / 'report.html'}")
    return report


def print_figures(report: Report, console: Console) -> None:
    """The figures as plain lines."""
    for figure in report.figures:
        console.print(f"[bold]{figure.name}[/bold] (n = {figure.count}, {figure.features})")
        for reading in figure.readings:
            interval = "" if reading.low is None else f"  [{reading.low:.4g}, {reading.high:.4g}]"
            marks = "; ".join(f"{t.name}: {'met' if t.met(reading.value) else 'not met'}" for t in reading.targets)
            console.print(
                f"  {reading.label:<28} {reading.value:.4g}{interval}  {marks}", markup=False, highlight=False
            )
    for row in report.latency:
        parts = ", ".join(f"{name} {1000 * value:.1f}" for name, value in row.parts.items())
        console.print(
            f"  {row.label:<28} batch {row.batch_size}: {1000 * row.total:.1f} ms ({parts}); {row.speedup:.1f}x",
            markup=False,
            highlight=False,
        )
