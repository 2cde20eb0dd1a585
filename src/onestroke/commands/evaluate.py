"""`onestroke evaluate`: may the student replace its teacher, and where does it fail?"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from rich.console import Console

from onestroke.api import load
from onestroke.build import device_of
from onestroke.card import TRIES, section_of, with_evaluation
from onestroke.commands.evaluate_output import EvaluationDisplay, machine_facts, print_report
from onestroke.commands.evaluate_request import COMICSET, Request, card_text, command_of, completed, student_recipe
from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.config import Recipe
from onestroke.data.address import is_remote
from onestroke.data.folder import FolderSource, open_folder
from onestroke.embedded import STUDENT, TEACHER, embedded_judge
from onestroke.embedded.held_out import JUDGE, comic_pictures, comic_prompts, judge_observer, value_namer
from onestroke.errors import RecipeError
from onestroke.evaluate.compare import (
    Looking,
    Task,
    compare_grid,
    find,
    pipelines_to_ways,
    report_of,
)
from onestroke.evaluate.drawing import contenders, part_timer
from onestroke.evaluate.features import FEATURES, STYLE, load_all, trained_against
from onestroke.evaluate.findings import Measured, Note
from onestroke.evaluate.gate import Condition, judge_gate, parse_gate
from onestroke.evaluate.grids import grid_image
from onestroke.evaluate.latency import LatencyRow, measure_latency
from onestroke.evaluate.observer import looks
from onestroke.evaluate.pictures import RealSet, check_drawable, halves, model_size
from onestroke.evaluate.prompts import PromptSet, read_prompts, shuffled
from onestroke.evaluate.report import Report, write_report
from onestroke.evaluate.scored import Networks
from onestroke.evaluate.scorers import SCORERS
from onestroke.evaluate.section import card_section

GRID_TEACHER_STEPS = (1, 4, 25)  # of the picture grid, beside the teacher's own number
SHOWN_PROMPTS = (
    "a laughing person with pink hair and round glasses",
    "an angry character with a green mohawk on a yellow background, lorelei style",
    "a smiling person with long wavy purple hair, adventurer style, blue background",
    "notionists style, a surprised person with a ponytail, wearing a planet shirt",
    "a grinning figure with an afro and sunglasses, wearing red clothes, open peeps style",
    "a sad person with a brown bob and tan skin in front of a purple background",
)
KINDS = {"clip-vit-large": ("cmmd",)}  # of distances, where they are not the Fréchet and the kernel distance
JUDGE_NOTE = Note(
    "What the judge is",
    "A small network trained on the embedded pictures alone. It names attributes, and its features carry distances. "
    "The discriminator never sees it. Its own mistakes count against every set alike: the row of real pictures "
    "shows them.",
)
INTERVAL_NOTE = Note(
    "How intervals are made",
    "Scores of single pictures are paired by prompt and seed, and prompts are resampled. Set distances are computed "
    "again without each tenth of the prompts (block jackknife): for two sets of one kind such an interval is too wide "
    "rather than too narrow. The Fréchet distance rises as pictures get fewer: compare it at one number only.",
)
SEEN_NOTE = Note(
    "Trained against",
    "The student's discriminator judged by these features, and the student learned to please them. What they say of "
    "the student is too good, and gates nothing.",
)
UNKNOWN_NOTE = Note(
    "Trained against unknown features",
    "No recipe was found with the student, so that it is not known which features its discriminator saw. Name them "
    "with --trained-against if they are among those used here.",
)


@dataclass(frozen=True)
class Models:
    """The two pipelines, and what they were drawn with."""

    student: DiffusionPipeline
    teacher: DiffusionPipeline
    guidance: float
    size: tuple[int, int]


def run_evaluate(request: Request, *, console: Console) -> bool:
    """Measure, write report.html, report.json, grid.png and the card's section; False where the gate fails."""
    gate = parse_gate(request.gate, steps=request.steps)
    recipe = student_recipe(request.student)
    request = completed(request, recipe)
    prompts = None if request.prompts is None else shuffled(read_prompts(request.prompts))
    quiet_libraries()
    use_machine()
    models = load_models(request, recipe)
    task = task_of(request, models, prompts, console=console)
    looking = looking_of(request, recipe, device=models.student.device)
    with EvaluationDisplay(console) as tell:
        findings = find(task, looking, on_progress=tell)
    report = report_of(
        findings, looking, gate=gate, title=f"{request.student} beside {request.teacher}",
        summary=f"A student that draws in {_listed(request.steps)} against its {request.teacher_steps}-step teacher, "
        f"on {len(findings.collected.rows):,} held-out prompts and seeds.",
    )  # fmt: skip
    report = with_speed(report, request, models, gate, looking, console=console)
    report = replace(
        report, facts=facts_of(request, models, len(findings.collected.rows)), notes=notes_of(request, recipe, looking),
        grids=(shown_grid(request, models, task),),
    )  # fmt: skip
    write_all(report, request, looking, console=console)
    return all(outcome.passed for outcome in report.gate)


