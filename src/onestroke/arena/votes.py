"""Votes, one a line of an append-only JSONL file that survives a crash in the middle of a line."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onestroke.errors import DataError, ResourceError

Answer = Literal["left", "tie", "right"]
Question = Literal["quality", "adherence"]
QUESTIONS: tuple[Question, ...] = ("quality", "adherence")


class Vote(BaseModel):
    """One voter's word on one pair: two questions, each answered by a side or by a tie."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    voter: str
    prompt: str
    seed: int
    left: str  # the model whose picture stood on the left
    right: str
    quality: Answer  # which picture is better
    adherence: Answer  # which picture follows the prompt better
    is_repeat: bool = False  # a pair that this voter saw before, with its sides swapped; never counted in a rating
    seconds: float = Field(0.0, ge=0)  # the voter took
    time: str = ""  # UTC, ISO 8601

    @property
    def models(self) -> frozenset[str]:
        return frozenset((self.left, self.right))

    def preferred(self, question: Question) -> str | None:
        """The model preferred on `question`; None for a tie."""
        answer = getattr(self, question)
        return None if answer == "tie" else getattr(self, answer)


@dataclass(frozen=True)
class Ballot:
    """What a votes file holds: whole votes, and the bytes of a last line that was never finished."""

    votes: tuple[Vote, ...]
    unfinished: bytes = b""


def read_votes(path: Path) -> Ballot:
    """The votes in `path`, in order; the file stays as it is. No file holds no votes.

    Raises DataError for a line that is no vote, unless it is the last one and a crash cut it off.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Ballot(())
    except OSError as error:
        raise DataError(f"the votes cannot be read ({error.strerror})", where=str(path)) from error
    *lines, tail = content.split(b"\n")
    votes = [_vote(line, f"{path}, line {i + 1}") for i, line in enumerate(lines) if line.strip()]
    if not tail.strip():
        return Ballot(tuple(votes))
    try:  # cut off just before its line's end, it is whole
        return Ballot((*votes, _vote(tail, str(path))))
    except DataError:
        return Ballot(tuple(votes), tail)


def _vote(line: bytes, where: str) -> Vote:
    try:
        return Vote.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = f"{place}: {first['msg']}" if place else first["msg"]
        raise DataError(f"this is not a vote ({reason})", where=where, fix="Delete the line.") from error


class VoteLog:
    """A votes file open for one arena at a time; a vote is on the disk when `append` returns.

    A last line that was cut off is moved to `<file>.bak`; `unfinished` tells.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ballot = read_votes(path)
            self._mend(ballot.unfinished)
        except BlockingIOError as error:
            self._file.close()
            raise ResourceError(
                "another arena is writing to this file", where=str(path), fix="Close it, or give another --votes."
            ) from error
        except BaseException:
            self._file.close()
            raise
        self.votes, self.unfinished = list(ballot.votes), ballot.unfinished

    def __enter__(self) -> VoteLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def append(self, vote: Vote) -> None:
        """Write one line; raises ResourceError with the file as it was where the disk does not take it."""
        before = self._file.seek(0, os.SEEK_END)
        try:
            self._write(vote.model_dump_json().encode() + b"\n")
        except OSError as error:
            os.ftruncate(self._file.fileno(), before)
            raise self._unwritable(error) from error
        self.votes.append(vote)

    def _mend(self, unfinished: bytes) -> None:
        """Let the file end with a whole line."""
        size = self._file.seek(0, os.SEEK_END)
        if unfinished:
            with self.path.with_name(self.path.name + ".bak").open("ab") as backup:
                backup.write(unfinished + b"\n")
                backup.flush()
                os.fsync(backup.fileno())
            os.ftruncate(self._file.fileno(), size - len(unfinished))
            os.fsync(self._file.fileno())
        elif size and not self.path.read_bytes().endswith(b"\n"):
            self._write(b"\n")

    def _write(self, line: bytes) -> None:
        descriptor = self._file.fileno()
        while line:  # one call, but for a disk that fills up in the middle of it
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)

    def _unwritable(self, error: OSError) -> ResourceError:
        return ResourceError(
            f"the votes cannot be written ({error.strerror})",
            where=str(self.path),
            fix="Free some space, or give another --votes.",
        )
