"""The rooms of the package, in the order in which data flows: a file imports only from rooms above its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import onestroke

PACKAGE = Path(onestroke.__file__).parent
# design.md's list, but that: the seam between a method and the trainer (train/method.py) is a room of its own above
# distill; the exports and the model card stand above train, whose sample grids are drawn by the pipeline that will be
# exported; evaluate stands above train too, and the embedded models below everything that trains them.
ROOMS = (
    "types", "errors", "tensor_files", "cluster", "ownership", "config", "recipes", "precision", "compiler",
    "operations", "schedule", "randomness", "families", "lora", "data", "train/method", "distill", "divided",
    "upsampling", "lean_decoder", "fast", "sample", "picture_metadata", "single_file_export", "export", "card",
    "evaluate", "arena", "train", "plan", "embedded", "ablation", "serve",
)  # fmt: skip
COMPOSITION = ("__init__", "__main__", "build", "api", "cli", "commands")  # may import from every room


def room_of(module: str) -> str:
    """The room of "a.b.c" below onestroke: a file's own if it has one, else its folder's."""
    parts = module.split(".")
    return next((room for room in ("/".join(parts[:2]), parts[0]) if room in (*ROOMS, *COMPOSITION)), parts[0])


def imports_of(path: Path) -> set[str]:
    """What a file imports from onestroke, "a.b.c" below it, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            # `from onestroke.families import sd` may name a module or a name in one: both lie in the same room
            base = node.module or ""
            found |= {f"{base}.{name.name}" if base == "onestroke" else base for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name.removeprefix("onestroke.") for name in found if name.startswith("onestroke.")}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_file_has_a_room():
    assert {room_of(module) for module in FILES} <= {*ROOMS, *COMPOSITION}


@pytest.mark.parametrize("module", [module for module in FILES if room_of(module) in ROOMS])
def test_a_file_imports_only_from_rooms_above_it(module):
    below = {
        name for name in imports_of(FILES[module])
        if room_of(name) in COMPOSITION or ROOMS.index(room_of(name)) > ROOMS.index(room_of(module))
    }  # fmt: skip
    if module == "distill":
        below -= {"api"}  # the package stands where the function `onestroke.distill` is looked for, and calls it
    assert not below, f"{module} imports {', '.join(sorted(below))}, which lie below it"


def test_the_check_sees_imports_in_functions_and_of_names(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(
        "def f():\n    from onestroke.train.run import x\n    from onestroke import api\n    import onestroke.cli\n"
    )
    assert imports_of(path) == {"train.run", "api", "cli"}
    assert [room_of(m) for m in ("train.method", "train.run", "families.load", "cli")] == [
        "train/method", "train", "families", "cli",
    ]  # fmt: skip


@pytest.mark.parametrize("module", ["distill.add", "train.trainer", "families.sdxl"])
def test_files_stay_at_the_size_where_one_looks_for_a_seam(module):
    assert len(FILES[module].read_text("utf-8").splitlines()) <= 300


def test_what_needs_no_extra_is_imported_without_their_packages():
    """As after `pip install onestroke`: each command says itself what it needs."""
    absent = ("fastapi", "uvicorn", "prometheus_client", "starlette", "isal", "evalica", "peft", "ray", "torchao")
    commands = ("demo", "distill", "doctor", "evaluate", "generate", "plan", "pretrain", "serve")
    script = f"import sys\nfor name in {absent}: sys.modules[name] = None\nimport onestroke.cli\n"
    script += "".join(f"import onestroke.commands.{command}\n" for command in commands)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
