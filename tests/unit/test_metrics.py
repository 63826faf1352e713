"""Prometheus metrics: a real port, and a dashboard that asks for what there is."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import urllib.request
from dataclasses import fields
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.errors import SettingError
from common.launch import CHECKOUT
from inflash import Stats
from services.gateway.metrics import Metrics, MetricsServer
from services.gateway.totals import SECONDS, Histogram, Totals

NONE: dict[str, Any] = dict.fromkeys((f.name for f in fields(Stats)), 0)
REPORT = {
    "services": {name: {"state": "ready", "counters": {"slots": 9, "slots_resident": 4}}
                 for name in ("gateway", "compute", "predictor", "reader")},
    "queue": {"running": 1, "waiting": 2, "room_tokens": 2048, "room_taken_tokens": 128},
    "counters": {"finished": 3, "failed": 1},
    "plan": {"memory_bytes": 100, "cache_bytes": 40, "context": 9},
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def totals() -> Totals:
    found = Totals()
    found.add(Stats(**NONE | {"new_tokens": 5, "decode_s": 4.0, "decode_compute_s": 1.0,
                              "decode_stall_s": 2.0, "decode_flash_stall_s": 1.5,
                              "decode_queue_stall_s": 0.5, "hits": 30, "misses": 10,
                              "time_to_first_token_s": 0.3}))  # fmt: skip
    for _ in range(4):
        found.token.add(0.04)
    return found


def scrape(port: int) -> dict[tuple[str, tuple[str, ...]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_has_the_figures_and_the_dashboard_asks_for_no_others() -> None:
    port = free_port()
    with contextlib.closing(MetricsServer(f"127.0.0.1:{port}", Metrics(lambda: REPORT, totals()))):
        found = scrape(port)
    assert found["inflash_decode_seconds_total", ("flash",)] == 1.5
    assert found["inflash_decode_seconds_total", ("python",)] == 1.0
    assert found["inflash_neurons_total", ("miss",)] == 10
    assert found["inflash_requests_total", ("finished",)] == 3
    assert found["inflash_requests_now", ("waiting",)] == 2
    assert found["inflash_up", ("reader",)] == 1
    assert found["inflash_token_seconds_count", ()] == 4
    assert found["inflash_token_seconds_bucket", ("0.02",)] == 0
    assert found["inflash_token_seconds_bucket", ("0.05",)] == 4
    names = {name for name, _ in found}
    dashboard = json.loads((CHECKOUT / "docs" / "grafana.json").read_text(encoding="utf-8"))
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"inflash_\w+", target["expr"])
    }
    assert len(asked) >= 12
    assert asked <= names


def test_a_port_in_use_is_told() -> None:
    port = free_port()
    metrics = Metrics(lambda: REPORT, Totals())
    said = rf"INFLASH_METRICS: 127\.0\.0\.1:{port} cannot be listened on"
    with (
        contextlib.closing(MetricsServer(f"127.0.0.1:{port}", metrics)),
        pytest.raises(SettingError, match=said),
    ):
        MetricsServer(f"127.0.0.1:{port}", metrics)


def test_a_bound_is_in_its_bucket() -> None:
    histogram = Histogram()
    for seconds in (0.0005, 0.001, 0.0011, 100.0):
        histogram.add(seconds)
    assert histogram.counts[:2] == [2, 1]
    assert histogram.counts[len(SECONDS)] == 1
    assert histogram.count == 4


def test_totals_are_an_answers_figures() -> None:
    report = totals().report()
    assert (report["tokens_per_s"], report["hit_rate"]) == (1.0, 0.75)
    assert sum(s for cause, s in report["decode_s"].items() if cause != "all") == 4.0
    assert Totals().report()["tokens_per_s"] == 0.0
