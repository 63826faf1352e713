"""Where a token's time goes, seen on real servers; causes that are planted are found."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.launch import CHECKOUT
from common.messages import SERVICES
from common.model.convert import convert
from common.spans import read_spans
from common.store.store import Store
from common.trace.run import load_run
from common.trace.tokens import CAUSES, LEAVES
from common.trace.verdict import CAUSES as VERDICTS
from inflash import Client
from scripts.trace import Follower, pieces
from tests.conftest import serving
from tests.unit.test_metrics import free_port

LONG = {"max_new_tokens": 24, "ignore_eos": True}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                "google-chrome"))), None)  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The shipped model's store, not fitted: `exact` serves it."""
    path = tmp_path_factory.mktemp("demo") / "store"
    convert(CHECKOUT / "models" / "demo", path)
    return Store.open(path)


def trace(run_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "inflash", "trace", str(run_dir), *arguments],
        capture_output=True, text=True, cwd=CHECKOUT, timeout=60, check=False,
    )  # fmt: skip


def found(run_dir: Path, *arguments: str) -> dict[str, Any]:
    result = trace(run_dir, "--json", *arguments)
    assert result.returncode == 0, result.stderr
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


def ask(client: Client, prompt: str = "def read(path):\n", **options: Any) -> Any:
    answer = client.generate(prompt, **LONG | options)
    list(answer)
    return answer.stats


@dataclass(frozen=True)
class Served:
    """What is left of a server that answered four requests; the third was not to be traced."""

    run_dir: Path
    first: Any  # the first answer's Stats
    report: dict[str, Any]
    metrics: str


@pytest.fixture(scope="module")
def served(demo: Store) -> Iterator[Served]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="inflash-test-") as folder:
        run_dir = Path(folder)
        options = {"cache": "25%", "metrics": str(port), "context": "1024"}
        with serving(demo, run_dir, **options) as client:
            first = ask(client)
            ask(client, "import os\n" * 200, max_new_tokens=6)  # its prompt takes some steps
            ask(client, trace=False)
            cancelled = client.generate("class ", **LONG)
            next(cancelled)
            cancelled.cancel()
            list(cancelled)
            report = client.status()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                metrics = answer.read().decode()
        yield Served(run_dir, first, report, metrics)


def test_status_and_metrics_have_the_figures_of_answers(served: Served) -> None:
    report, stats, metrics = served.report, served.first, served.metrics
    whole = report["figures"]
    assert whole["requests"] == 4
    assert whole["new_tokens"] >= 24 + 6 + 24 + 1
    assert whole["decode_s"]["compute"] > stats.decode_compute_s > 0
    parts = [seconds for cause, seconds in whole["decode_s"].items() if cause != "all"]
    assert sum(parts) == pytest.approx(whole["decode_s"]["all"])
    assert 'inflash_requests_total{outcome="finished"} 3.0' in metrics
    assert 'inflash_requests_total{outcome="cancelled"} 1.0' in metrics
    read = re.search(r"^inflash_read_bytes_total (\S+)$", metrics, re.MULTILINE)
    assert read is not None
    assert float(read[1]) == whole["bytes_read"]
    assert report["services"]["compute"]["counters"]["spans_lost"] == 0


