"""`onestroke serve --replicas N`: the same application several times, on one machine or a cluster, by Ray Serve.

Ray's proxy listens and hands each request and each WebSocket to a replica; every replica is `serve.app_of` in a process
of its own. Guard, queue and batches are the replica's, so that a request meets the same rules as without Ray.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from onestroke.cluster import LOCAL, connected
from onestroke.commands.serve import Offer, announce, app_of, check_address, check_installed, listen
from onestroke.errors import RecipeError, ResourceError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

NAME = "onestroke"  # of the application and its deployment
HEALTH_SECONDS = 2.0  # between two looks at a replica
PARTING_SECONDS = 5.0  # that a replica has to answer what it took, before it is ended
FIGURES_SECONDS = 5.0  # that a replica has to tell its meters
START_SECONDS = "60"  # that the proxy has: Ray ends it after 5, and starts another, where the machine is busy
RANGE = re.compile(r"(\d{1,4}):(\d{1,4})")


@dataclass(frozen=True)
class Replicas:
    """How many servers: `low` to `high`, and on which Ray."""

    low: int
    high: int
    ray: str = LOCAL

    @staticmethod
    def of(replicas: int | None, autoscale: str | None, ray: str | None) -> Replicas:
        """From the command's options. Raises `RecipeError`."""
        if autoscale is None:
            return Replicas(replicas or 1, replicas or 1, ray or LOCAL)
        match = RANGE.fullmatch(autoscale)
        if replicas is not None:
            raise RecipeError("there is --replicas too", where="--autoscale", fix="Give one of them.")
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise RecipeError(f"{autoscale!r} is no range", where="--autoscale", fix="Give LOW:HIGH, as in 1:4.")
        return Replicas(int(match[1]), int(match[2]), ray or LOCAL)


def run_replicas(offer: Offer, replicas: Replicas, *, console: Console) -> None:
    """Serve until interrupted."""
    check_installed()
    check_address(offer.address)
    with listen(offer.address) as listener:  # before Ray and the models are started: is the port free?
        port = listener.getsockname()[1]
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", START_SECONDS)  # a local Ray's processes inherit it
    with connected(replicas.ray, "ray.serve", in_background=False):
        from ray import serve

        if serve.status().proxies:
            fix = "End it with `serve shutdown`, or give another cluster."
            raise ResourceError("Ray Serve runs there already, on an address of its own", where="--ray", fix=fix)
        for number in (signal.SIGINT, signal.SIGTERM):  # both end it in order, also where a shell has it ignore Ctrl-C
            signal.signal(number, signal.default_int_handler)
        try:
            start(offer, replicas, port)
            announce(offer, port, console, by=_by(replicas))
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            with suppress(serve.exceptions.RayServeException):  # it may not have come so far
                serve.delete(NAME)  # each replica answers what it took
                if replicas.ray != LOCAL:
                    serve.shutdown()  # its proxies would keep the port; a local Ray ends as a whole


def _by(replicas: Replicas) -> str:
    number = f"{replicas.low}" if replicas.low == replicas.high else f"{replicas.low} to {replicas.high}"
    return f" by {number} {'replica' if replicas.high == 1 else 'replicas'}"


def start(offer: Offer, replicas: Replicas, port: int) -> None:
    """Deploy on the Ray that this process is connected to; returns once the replicas are warm.

    Raises `ResourceError` where they do not start, with the reason that they give.
    """
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    cpus, gpus = (ray.cluster_resources().get(kind, 0.0) for kind in ("CPU", "GPU"))
    many = {"num_replicas": replicas.high}
    if replicas.low < replicas.high:
        # An open WebSocket counts as a request that goes on: a replica is full with as many as it draws together.
        bounds = {"min_replicas": replicas.low, "max_replicas": replicas.high}
        many = {"autoscaling_config": bounds | {"target_ongoing_requests": offer.max_batch, "upscale_delay_s": 5.0}}
    deployment = serve.deployment(
        serve.ingress()(Server),
        name=NAME,
        max_ongoing_requests=2 * offer.max_queue + 1000,  # the batcher's own queue refuses sooner, with Retry-After
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=PARTING_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={
            "num_cpus": min(1.0, cpus / replicas.high) if replicas.ray == LOCAL else 1.0,
            "num_gpus": 0.0 if gpus == 0 else min(1.0, gpus / replicas.high) if replicas.ray == LOCAL else 1.0,
        },
        max_constructor_retry_count=1,
        **many,
    )
    try:
        serve.start(
            proxy_location="HeadOnly" if replicas.ray == LOCAL else "EveryNode",
            http_options={"host": offer.address.host, "port": port},
            logging_config={"log_level": "ERROR", "enable_access_log": False},
        )
        serve.run(deployment.bind(offer), name=NAME, route_prefix="/")
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        raise ResourceError(f"the replicas do not start ({_reason(error)})", where="--replicas") from error


def _reason(error: Exception) -> str:
    """The one line that matters of what Ray says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line.partition(": ")[2] for line in lines if line.startswith("onestroke.errors.")]
    return (ours or lines or [type(error).__name__])[-1][:300]


class Server:
    """A replica: the application, and its meters for the others."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer

    def __serve_build_asgi_app__(self):
        from ray import serve

        from onestroke.serve.replica import Replica

        self.name = serve.get_replica_context().replica_id.unique_id
        self.fastapi = app_of(self.offer, replica=Replica(self.name, figures_of_all))
        return self.fastapi

    async def figures(self) -> tuple[str, list[Metric]]:
        """This replica's name and meters."""
        return self.name, self.fastapi.state.desk.meters.figures()


async def figures_of_all() -> Mapping[str, Sequence[Metric]]:
    """The meters of every replica that answers, by its name; asked within a replica."""
    from ray import serve

    handle = serve.get_deployment_handle(NAME, NAME)
    found = await handle.broadcast("figures").results_async(timeout_s=FIGURES_SECONDS, return_exceptions=True)
    return dict(one for one in found if not isinstance(one, BaseException))
