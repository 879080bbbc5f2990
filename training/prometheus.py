"""Serves the latest metrics of a run to Prometheus at `http://HOST:PORT/metrics`."""

import re
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from triplane.training.callback import Callback
from triplane.training.metrics import METRICS

_BASE_UNITS = {
    "s": ("_s", "_seconds", 1),
    "GiB": ("_gib", "_bytes", 2**30),
    "tokens/s": ("_per_s", "_per_second", 1),
    "fraction of published peak": ("mfu", "mfu_ratio", 1),
}
"""By unit in `METRICS`: its part of our name, its part of Prometheus's name, and the factor between the units."""


class Endpoint(Collector, Callback):
    """Serves from a thread; for rank 0.

    All metrics are gauges, even step and tokens: a rollback decreases them, and Prometheus takes a decreasing counter
    for one that restarted from zero. The events of this process are counters.
    """

    def __init__(self, port: int):
        """Raises OSError if `port` is not available on this machine."""
        # Replaced, never modified: scrapes read them in other threads.
        self._values: Mapping[str, float] = {}
        self._events: Mapping[str, int] = {}
        registry = CollectorRegistry()
        registry.register(self)
        self._server, self._thread = start_http_server(port, registry=registry)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        known = {name: value for name, value in values.items() if name in METRICS}
        logged = {"step": step} if "loss" in known else {}  # a save may be told steps later
        self._values = {**self._values, **known, **logged}

    def event(self, step: int, event: str, details: Mapping[str, object]) -> None:
        self._events = {**self._events, event: self._events.get(event, 0) + 1}

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Yields the metrics; the library calls it at each scrape."""
        for name, value in self._values.items():
            if name == "step":
                yield GaugeMetricFamily("triplane_step", "The last logged step.", value)
                continue
            metric = METRICS[name]
            ours, theirs, factor = _BASE_UNITS.get(metric.unit, ("", "", 1))
            exported = re.sub(f"{ours}(?=_|$)", theirs, name) if ours else name
            yield GaugeMetricFamily(f"triplane_{exported}", f"{metric.unit}, {metric.reduction}", value * factor)
        events = CounterMetricFamily("triplane_events", "Lines of history.jsonl since this start.", labels=["event"])
        for event, count in self._events.items():
            events.add_metric([event], count)
        yield events

    def close(self) -> None:
        """Releases the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
