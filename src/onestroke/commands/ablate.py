"""`onestroke ablate`: runs of equal budget that differ in one thing, in one table."""

from __future__ import annotations

import contextlib
import platform
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import torch
import yaml
from rich.console import Console

from onestroke.ablation.report import AblationReport, write_ablation
from onestroke.ablation.scores import (
    NUM_SHOWN,
    STEPS,
    Scores,
    Yardstick,
    load_scores,
    make_yardstick,
    measure,
    save_scores,
)
from onestroke.ablation.study import (
    Entry,
    Run,
    Study,
    entries_of,
    is_study,
    load_study,
    runs_of,
    study_from,
    study_over,
)
from onestroke.ablation.table import Measured, Row, claims_of, rows_of
from onestroke.api import distill, load
from onestroke.commands.machine import use_machine
from onestroke.commands.progress import Display
from onestroke.commands.quiet import quiet_libraries
from onestroke.embedded import STUDENT, TEACHER, embedded_judge
from onestroke.errors import NonFiniteLoss, RecipeError

SCORES = "scores.npz"  # in a run's folder: it is finished and measured


def study_of(
    recipe: str,
    over: Sequence[str],
    *,
    is_grid: bool,
    seeds: str | None,
    num_images: int | None,
    count: int | None,
    overrides: Sequence[str] = (),
) -> Study:
    """The study in a file, or that of a recipe and its `--over` lines; options change either."""
    shared = _shared(overrides, num_images)
    given = {"seeds": _numbers(seeds)} if seeds is not None else {}
    given |= {"count": count} if count is not None else {}
    path = Path(recipe)
    if path.is_file() and is_study(path):
        if over:
            raise RecipeError("a study has its own settings", where=recipe, fix="Drop --over, or give a recipe.")
        study = load_study(path)
        tree = study.model_dump() | {"set": study.set | shared} | given
        return study_from(_same_seeds(tree) if seeds is not None else tree, where=recipe)
    if not over:
        raise RecipeError(
            "nothing is varied", where="ablate", fix="Give --over section.key=value,value, or a study file."
        )
    return study_over(recipe, over, shared=shared, is_grid=is_grid, **given)


def run_ablate(study: Study, out: Path, *, minutes: float | None, command: str, console: Console) -> bool:
    """Train and measure what is missing, write the table of what there is; returns whether all of it is there.

    Each run has its own folder: finished ones are not run again, an interrupted one goes on from its checkpoint.
    """
    quiet_libraries()
    use_machine()
    entries = entries_of(study)
    runs = runs_of(entries)
    _print(console, f"{study.title}: {len(runs)} runs of {_num_images(runs):,} pictures, measured on {study.count:,}")
    state = _Progress(out, make_yardstick(embedded_judge(), study.count, out / "cache"), console, _deadline(minutes))
    state.read(runs)
    teacher = None
    with contextlib.suppress(KeyboardInterrupt):
        if all(state.advance(run, f"run {number} of {len(runs)}") for number, run in enumerate(runs, start=1)):
            teacher = state.teacher_of(runs[0])
    return _finish(study, entries, state, teacher, command)


def _finish(study: Study, entries: Sequence[Entry], state: _Progress, teacher: Row | None, command: str) -> bool:
    report = report_of(study, entries, state, teacher, command)
    if report.rows:
        write_ablation(report, state.out)
        _print(state.console, f"table: {state.out / 'ablation.html'} (and .md, .json)")
    if report.num_missing:
        _print(state.console, f"{report.num_missing} of {len(runs_of(entries))} runs to go; run again to continue")
    return not report.num_missing


@dataclass
class _Progress:
    """What is known of each run so far."""

    out: Path
    yardstick: Yardstick
    console: Console
    deadline: float | None
    scores: dict[str, Scores] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def read(self, runs: Sequence[Run]) -> None:
        """Take the runs that are finished and measured by this yardstick."""
        for run in runs:
            found = load_scores(self.folder(run) / SCORES, self.yardstick.stamp)
            if found is not None:
                self.scores[run.name] = found

    def advance(self, run: Run, title: str) -> bool:
        """Train a run to its end and measure it, unless that is done; False where it was stopped on the way."""
        if run.name in self.scores:
            return True
        if self.is_late:
            return False
        _print(self.console, f"{title}: {run.name}")
        total, folder = run.recipe.train.num_images, self.folder(run)
        left = None if self.deadline is None else (self.deadline - time.monotonic()) / 60
        try:
            with Display(self.console, total, title) as observe:
                student = distill(run.recipe, folder, minutes=left, observe=observe)
        except NonFiniteLoss as error:  # a finding about this setting; the others go on
            _print(self.console, f"{title} failed: {error}")
            self.failed[run.name] = f"did not finish: {error.what}, {error.where}"
            return True
        if 0 < observe.images <= total - run.recipe.train.batch_size:
            return False
        self._measure(run, student, title)
        return True

    def _measure(self, run: Run, student: Path, title: str) -> None:
        folder = self.folder(run)
        scores = measure(
            load(str(student)),
            self.yardstick,
            folder / "cache",
            on_progress=lambda what, done, total: _print(self.console, f"{title}, {what}: {done}/{total}"),
        )
        save_scores(scores, self.yardstick.stamp, folder / SCORES)
        self.scores[run.name] = scores
        for leftover in ("checkpoints", "cache"):  # hundreds of megabytes that nothing needs any more
            shutil.rmtree(folder / leftover, ignore_errors=True)

    def teacher_of(self, run: Run) -> Row:
        """The teacher at the students' steps: where they all start from."""
        recipe = run.recipe.teacher
        name = TEACHER if recipe.source == STUDENT else recipe.source
        guidance = sum(recipe.guidance) / 2
        pipeline = load(name)
        scores = measure(pipeline, self.yardstick, self.out / "cache", guidance=guidance)
        return self.beside(f"the teacher under guidance {guidance:g}", scores)

    def beside(self, label: str, scores: Scores) -> Row:
        """A row outside the groups."""
        return rows_of([Measured("", label, "", (), (scores,))], self.yardstick.reference)[0]