def test_spans_are_complete_and_nest(served: Served, demo: Store) -> None:
    run, layers = load_run(served.run_dir), demo.geometry.layers
    assert [(r.ordinal, sum(t.request == r.number for t in run.tokens))
            for r in run.requests][:2] == [(1, 24), (2, 6)]  # fmt: skip
    assert {r.ordinal for r in run.requests} <= {1, 2, 4}, "the third was not to be traced"
    for service in SERVICES:
        for span in run.spans[service]:
            assert span.ns >= 0
            assert span.name == "beat" or span.request in {r.number for r in run.requests}
    for token in run.tokens:
        names = Counter(span.name for span in token.spans)
        steps = names["step"]
        assert names["attention"] == names["layer"] == len(token.layers) == steps * layers
        assert (names["embed"], names["head"], names["sample"], names["send"]) == (
            steps, steps, 1, 1)  # fmt: skip
        assert (steps > 1) == (token.index == 0 and names["layer"] > layers)
        for layer in token.layers:
            chain = run.chains[layer.step, layer.layer]
            assert chain.predict is not None
            assert layer.asked_ns <= chain.predict.start_ns <= layer.end_ns
            demand = [f for f in chain.fetches if not f.field("prefetch")]
            assert len(demand) == 1
            assert chain.predict.start_ns <= demand[0].start_ns <= layer.end_ns
            read = sum(r.field("bytes") for r in chain.reads)
            assert read == layer.counts["bytes_read"]
        leaves = [span for span in token.spans if span.name in LEAVES]
        for one, after in itertools.pairwise(leaves):
            assert one.end_ns == after.start_ns, "leaves lie end to end"
    for request in run.requests:
        own = {s.name: s for s in run.spans["gateway"] if s.request == request.number}
        assert own["request"].start_ns == own["queue"].start_ns
        assert own["request"].end_ns >= own["queue"].end_ns


def test_times_agree_with_the_answer(served: Served) -> None:
    """The spans against what the answer's own marks say of the same time."""
    run, stats = load_run(served.run_dir), served.first
    tokens = [t for t in run.tokens if t.request == run.requests[0].number and t.index > 0]
    assert sum(t.ns for t in tokens) / 1e9 == pytest.approx(stats.decode_s, rel=0.05)
    for cause, seconds in (("flash", stats.decode_flash_stall_s),
                           ("queue", stats.decode_queue_stall_s),
                           ("predictor", stats.decode_predictor_stall_s)):  # fmt: skip
        assert sum(t.by_cause[cause] for t in tokens) / 1e9 == pytest.approx(seconds)
    compute_s = sum(t.by_cause["compute"] for t in tokens) / 1e9
    assert compute_s == pytest.approx(stats.decode_compute_s, rel=0.1)


def test_causes_add_up_to_the_time_of_every_token(served: Served) -> None:
    whole = found(served.run_dir)
    assert len(whole["tokens"]) >= 30
    for token in whole["tokens"]:
        assert sum(token["by_cause"].values()) == pytest.approx(token["wall_ms"], rel=0.02)
    assert whole["verdict"]["cause"] in VERDICTS


