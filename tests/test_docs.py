"""The README and the example do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import typer.main

from onestroke.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def commands():
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        below = getattr(command, "commands", None)
        yield from ([[name]] if below is None else [[name, sub] for sub in below])


def test_every_command_is_in_the_readme_and_the_readme_names_no_other():
    known = {" ".join(words) for words in commands()}
    named = set()
    for line in re.findall(r"onestroke ([a-z][a-z -]*)", README):
        words = line.split()
        match = [" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in known]
        named |= set(match[:1])
    assert named == known


def test_every_option_that_the_readme_shows_exists():
    group = typer.main.get_command(app)
    for line in re.findall(r"^\$? ?onestroke (.*)$", README, re.M):
        words = line.split("#")[0].split()
        command = group.commands[words[0]]
        if hasattr(command, "commands"):
            command = command.commands[words[1]]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)} <= options, line


def test_every_file_that_the_readme_links_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_example_runs_from_start_to_end(tmp_path):
    environment = os.environ | {"ONESTROKE_EXAMPLE_OUT": str(tmp_path), "ONESTROKE_EXAMPLE_IMAGES": "32"}
    command = [sys.executable, str(ROOT / "examples/walkthrough.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 steps, distillation loss" in done.stdout
    for name in ("one-step.png", "fifty-steps.png", "mine.png", "student-run/student/model_index.json"):
        assert (tmp_path / name).exists(), name
