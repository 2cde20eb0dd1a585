"""The work of a curation on Ray Data: on this machine, or on a cluster that sees the same files.

A shard is one row of a dataset and the task that writes its files, so that what Ray repeats after a machine is lost is
one shard, and what is on the disk is never done again.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from onestroke import errors
from onestroke.cluster import connected
from onestroke.errors import OnestrokeError, ResourceError


@dataclass(frozen=True)
class RayEngine:
    """An engine on the Ray that this process is connected to."""

    num_workers: int

    def __call__(self, function: Callable, calls: Sequence[tuple]) -> Iterator[None]:
        import ray.data

        if not calls:
            return
        folders = pickle.dumps([os.getcwd(), *(folder for folder in sys.path if folder)])
        rows = [{"folders": folders, "call": pickle.dumps((function, call))} for call in calls]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(_do, num_cpus=1)
        try:
            for row in done.iter_rows():
                if row["failure"]:
                    raise _as_error(*row["failure"])
                yield
        except ray.exceptions.RayError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
            fix = "Run it again: it goes on where it stopped; give each machine more memory if that ran out"
            raise ResourceError(f"a Ray worker failed ({reason})", where="--ray", fix=fix) from error


@contextmanager
def ray_engine(address: str, *, num_workers: int | None = None) -> Iterator[RayEngine]:
    """An engine on the cluster at `address`, or on one that is started on this machine for "local".

    `num_workers`: tasks at once of a local one; None: one a core. Raises as `cluster.connected` does.
    """
    with connected(address, "ray.data", num_cpus=num_workers):
        import ray
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        yield RayEngine(max(1, int(ray.cluster_resources().get("CPU", 1))))


def _do(row: Mapping[str, bytes]) -> dict[str, list[str] | None]:
    """One call; what the user can mend comes back as words, since Ray wraps what is raised."""
    known = set(sys.path)
    sys.path += [folder for folder in pickle.loads(row["folders"]) if folder not in known]  # of the user's functions
    function, call = pickle.loads(row["call"])
    try:
        function(*call)
    except OnestrokeError as error:
        return {"failure": [type(error).__name__, error.what, error.where, error.fix]}
    return {"failure": None}


def _as_error(kind: str, what: str, where: str, fix: str) -> OnestrokeError:
    return getattr(errors, kind)(what, where=where, fix=fix)
