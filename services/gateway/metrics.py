"""Prometheus metrics on a port of the gateway: the setting `metrics`. docs/grafana.json shows them.

Counters count requests that have ended; `inflash_token_seconds` counts tokens as they come.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from common.errors import SettingError
from services.gateway.totals import SECONDS, Histogram, Totals

CAUSES = ("compute", "predictor", "queue", "flash", "others", "python")


class Metrics(Collector):
    """A scrape's answer, made from the server's report and its totals when it is asked for."""

    def __init__(self, report: Callable[[], dict[str, Any]], totals: Totals):
        self._report = report
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        report = self._report()
        yield from self._server(report)
        yield from self._work()
        for name, what, histogram in (
            ("queue", "From a request's arrival until compute was given it.", self._totals.queue),
            ("first_token", "From arrival to the first token.", self._totals.first_token),
            ("token", "From a token to the next.", self._totals.token),
        ):
            yield _histogram(f"inflash_{name}_seconds", what, histogram)

    def _server(self, report: dict[str, Any]) -> Iterator[Metric]:
        counters, queue = report["counters"], report["queue"]
        up = GaugeMetricFamily("inflash_up", "1 if the service is ready.", labels=["service"])
        for name, service in report["services"].items():
            up.add_metric([name], float(service["state"] == "ready"))
        yield up
        requests = CounterMetricFamily("inflash_requests", "By outcome.", labels=["outcome"])
        for outcome in ("finished", "cancelled", "refused", "failed"):
            requests.add_metric([outcome], counters.get(outcome, 0))
        yield requests
        under_way = GaugeMetricFamily("inflash_requests_now", "Under way.", labels=["state"])
        for state in ("running", "waiting"):
            under_way.add_metric([state], queue[state])
        yield under_way
        room = GaugeMetricFamily("inflash_kv_tokens", "Room in the KV cache.", labels=["state"])
        for state, name in (("all", "room_tokens"), ("taken", "room_taken_tokens")):
            room.add_metric([state], queue[name])
        yield room
        reader = report["services"]["reader"]["counters"]
        slots = GaugeMetricFamily("inflash_cache_slots", "Of the cache.", labels=["state"])
        for state, name in (("usable", "slots"), ("resident", "slots_resident")):
            slots.add_metric([state], reader.get(name, 0))
        yield slots
        memory = GaugeMetricFamily("inflash_plan_bytes", "Of the memory plan.", labels=["line"])
        for name, size in report["plan"].items():
            if name.endswith("_bytes"):
                memory.add_metric([name.removesuffix("_bytes")], size)
        yield memory

    def _work(self) -> Iterator[Metric]:
        stats = self._totals.stats
        tokens = CounterMetricFamily("inflash_tokens", "Of ended requests.", labels=["kind"])
        tokens.add_metric(["prompt"], stats["prompt_tokens"])
        tokens.add_metric(["new"], stats["new_tokens"])
        yield tokens
        reused = stats["reused_tokens"]
        yield _counter("inflash_reused_tokens", "Of prompts, not computed again.", reused)
        seconds = CounterMetricFamily(
            "inflash_decode_seconds", "Where the time of tokens went.", labels=["cause"]
        )
        for cause, value in self._totals.report()["decode_s"].items():
            if cause in CAUSES:
                seconds.add_metric([cause], value)
        yield seconds
        yield _counter("inflash_read_bytes", "From flash.", stats["bytes_read"])
        yield _counter("inflash_reads", "From flash.", stats["reads"])
        neurons = CounterMetricFamily(
            "inflash_neurons", "That were asked for: in the cache or not.", labels=["found"]
        )
        neurons.add_metric(["hit"], stats["hits"])
        neurons.add_metric(["miss"], stats["misses"])
        yield neurons
        yield _counter("inflash_fired", "Neurons that fired.", stats["decode_fired"])
        late = stats["decode_late_fired"]
        yield _counter("inflash_late", "Of those that fired, not there in time.", late)


def _counter(name: str, what: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, what, value=value)


def _histogram(name: str, what: str, histogram: Histogram) -> HistogramMetricFamily:
    counts = list(itertools.accumulate(histogram.counts))
    bounds = [f"{bound:g}" for bound in SECONDS] + ["+Inf"]
    buckets = list(zip(bounds, counts, strict=True))
    return HistogramMetricFamily(name, what, buckets=buckets, sum_value=histogram.sum)


class MetricsServer:
    """The port. A context manager; `SettingError` if it cannot be had."""

    def __init__(self, address: str, metrics: Metrics):
        host, _, port = address.rpartition(":")
        registry = CollectorRegistry()
        registry.register(metrics)
        try:
            self._server, self._thread = start_http_server(int(port), host, registry)
        except OSError as error:
            raise SettingError(
                f"INFLASH_METRICS: {address} cannot be listened on: {error.strerror or error};"
                " choose another port"
            ) from None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
