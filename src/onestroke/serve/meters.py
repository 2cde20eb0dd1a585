"""What Prometheus reads at /metrics; each application has its own registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from onestroke.serve.batcher import Job

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)


class Meters:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter("onestroke_answers", "Answers given.", ["route", "outcome"], registry=self.registry)
        self.pictures = Counter("onestroke_pictures", "Pictures drawn.", ["model", "mode"], registry=self.registry)
        self.dropped = Counter(
            "onestroke_dropped", "Orders superseded or left before they cost a model call.", registry=self.registry
        )
        self.batch_size = Histogram(
            "onestroke_batch_size", "Pictures drawn together.", buckets=(1, 2, 4, 8, 16, 32), registry=self.registry
        )
        self.draw_seconds = Histogram(
            "onestroke_draw_seconds", "Seconds of a batch.", buckets=SECONDS, registry=self.registry
        )
        self._bytes = Gauge(
            "onestroke_model_bytes", "Weights in memory, under a memory budget.", registry=self.registry
        )
        self._waiting = Gauge("onestroke_waiting", "Orders that wait.", registry=self.registry)
        self.live = Gauge("onestroke_live_connections", "Open WebSockets.", registry=self.registry)

    def watch(self, num_waiting: Callable[[], int], num_bytes: Callable[[], int]) -> None:
        """Ask both whenever the figures are read."""
        self._waiting.set_function(num_waiting)
        self._bytes.set_function(num_bytes)

    def batch_done(self, jobs: Sequence[Job], seconds: float) -> None:
        self.batch_size.observe(len(jobs))
        self.draw_seconds.observe(seconds)
        for job in jobs:
            self.pictures.labels(job.order.model, job.order.mode).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def figures(self) -> list[Metric]:
        """The same as values, to be sent elsewhere."""
        return list(self.registry.collect())
