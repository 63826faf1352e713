"""What bounds a run, in a sentence, and what would help most. Pure; from the trace alone.

Of what a token took, each change below would have saved so much:

    a larger cache      of a layer's wait for flash, the share of its reads that the larger cache
                        would hold. Misses over cache size are taken as (1 - size) ** k, with k from
                        this run's own misses, and less by K_PER_DOUBLING for each doubling: so the
                        measured policies fall (docs/measurements.md, "Cache policies")
    a faster drive      of a layer's wait for flash, what would have landed before compute asked if
                        its reads had taken half their time
    steady reads        of it, what its slow reads took more than the run's median
    look-ahead          of it, what the layer before could have hidden
    cores               time in which compute, predictor or reader could run and had no core

Gains are of speed: time before over time after. They are not of all changes together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.spans import Span
from common.trace.run import Run
from common.trace.summary import by_cause
from common.trace.tokens import Token

CAUSES = {
    "flash": "waiting for the drive",
    "slow_reads": "a few reads that take far longer than the others",
    "cache": "reads that a larger cache would save",
    "predictor": "waiting for the predictor: neurons are named late",
    "queue": "messages that wait to be taken up by the next process",
    "others": "prompts of other requests, computed in between",
    "cores": "too few cores: processes that could run wait for one",
    "memory_bandwidth": "reading weights from memory",
    "python": "the model's own code around its products, and messages",
    "client": "the client: nothing was asked for",
}
"""The closed list of what can bound a run."""

K_PER_DOUBLING = 0.87
ABSENT_MAX = 0.4  # share of the named neurons not in the cache, above which it is too small
SLOW_READ = 5.0  # times the third quartile of all reads: a slow one
MEMORY_GB_PER_S_MIN = 4.0  # slower than this no memory is: products that read slower wait for
# themselves (small matrices, and the calls that multiply them)
NS = 1e6


@dataclass(frozen=True)
class Remedy:
    """A change, and by how much it would make tokens faster: 0.25 is 25 % more tokens a second."""

    change: str
    gain: float


@dataclass(frozen=True)
class Verdict:
    cause: str  # one of CAUSES
    share: float  # of the time of a token; of a run that its client bounds: of the run
    sentence: str
    remedies: tuple[Remedy, ...]  # the best first

    def plain(self) -> dict[str, Any]:
        return {
            "cause": self.cause,
            "share": self.share,
            "sentence": self.sentence,
            "remedies": [{"change": r.change, "gain": r.gain} for r in self.remedies],
        }


@dataclass(frozen=True)
class Evidence:
    """What the verdict is made of. Milliseconds of a mean token, unless said otherwise."""

    wall: float
    causes: dict[str, float]
    slow_reads: float  # of the wait for flash, what slow reads took more than usual ones
    slow_share: float  # of the reads
    slow_times: float  # how many times the median a slow read took
    faster_drive: float  # saved by one that is twice as fast
    hidden_by_lookahead: float  # saved by look-ahead, which is off; else 0
    cores: float  # lost for want of a core: compute's own, and the others' that it waited for
    contended: dict[str, float]  # of `causes`, what is in `cores`
    absent: float  # share of the named neurons that were not in the cache
    cache_share: float  # of the FFN
    touched_bytes: float  # weights that a token reads from memory
    idle_share: float  # of the run, in which no request was under way
    core_cache_bytes: int
    threads: int
    cores_count: int
    predicts_ms: float  # of the predictor's work for a token, in the chain
    lookahead: str
    predictor: str

    @property
    def gb_per_s(self) -> float:
        """How fast products read weights."""
        return self.touched_bytes / max(self.causes["compute"], 1e-9) / 1e6

    @property
    def from_memory(self) -> bool:
        """Whether products wait for memory: more bytes than the cores' caches hold, read as fast
        as memories are."""
        large = self.touched_bytes > self.core_cache_bytes
        return large and self.gb_per_s >= MEMORY_GB_PER_S_MIN


def judge(run: Run) -> Verdict:
    """The verdict on a run."""
    return decide(gather(run))


def decide(found: Evidence) -> Verdict:
    """The verdict on evidence."""
    left = {c: ms - found.contended.get(c, 0.0) for c, ms in found.causes.items()}
    left["cores"] = found.cores
    bound = max(left, key=lambda cause: left[cause])
    cause, ms = bound, left[bound]
    if bound == "flash":
        cause = _of_flash(found)
    elif bound == "compute":
        cause = "memory_bandwidth" if found.from_memory else "cores"
    share = ms / found.wall if found.wall else 0.0
    remedies = tuple(sorted(_remedies(found), key=lambda r: r.gain, reverse=True))
    sentence = f"{_because(found, cause, ms, share)}{_help(remedies)}"
    if found.idle_share > 0.5:
        sentence = (
            f"The client bounds this run: for {found.idle_share:.0%} of it nothing was asked for."
            f" While tokens were made: {sentence[0].lower()}{sentence[1:]}"
        )
        return Verdict("client", found.idle_share, sentence, remedies)
    return Verdict(cause, share, sentence, remedies)


def _of_flash(found: Evidence) -> str:
    if found.slow_reads > found.causes["flash"] / 2:
        return "slow_reads"
    return "cache" if found.absent > ABSENT_MAX and found.cache_share < 1 else "flash"


def _because(found: Evidence, cause: str, ms: float, share: float) -> str:
    of = f"{share:.0%} of a token's {found.wall:.1f} ms"
    return {
        "flash": f"Flash bounds this run: {of} are waiting for reads.",
        "slow_reads": (
            f"Slow reads bound this run: {of} are waiting for flash, and {found.slow_share:.1%} of"
            f" the reads, which take {found.slow_times:.0f} times as long as usual, make"
            f" {min(found.slow_reads / max(ms, 1e-9), 1):.0%} of that."
        ),
        "cache": (
            f"The cache is too small: {of} are waiting for flash, and {found.absent:.0%} of the"
            f" neurons that were named were not in a cache of {found.cache_share:.0%} of the FFN."
        ),
        "predictor": (
            f"Late prediction bounds this run: {of} pass before the predictor has named the"
            f" neurons; its own work takes {found.predicts_ms:.1f} ms of them."
        ),
        "queue": f"Hand-overs bound this run: {of} pass while messages wait to be taken up.",
        "others": (
            f"Other requests bound this run: {of} are blocks of their prompts, computed in between."
        ),
        "cores": (
            f"Cores bound this run: {of} are"
            + (" lost by processes that could run and had no core."
               if found.cores >= found.causes["compute"]
               else f" products, which read {found.touched_bytes / 1e6:,.0f} MB of weights at"
               f" {found.gb_per_s:.1f} GB/s: the cores' own work, not memory's.")
        ),
        "memory_bandwidth": (
            f"Memory bandwidth bounds this run: {of} are products, which read"
            f" {found.touched_bytes / 1e6:,.0f} MB of weights at {found.gb_per_s:.1f} GB/s."
        ),
        "python": (
            f"Python bounds this run: {of} are the model's own code around its products, and"
            " messages; a larger model has less of it."
        ),
    }[cause]  # fmt: skip


def _help(remedies: tuple[Remedy, ...]) -> str:
    worth = [remedy for remedy in remedies if remedy.gain >= 0.02]
    if not worth:
        return " No setting would gain more than 2 %."
    first, *others = worth
    text = f" What would help most: {first.change} (about {first.gain:+.0%} tokens/s)"
    if others:
        text += f"; then {others[0].change} ({others[0].gain:+.0%})"
    return f"{text}."


def _remedies(found: Evidence) -> list[Remedy]:
    flash = found.causes["flash"]
    saved: dict[str, float] = {
        "a drive that reads twice as fast": found.faster_drive,
        "a drive without slow reads (is it shared, worn, hot or nearly full?)": found.slow_reads,
        "look-ahead on (--lookahead on)": found.hidden_by_lookahead,
    }
    if found.cache_share < 1 and found.absent > 0:
        size, fewer = larger_cache(found.cache_share, found.absent)
        saved[f"a cache of {size:.0%} of the FFN (--memory, --cache)"] = flash * (1 - fewer)
    predictor = "a predictor that is never waited for"
    if found.predictor == "exact":
        predictor += " (fitted, and smaller: inflash fit)"
    saved[predictor] = found.causes["predictor"] - found.contended.get("predictor", 0.0)
    if found.threads > found.cores_count:
        saved[f"fewer threads (--threads {found.cores_count})"] = found.cores
    else:
        saved["a core more, or fewer other programs on these"] = found.cores
    what = "memory that is" if found.from_memory else "cores that are"
    saved[f"{what} twice as fast"] = found.causes["compute"] / 2
    return [
        Remedy(change, found.wall / (found.wall - ms) - 1)
        for change, ms in saved.items()
        if 0 < ms < found.wall
    ]


def larger_cache(size: float, absent: float) -> tuple[float, float]:
    """The first doubling of a cache of `size` (share of the FFN), of which a share `absent` of what
    is asked for is missing, that halves the misses: its size, and what of the misses stays."""
    absent = min(max(absent, 1e-6), 1 - 1e-6)
    k = math.log(absent) / math.log(1 - min(max(size, 1e-6), 1 - 1e-6))
    larger = size
    while True:
        larger, k = 2 * larger, k * K_PER_DOUBLING
        if larger >= 1:
            return 1.0, 0.0
        fewer = (1 - larger) ** k / absent
        if fewer <= 0.5:
            return larger, fewer


def gather(run: Run) -> Evidence:
    """The evidence in a run."""
    tokens = run.decoded
    causes = by_cause(tokens)
    slow = _slow_reads(run)
    settings, plan, store = (run.facts.get(k, {}) for k in ("settings", "plan", "store"))
    machine = run.facts.get("machine", {})
    ffn_bytes = store.get("ffn_bytes", 0)
    lookahead = settings.get("lookahead", "on")
    neurons = sum(token.count("hits") + token.count("misses") for token in tokens)
    brought = sum(token.count("misses") + token.count("prefetched") for token in tokens)
    cores_count = machine.get("cores") or 1
    cores, contended = _contention(run, tokens, causes)
    return Evidence(
        wall=sum(token.ns for token in tokens) / len(tokens) / NS,
        causes=causes,
        slow_reads=slow.saved_ms,
        slow_share=slow.share,
        slow_times=slow.times,
        faster_drive=_mean(tokens, lambda w, read_ns, _: min(w, read_ns / 2)),
        hidden_by_lookahead=_mean(tokens, lambda w, _, before_ns: min(w, before_ns))
        if lookahead == "off" else 0.0,
        cores=cores,
        contended=contended,
        absent=brought / neurons if neurons else 0.0,
        cache_share=min(plan.get("cache_bytes", 0) / ffn_bytes, 1.0) if ffn_bytes else 1.0,
        touched_bytes=_touched_bytes(tokens, store, plan),
        idle_share=idle_share(run),
        core_cache_bytes=machine.get("core_cache_bytes") or 0,
        threads=settings.get("threads") or cores_count,
        cores_count=cores_count,
        predicts_ms=sum(s.ns for s in run.spans["predictor"] if s.name == "predict")
        / NS / len(run.tokens),
        lookahead=lookahead,
        predictor=settings.get("predictor", "auto"),
    )  # fmt: skip


def _mean(tokens: list[Token], saved: Any) -> float:
    """Milliseconds of a mean token; `saved(wait for flash, time of reads, time of the layer
    before)` is asked for each layer, in ns."""
    total = 0.0
    for token in tokens:
        before_ns = 0.0
        for layer in token.layers:
            total += saved(layer.by_cause["flash"], layer.counts["read_ns"], before_ns)
            before_ns = layer.by_cause["compute"] + layer.by_cause["python"]
    return total / len(tokens) / NS


@dataclass(frozen=True)
class _SlowReads:
    saved_ms: float = 0.0
    share: float = 0.0
    times: float = 1.0


def _slow_reads(run: Run) -> _SlowReads:
    """Reads that took far longer than the others of this run, in the tokens that waited."""
    reads = [span for span in run.spans["reader"] if span.name == "read"]
    if len(reads) < 20:
        return _SlowReads()
    times = [span.ns for span in reads]
    median, limit = float(np.median(times)), SLOW_READ * float(np.percentile(times, 75))
    slow = [span for span in reads if span.ns > limit]
    if not slow:
        return _SlowReads()
    excess: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for span in slow:
        excess[span.step, span.layer].append(span)
    saved = 0.0
    for token in run.decoded:
        for layer in token.layers:
            late = excess.get((layer.step, layer.layer), ())
            worst = max((span.ns - median for span in late), default=0.0)
            saved += min(layer.by_cause["flash"], worst)
    return _SlowReads(
        saved / len(run.decoded) / NS,
        len(slow) / len(reads),
        sum(span.ns for span in slow) / len(slow) / median,
    )


def _contention(
    run: Run, tokens: list[Token], causes: dict[str, float]
) -> tuple[float, dict[str, float]]:
    """Time lost for want of a core: in sum, and as parts of the causes that it was charged to."""
    own = sum(token.delayed_ns for token in tokens) / len(tokens) / NS
    # Compute is delayed where it runs, and where it is woken: a wait's last stretch is `queue`.
    runs = causes["compute"] + causes["python"] + causes["queue"]
    parts = {c: min(own * causes[c] / runs, causes[c]) if runs else 0.0
             for c in ("compute", "python", "queue")}  # fmt: skip
    first, last = tokens[0].start_ns, tokens[-1].end_ns
    for service, cause in (("predictor", "predictor"), ("reader", "queue")):
        beats = [
            span
            for span in run.spans[service]
            if span.name == "beat" and first <= span.start_ns and span.end_ns <= last
        ]
        delayed = sum(span.field("delayed_ns") for span in beats) / len(tokens) / NS
        active = delayed + sum(span.field("cpu_ns") for span in beats) / len(tokens) / NS
        # Of what it was active, compute waited for it only for so long.
        lost = delayed * min(causes[cause] / active, 1.0) if active else 0.0
        parts[cause] = min(parts.get(cause, 0.0) + lost, causes[cause])
    return sum(parts.values()), parts


def _touched_bytes(tokens: list[Token], store: dict[str, Any], plan: dict[str, Any]) -> float:
    """Weights that a mean token's products read: the resident ones, the first part of each named
    bundle, and the rest of those that fired."""
    if not store or not plan:
        return 0.0
    bundle = store["ffn_bytes"] / (store["layers"] * store["neurons"])
    named = sum(t.count("hits") + t.count("misses") + t.count("extra") for t in tokens)
    fired = sum(token.count("fired") for token in tokens)
    ffn = (named + fired) / len(tokens) * bundle / 2
    return float(plan.get("resident_bytes", 0)) + ffn


def idle_share(run: Run) -> float:
    """Of a run, from its first request's arrival to its last token, the share in which none was
    under way."""
    if run.chosen is not None or len(run.requests) < 2:
        return 0.0
    end_of_run = run.tokens[-1].end_ns
    first = busy_until = run.requests[0].arrived_ns
    idle = 0
    for request in run.requests:
        idle += max(request.arrived_ns - busy_until, 0)
        busy_until = max(busy_until, request.ended_ns or end_of_run)
    whole = max(end_of_run, busy_until) - first
    return idle / whole if whole > 0 else 0.0
