"""A server that is one of several of the same application, each with models and a queue of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-onestroke-replica"  # of every answer: who gave it


@dataclass(frozen=True)
class Replica:
    """`name`: of this one. `figures`: asks all replicas that answer for their meters, by name."""

    name: str
    figures: Callable[[], Awaitable[Mapping[str, Sequence[Metric]]]]


class Signed:
    """The application, with the replica's name in every answer."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app, self.name = app, name.encode("latin-1")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def signed(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, self.name)]}
            await send(message)

        await self.app(scope, receive, signed)


@dataclass(frozen=True)
class _Collected:
    """What `generate_latest` reads."""

    metrics: Iterable[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.metrics


def joined(figures: Mapping[str, Sequence[Metric]]) -> bytes:
    """The meters of all replicas as Prometheus reads them: one family each, with a label `replica`."""
    families: dict[str, Metric] = {}
    for name, metrics in sorted(figures.items()):
        for metric in metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [s._replace(labels={**s.labels, "replica": name}) for s in metric.samples]
    return generate_latest(_Collected(families.values()))  # pyright: ignore[reportArgumentType]: has `collect`
