"""Ray: the connection to a cluster, or one that is started on this machine."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from onestroke.errors import RecipeError, ResourceError

LOCAL = "local"
_QUIETLY = {"log_to_driver": False, "logging_level": "error"}
_STARTS = 3  # a busy machine can be too slow for the half minute that Ray gives itself
_PATIENCE = 10.0  # seconds in which a cluster has to answer
_STORE = 160 * 2**20  # bytes of Ray's own memory on one machine: what passes through it is small


@contextmanager
def connected(address: str, library: str, *, num_cpus: int | None = None, in_background: bool = True) -> Iterator[None]:
    """Connect to the cluster at `address`, or start one on this machine for "local"; disconnect in the end.

    `library`: the part of Ray that is needed, as in "ray.data". `num_cpus`: of a local one; None: all cores.
    `in_background`: a local one gives way to the machine's other work (Ray's own default, niceness 15). Raises
    RecipeError where Ray is not installed and ResourceError where no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not in_background:
        os.environ.setdefault("RAY_worker_niceness", "0")  # read when Ray is first imported
    try:
        import ray

        importlib.import_module(library)
    except ImportError as error:
        name = library.replace(".", " ").title()
        fix = "pip install 'onestroke[ray]', or leave --ray out"
        raise RecipeError(f"{name} is not installed", where="--ray", fix=fix) from error
    _refuse_silent(address)
    for attempt in range(_STARTS):
        try:
            if address == LOCAL:
                ray.init("local", num_cpus=num_cpus, include_dashboard=False, object_store_memory=_STORE, **_QUIETLY)
            else:
                ray.init(address, **_QUIETLY)
            break
        except Exception as error:  # Ray raises its own kinds, and a bare Exception where its processes start slowly
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == _STARTS - 1:
                raise _no_cluster(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_silent(address: str) -> None:
    """ResourceError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
        except OSError as error:
            raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ResourceError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    fix = 'Give the address of a running cluster, such as HOST:6379 or "auto", or "local"'
    return ResourceError(f"no Ray cluster ({reason})", where=f"--ray {address}", fix=fix)