def test_one_request_can_be_asked_for(served: Served) -> None:
    whole = found(served.run_dir, "--request", "2")
    assert [token["index"] for token in whole["tokens"]] == list(range(6))
    missing = trace(served.run_dir, "--request", "77")
    assert missing.returncode == 1
    assert "there is no request '77'" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_the_perfetto_file_keeps_the_rules_of_its_format(served: Served, tmp_path: Path) -> None:
    """Complete events nest, asynchronous ones are pairs, arrows lead from span to span."""
    run, path = load_run(served.run_dir), tmp_path / "trace.json"
    assert trace(served.run_dir, "--perfetto", str(path)).returncode == 0
    events = json.loads(path.read_text())["traceEvents"]
    named = {e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert named == set(SERVICES)
    stack: dict[tuple[int, int], list[float]] = {}
    complete = [e for e in events if e["ph"] == "X" and e["name"] != "submit"]
    for event in sorted(complete, key=lambda e: (e["ts"], -e["dur"])):
        assert event["ts"] >= 0
        open_ends = stack.setdefault((event["pid"], event["tid"]), [])
        while open_ends and open_ends[-1] <= event["ts"] + 1e-3:
            open_ends.pop()
        end = event["ts"] + event["dur"]
        assert not open_ends or end <= open_ends[-1] + 1e-3, f"{event} is not within its parent"
        open_ends.append(end)
    begun = {e["id"]: e for e in events if e["ph"] == "b"}
    ended = {e["id"]: e for e in events if e["ph"] == "e"}
    assert begun.keys() == ended.keys()
    assert all(begun[key]["ts"] <= ended[key]["ts"] for key in begun)
    reads = [e for e in begun.values() if e["name"] == "read"]
    assert len(reads) == sum(s.name == "read" for s in run.spans["reader"])
    arrows_lead_somewhere([e for e in events if e["ph"] in "stf"], events)


def arrows_lead_somewhere(arrows: list[Any], events: list[Any]) -> None:
    flows: dict[int, list[Any]] = {}
    for arrow in arrows:
        flows.setdefault(arrow["id"], []).append(arrow)
    starts = {(e["pid"], e["ts"]): e["name"] for e in events if e["ph"] == "X"}
    ways: Counter[tuple[str, ...]] = Counter()
    for flow in flows.values():
        assert [e["ph"] for e in flow] == ["s", *"t" * (len(flow) - 2), "f"]
        assert [e["ts"] for e in flow] == sorted(e["ts"] for e in flow)
        ways[tuple(starts[e["pid"], e["ts"]] for e in flow)] += 1
    assert ways["ask", "predict", "fetch", "submit", "ffn"]
    assert ways["ask", "predict", "fetch", "ffn"]


def test_the_text_ends_with_a_verdict(served: Served) -> None:
    text = trace(served.run_dir)
    assert "verdict: " in text.stdout
    assert (text.returncode, text.stderr) == (0, "")


def test_following_sees_the_latest_tokens(served: Served) -> None:
    follower = Follower(served.run_dir)
    run = follower.look()
    assert run is not None
    assert [token.start_ns for token in run.tokens] == [
        token.start_ns for token in load_run(served.run_dir).tokens
    ]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(*pieces(run, 100))
    assert "verdict: " in console.export_text()
    assert len(follower.look().tokens) == len(run.tokens)  # type: ignore[union-attr]
    follower.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
def test_a_browser_draws_the_page(served: Served, tmp_path: Path) -> None:
    """TRACE_PICTURE names where the screenshot is kept, to look at it."""
    page = tmp_path / "trace.html"
    assert trace(served.run_dir, "--html", str(page)).returncode == 0
    drawn = browse(page, "--dump-dom", "--enable-logging=stderr")
    assert "Uncaught" not in drawn.stderr
    assert len(re.findall(r'<svg viewBox="0 0 \d', drawn.stdout)) == 5
    bars = len(load_run(served.run_dir).tokens) * len(CAUSES)
    assert drawn.stdout.count("<rect") > bars
    picture = Path(os.environ.get("TRACE_PICTURE") or tmp_path / "page.png")
    browse(page, f"--screenshot={picture}")
    assert picture.stat().st_size > 50_000


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={page.parent}/browser", "--window-size=1240,2300", *options,
         page.as_uri()],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip


PLANTED = {
    "slow_reads": {"cache": "25%", "slow": "reads:1%:900ms"},
    "predictor": {"cache": "100%", "slow": "predictor:30ms"},
    "cache": {"cache": "2%", "slow": "reads:100%:10ms"},
}


@pytest.mark.parametrize("cause", PLANTED)
@pytest.mark.timeout(200)
def test_a_planted_cause_is_named(demo: Store, run_dir: Path, cause: str) -> None:
    with serving(demo, run_dir, **PLANTED[cause]) as client:
        if cause == "predictor" and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(client.status()["services"]["predictor"]["pid"], {_a_core()})
        ask(client, max_new_tokens=60)  # some hundred batches of reads: several are slow
    verdict = found(run_dir)["verdict"]
    assert verdict["cause"] == cause, verdict["sentence"]
    assert verdict["remedies"][0]["gain"] > 0.2


def _a_core() -> int:
    return min(os.sched_getaffinity(0))


def test_what_is_no_run_is_told_in_a_line(tmp_path: Path) -> None:
    for folder, said in ((tmp_path, "is no run directory"), (tmp_path / "none", "no run dir")):
        result = trace(folder)
        assert result.returncode == 1
        assert said in result.stderr
        assert "Traceback" not in result.stderr
    (tmp_path / "log").mkdir()
    assert "holds no token that was traced" in trace(tmp_path).stderr
    assert "is no run directory" not in trace(tmp_path).stderr
    assert trace(tmp_path, "--follow", "--json").returncode == 2
    assert read_spans(tmp_path, "compute") == []
