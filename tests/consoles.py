"""What tests of the commands share: a console that is read, and the command line in this process."""

from __future__ import annotations

import io
import sys

from rich.console import Console

from onestroke import cli


def paper(width: int = 200) -> Console:
    return Console(file=io.StringIO(), width=width)


def text_of(console: Console) -> str:
    return console.file.getvalue()


def onestroke(*arguments: str, monkeypatch, capsys) -> tuple[int, str, str]:
    """Exit status, output and errors of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["onestroke", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        status = stop.code or 0
    else:
        status = 0
    output = capsys.readouterr()
    return status, output.out, output.err