def report_of(
    study: Study, entries: Sequence[Entry], state: _Progress, teacher: Row | None, command: str
) -> AblationReport:
    """The table of the rows that are measured in full or failed."""
    runs, scores = runs_of(entries), state.scores
    measured = [_measured(entry, scores) for entry in entries if all(run.name in scores for run in entry.runs)]
    rows = {(row.group, row.label): row for row in rows_of(measured, state.yardstick.reference)}
    rows |= {(entry.group, entry.setting.label): row for entry in entries if (row := _failed(entry, state.failed))}
    order = [(entry.group, entry.setting.label) for entry in entries]
    table = tuple(rows[key] for key in order if key in rows)
    several = {tuple(map(id, one.scores)): len(one.seeds) - 1 for one in measured}
    done = {*scores, *state.failed}
    return AblationReport(
        title=study.title,
        summary=study.summary,
        command=command,
        num_images=_num_images(runs),
        count=study.count,
        rows=table,
        claims=claims_of(table),
        yardsticks=(state.beside("real held-out pictures", state.yardstick.real), *([teacher] if teacher else [])),
        freedom=sum(several.values()),
        facts=_facts(),
        study=yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        shown=_shown(measured),
        prompts=state.yardstick.prompts.texts[:NUM_SHOWN],
        num_missing=sum(run.name not in done for run in runs),
    )


def _measured(entry: Entry, scores: Mapping[str, Scores]) -> Measured:
    seeds = tuple(run.recipe.seed for run in entry.runs)
    found = tuple(scores[run.name] for run in entry.runs)
    return Measured(entry.group, entry.setting.label, entry.setting.paper, seeds, found)


def _failed(entry: Entry, failed: Mapping[str, str]) -> Row | None:
    reasons = [failed[run.name] for run in entry.runs if run.name in failed]
    seeds = tuple(run.recipe.seed for run in entry.runs)
    setting = entry.setting
    return Row(entry.group, setting.label, setting.paper, seeds, (), reasons[0]) if reasons else None


def _shown(measured: Sequence[Measured]) -> dict[tuple[str, str], dict[int, np.ndarray]]:
    """The pictures of each row's first seed."""
    return {(one.group, one.label): {n: one.scores[0].shown[n] for n in STEPS} for one in measured}


def _facts() -> dict[str, str]:
    return {
        "date": date.today().isoformat(),
        "machine": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "software": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    }


def command_line(
    recipe: str, over: Sequence[str], options: Mapping[str, object], *, is_grid: bool, overrides: Sequence[str]
) -> str:
    """The command that makes the table again."""
    words = ["onestroke", "ablate", recipe]
    words += [word for line in over for word in ("--over", line)]
    words += ["--grid"] if is_grid else []
    words += [word for line in overrides for word in ("--set", line)]
    words += [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return shlex.join(words)


def _shared(overrides: Sequence[str], num_images: int | None) -> dict:
    shared = {}
    for line in overrides:
        key, separator, value = line.partition("=")
        if not separator:
            raise RecipeError("an override has the form section.key=value", where=f"--set {line}")
        try:
            shared[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError("the value is not YAML", where=f"--set {line}", fix="Quote it.") from error
    return shared | ({"train.num_images": num_images} if num_images is not None else {})


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise RecipeError(f"{text!r} is no list of seeds", where="--seeds", fix="Write --seeds 0,1,2.") from error


def _same_seeds(tree: dict) -> dict:
    """The study with its own seeds in every group and setting."""
    rows = [[setting | {"seeds": None} for setting in group["settings"]] for group in tree["groups"]]
    groups = [group | {"seeds": None, "settings": row} for group, row in zip(tree["groups"], rows, strict=True)]
    return tree | {"groups": groups}


def _num_images(runs: Sequence[Run]) -> int:
    return runs[0].recipe.train.num_images  # no setting may change it


def _deadline(minutes: float | None) -> float | None:
    return None if minutes is None else time.monotonic() + 60 * minutes


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