def load_models(request: Request, recipe: Recipe | None) -> Models:
    """Both pipelines on the best device; drawn at the size that the student was distilled at."""
    device = device_of("auto")
    student, teacher = (load(name).to(device) for name in (request.student, request.teacher or TEACHER))
    for pipeline in (student, teacher):
        pipeline.set_progress_bar_config(disable=True)
    side = request.size or (recipe.data.size if recipe else None)
    size = (side, side) if side else model_size(student)
    check_drawable(size)
    return Models(student, teacher, request.guidance or 0.0, size)


def task_of(request: Request, models: Models, prompts: PromptSet | None, *, console: Console) -> Task:
    """The held-out pictures cut into halves, and the prompts of a file or of one half."""
    if request.data == COMICSET:
        count, side = request.num_images, models.size[0]
        real, reference = (
            comic_pictures(count, odd=odd, label=label, size=side)
            for odd, label in ((False, "real pictures"), (True, "reference pictures"))
        )
        prompts = comic_prompts(count) if prompts is None else prompts
    else:
        source = open_folder(Path(request.data or ""), log=lambda line: console.print(line, markup=False))
        first, second = halves(len(source))
        real = RealSet("real pictures", source, first, models.size, _file_key(source))
        reference = RealSet("reference pictures", source, second, models.size, _file_key(source))
        if prompts is None:
            prompts = PromptSet(tuple(source.caption(index) for index in first))
    ways = pipelines_to_ways(
        models.student, models.teacher, guidance=models.guidance, student_steps=request.steps,
        teacher_steps=tuple(dict.fromkeys((1, request.teacher_steps))), size=models.size,
    )  # fmt: skip
    assert request.cache is not None
    return Task(
        ways, prompts, reference, real, request.num_images, request.cache, vae_of=models.teacher,
        with_floor=request.with_floor, group_by=request.group_by,
    )  # fmt: skip


def _file_key(source: FolderSource) -> Callable[[int], str]:
    """Names a picture by its file's place, size and time, so that an edited one is measured again."""

    folder = source.address.url if is_remote(source.address.url) else str(Path(source.address.url).resolve())

    def key(index: int) -> str:
        entry = source.entry(index)
        return f"{folder}/{entry.file} {entry.offset} {entry.stamp}".rstrip()

    return key


def looking_of(request: Request, recipe: Recipe | None, *, device: torch.device) -> Looking:
    """The judge where pictures are comicset's, every network and scorer that is on this machine, and the looks."""
    unknown = [name for name in (*request.weights, *request.trained_against) if name not in {**FEATURES, **SCORERS}]
    if unknown:
        known = ", ".join([*FEATURES, *SCORERS])
        raise RecipeError(f"no network is called {unknown[0]!r}", where="--weights", fix=f"Networks: {known}.")
    features, lacking = load_all(list(FEATURES), FEATURES, weights=request.weights, device=device)
    scorers, lacking_scorers = load_all(list(SCORERS), SCORERS, weights=request.weights, device=device)
    judge = embedded_judge() if request.data == COMICSET else None
    judges = [judge_observer(judge)] if judge else []
    distances = {observer.name: KINDS.get(observer.name, ("fd", "kd")) for observer in (*judges, *features)}
    networks = Networks(
        distances,
        scorers=tuple(observer.name for observer in scorers),
        trained_against=frozenset({*trained_against(recipe), *request.trained_against}) & {*FEATURES, STYLE},
        judge=JUDGE if judge else "",
        name_values=value_namer(judge) if judge else None,
    )
    titles = {name: kind.title for name, kind in (*FEATURES.items(), *SCORERS.items())} | {
        STYLE: "shallow maps of EfficientNet-lite0"
    }
    return Looking(
        (*judges, *features, *scorers, looks()), (*judges, *features), networks, titles, (*lacking, *lacking_scorers)
    )


