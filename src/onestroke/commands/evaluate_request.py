"""What `onestroke evaluate` was asked for, and what a student's recipe adds to it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from onestroke.card import recipe_in
from onestroke.config import Recipe, load_recipe
from onestroke.embedded import GUIDANCE, STUDENT, TEACHER, weights_folder
from onestroke.errors import RecipeError

COMICSET = "comicset"
DEFAULT_GUIDANCE = 5.0


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; None stands for what the student's recipe or the model says."""

    student: str = STUDENT
    teacher: str | None = None
    data: str | None = None
    out: Path = Path("runs/evaluate")
    steps: tuple[int, ...] = (1, 2, 4)
    teacher_steps: int = 50
    prompts: Path | None = None
    num_images: int = 1000
    gate: str = ""
    guidance: float | None = None
    size: int | None = None
    group_by: tuple[str, ...] | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    trained_against: tuple[str, ...] = ()
    with_floor: bool = True
    with_latency: bool = True
    cache: Path | None = None


def card_text(student: str) -> str:
    """A student's model card; "" where it has none."""
    card = _folder(student) / "README.md"
    return card.read_text("utf-8") if card.is_file() else ""


def student_recipe(student: str) -> Recipe | None:
    """The recipe that a student was distilled by: in its model card, or beside the folder."""
    recipe, folder = recipe_in(card_text(student)), _folder(student)
    beside = folder.parent / "recipe.yaml"
    if recipe is None and folder.is_dir() and beside.is_file() and student != STUDENT:
        try:
            recipe = load_recipe(beside)
        except RecipeError:
            return None
    return recipe


def _folder(student: str) -> Path:
    return weights_folder() / "student" if student == STUDENT else Path(student)


def completed(request: Request, recipe: Recipe | None) -> Request:
    """The request with what the recipe knows. Raises RecipeError where teacher or held-out data stay unknown."""
    teacher, data = request.teacher, request.data
    if teacher is None and recipe is not None:
        teacher = TEACHER if recipe.teacher.source == STUDENT else recipe.teacher.source
    if data is None and ((recipe is not None and recipe.data.source == COMICSET) or request.student == STUDENT):
        data = COMICSET
    if teacher is None:
        raise RecipeError("no recipe names the teacher", where=request.student, fix="Give --teacher MODEL.")
    if data is None:
        raise RecipeError(
            "there are no pictures to compare with", where=request.student,
            fix="Give --data FOLDER with captioned pictures that the student was not trained on.",
        )  # fmt: skip
    guidance = request.guidance
    if guidance is None:
        is_embedded = teacher == TEACHER
        guidance = GUIDANCE if is_embedded else sum(recipe.teacher.guidance) / 2 if recipe else DEFAULT_GUIDANCE
    return replace(request, teacher=teacher, data=data, guidance=guidance, cache=request.cache or request.out / "cache")


def command_of(request: Request) -> str:
    """The command line that measures the same again."""
    words = ["onestroke", "evaluate", request.student, "--teacher", str(request.teacher), "--data", str(request.data)]
    words += ["--steps", ",".join(map(str, request.steps)), "--num-images", str(request.num_images)]
    words += ["--teacher-steps", str(request.teacher_steps), "--guidance", f"{request.guidance:g}"]
    words += ["--prompts", str(request.prompts)] if request.prompts else []
    return shlex.join(words)


def parse_steps(text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4), in rising order. Raises RecipeError."""
    try:
        steps = sorted({int(part) for part in text.split(",")})
    except ValueError:
        steps = [0]
    if steps[0] < 1:
        raise RecipeError(f"{text!r} are no numbers of steps", where="--steps", fix="Write for example 1,2,4.")
    return tuple(steps)


def parse_weights(pairs: Sequence[str]) -> dict[str, str]:
    """ "NAME=PATH" each. Raises RecipeError."""
    found = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator or not path:
            raise RecipeError("this has the form NAME=PATH", where=f"--weights {pair}")
        if not Path(path).exists():
            raise RecipeError("there is no such file or folder", where=f"--weights {pair}", fix="Check the path.")
        found[name] = path
    return found