def with_speed(
    report: Report, request: Request, models: Models, gate: Sequence[Condition], looking: Looking, *, console: Console
) -> Report:
    """The report with the latency of both models, measured in turn; the gate is judged again with it."""
    if not request.with_latency:
        return report
    console.print("timing")
    timer = part_timer(models.student)
    ways = contenders(
        models.student, models.teacher, timer, guidance=models.guidance, teacher_steps=request.teacher_steps,
        student_steps=request.steps,
    )  # fmt: skip
    rows = measure_latency(ways, timer, num_runs=5, device=models.student.device)
    measures = (*report.measures, *speed_measures(rows))
    outcomes = judge_gate(gate, measures, looking.networks, report.missing) if gate else ()
    return replace(report, latency=rows, measures=measures, gate=outcomes)


def speed_measures(rows: Sequence[LatencyRow]) -> list[Measured]:
    """Latency in milliseconds and its ratio to the teacher's, one picture at a time; ends are the rounds' extremes."""
    found = []
    for row in rows:
        if row.batch_size == 1:
            role = "student" if row.label.startswith("student") else "teacher"
            milliseconds = (1000 * row.total, 1000 * row.fastest, 1000 * row.slowest)
            found.append(Measured("latency", row.label, *milliseconds, row.num_runs, row.steps, "", role))
            if role == "student":
                speedups = (row.speedup, row.least_speedup, row.most_speedup)
                found.append(Measured("speedup", row.label, *speedups, row.num_runs, row.steps, "", role))
    return found


def shown_grid(request: Request, models: Models, task: Task):
    """A few prompts drawn by both models at their numbers of steps."""
    steps = sorted({*(n for n in GRID_TEACHER_STEPS if n < request.teacher_steps), request.teacher_steps})
    ways = pipelines_to_ways(
        models.student, models.teacher, guidance=models.guidance, student_steps=request.steps, teacher_steps=steps,
        size=models.size,
    )  # fmt: skip
    is_embedded = request.data == COMICSET and request.prompts is None
    return compare_grid(ways, SHOWN_PROMPTS if is_embedded else task.prompts.texts[:6], task.cache)


def facts_of(request: Request, models: Models, count: int) -> dict[str, str]:
    """What was compared, where and when."""
    return {
        **machine_facts(),
        "student": request.student,
        "teacher": f"{request.teacher}, {request.teacher_steps} steps, guidance {models.guidance:g}",
        "held-out pictures": f"{request.data}, {count:,} of each half",
        "prompts": str(request.prompts or "the captions of one half"),
        "picture size": f"{models.size[1]} x {models.size[0]} pixels",
        "command": command_of(request),
    }


def notes_of(request: Request, recipe: Recipe | None, looking: Looking) -> tuple[Note, ...]:
    seen = SEEN_NOTE if looking.networks.trained_against else None if recipe else UNKNOWN_NOTE
    judge = JUDGE_NOTE if request.data == COMICSET else None
    told = section_of(card_text(request.student), TRIES)
    tries = Note(TRIES, told) if told else None
    return tuple(note for note in (judge, INTERVAL_NOTE, seen, tries) if note is not None)


def write_all(report: Report, request: Request, looking: Looking, *, console: Console) -> None:
    """The report's files, the card of a student's own folder, and the figures on the terminal."""
    write_report(report, request.out / "report.html")
    grid_image(report.grids[0]).save(request.out / "grid.png")
    section = card_section(report, trained_against=looking.networks.trained_against, command=command_of(request))
    (request.out / "evaluation.md").write_text(section, "utf-8")
    print_report(report, console)
    written = [request.out / "report.html", request.out / "report.json", request.out / "evaluation.md"]
    card = Path(request.student) / "README.md"
    if request.student not in (STUDENT, TEACHER) and card.is_file() and os.access(card, os.W_OK):
        changed = with_evaluation(card.read_text("utf-8"), section)
        if changed is not None:
            temporary = card.with_name(".README.md.partial")
            temporary.write_text(changed, "utf-8")
            os.replace(temporary, card)
            written.append(card)
    console.print("written: " + ", ".join(map(str, written)), markup=False, highlight=False, soft_wrap=True)


def _listed(steps: Sequence[int]) -> str:
    words = [str(n) for n in steps]
    return (" and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]) + " steps"
