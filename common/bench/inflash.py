"""inflash as a contender: a server with the given settings, asked as a client asks.

`python -m common.bench.inflash STORE --tokens N --prompt-ids-file FILE --set KEY=VALUE ...` prints
one line of JSON as the rivals do (rivals/program.py), and beside it what each request found:

    cold        the first prompt, in a server that has just started
    warm        the same prompt and answer again
    rotating    other prompts of the same length, one after the other

Then, with `--clients`, so many clients ask at once (clients.py): the cache is warm by then.

Its figures are those of the rotating prompts: the cache is warm, and the text is new. Tokens are
given, not chosen: what a planted model chooses by itself soon repeats, and repeats hit the cache.
The rivals' figures do not depend on which token it is. No torch here: the cap counts this process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from common.bench.clients import SEED, draw, measure_clients
from common.bench.processes import bytes_read, major_faults, peak_bytes
from common.bench.rivals.program import Options, Result, Timed, main
from common.errors import UserError
from common.launch import Server
from common.pagecache import forget_imports
from common.plan import make_plan
from common.spans import Span, read_spans
from common.store.store import Store
from inflash import Client, Stats, __version__
from inflash._errors import InflashError

Kind = Literal["cold", "warm", "rotating"]
CLIENT_S = 600.0  # for the first token of a long prompt


@dataclass(frozen=True)
class Question:
    """A request to make: a prompt, and the answer's tokens, which are given."""

    kind: Kind
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Waits:
    """What the decode steps of a request waited for, by compute's log, ms per token; and the mean
    read. Where the log has no such step, nothing is known."""

    predictor_ms: float
    queue_ms: float
    flash_ms: float
    read_bytes: float | None  # None: nothing was read


@dataclass(frozen=True)
class Answered:
    """What a request found, its prompt apart. `timed.bytes_read` is the kernel's count, of all
    processes; the server's own is in `stats`."""

    kind: Kind
    timed: Timed
    stats: Stats
    waits: Waits | None = None


@dataclass(frozen=True)
class Served(Result):
    """A contender's result, with what only inflash has."""

    requests: list[Answered]
    process_peak_bytes: dict[str, int | None]  # each with what it shares: their sum counts twice
    memory_bytes: int  # that the plan divides
    cache_bytes: int
    cache_share: float  # of the FFN
    clients: list[dict[str, Any]]  # a row for each --clients


def contend(options: Options) -> Served:
    """Starts a server, makes the requests one after the other, ends it."""
    store = Store.open(options.model)
    questions = make_questions(options, vocabulary(store))
    with tempfile.TemporaryDirectory(prefix="inflash-") as folder:
        # A prompt is asked several times, and each time timed.
        settings = {"run_dir": folder, "reuse": "off"} | dict(options.own.set)
        settings |= {"store": str(options.model.absolute()), "threads": str(options.threads)}
        server = Server(settings, quiet=True)  # standard output is the result's
        plan = make_plan(server.settings, store)
        start = time.perf_counter()
        try:
            with server, Client(server.run_dir, timeout=CLIENT_S) as client:
                load_ms = (time.perf_counter() - start) * 1e3
                forget_imports()
                answered = [_ask(client, server, question) for question in questions]
                together = _measure_clients(server, options, vocabulary(store))
                pids = {name: process.pid for name, process in server.processes.items()}
                peaks = {name: peak_bytes(pid) for name, pid in pids.items()}
        except InflashError as error:
            raise UserError(f"the server did not answer: {error}") from None
        # The log is whole now: compute's heart has written its last.
        waits = waits_by_request(read_spans(server.run_dir, "compute"))
    if len(waits) == len(answered):
        pairs = zip(answered, waits, strict=True)
        answered = [dataclasses.replace(answer, waits=one) for answer, one in pairs]
    counted = headline(answered)
    return Served(
        name="inflash",
        version=__version__,
        load_ms=load_ms,
        timed=add_up(counted),
        note=f"{len(questions)} requests in one server; figures of the {counted[0].kind} ones",
        requests=answered,
        process_peak_bytes=peaks,
        memory_bytes=plan.memory_bytes,
        cache_bytes=plan.cache_bytes,
        cache_share=plan.cache_bytes / store.geometry.ffn_bytes,
        clients=together,
    )


def _measure_clients(server: Server, options: Options, ids: int) -> list[dict[str, Any]]:
    """What so many clients get as `--clients` say, each with a prompt and an answer of its own."""
    if not options.own.clients:
        return []
    prompts, answers = draw(ids, max(options.own.clients), options.tokens)
    clients, tokens = options.own.clients, options.tokens
    rows = measure_clients(server.run_dir, clients, tokens, prompts=prompts, given=answers)
    for row in rows:
        if row.lost or row.doubled or row.different:
            raise UserError(
                f"of {row.n} clients not each got its tokens: give the server a context that has"
                " room for prompt and answer"
            )
    return [
        {"n": row.n, "tokens_per_s": row.tokens_per_s, "slowest_share": row.slowest_share}
        for row in rows
    ]


def vocabulary(store: Store) -> int:
    """How many token ids the store's model has."""
    config = json.loads((store.config_dir / "config.json").read_text(encoding="utf-8"))
    return int(config["vocab_size"])


def make_questions(options: Options, ids: int) -> list[Question]:
    """The requests: cold, warm if asked for, then rotating. `ids`: of the vocabulary."""
    random = np.random.default_rng(SEED)

    def draw(count: int) -> list[int]:
        return [int(token) for token in random.integers(0, ids, count)]

    answer_tokens = options.tokens + 1  # the first comes with the prompt, and is not timed
    first = Question("cold", options.prompt, draw(answer_tokens))
    again = [dataclasses.replace(first, kind="warm")] if options.own.warm else []
    others = [
        Question("rotating", draw(len(options.prompt)), draw(answer_tokens))
        for _ in range(options.own.prompts - 1)
    ]
    return [first, *again, *others]


def headline(answered: list[Answered]) -> list[Answered]:
    """The requests whose figures are the contender's: the rotating ones, or the only one."""
    return [one for one in answered if one.kind == "rotating"] or answered[:1]


def add_up(answered: list[Answered]) -> Timed:
    """One `Timed` for several requests: the first one's prompt, and all of their tokens."""
    timed = [one.timed for one in answered]
    counted = [one.bytes_read for one in timed if one.bytes_read is not None]
    return Timed(
        timed[0].prefill_ms,
        [ms for one in timed for ms in one.ms_per_token],
        sum(counted) if len(counted) == len(timed) else None,
        sum(one.major_faults for one in timed),
        [token for one in timed for token in one.tokens],
    )


def _ask(client: Client, server: Server, question: Question) -> Answered:
    """One request; a token's time is the one between two of them at the client."""
    pids = [os.getpid(), *(process.pid for process in server.processes.values())]
    start = time.perf_counter()
    answer = client.generate(
        question.prompt,
        max_new_tokens=len(question.answer),
        forced=question.answer,
        ignore_eos=True,
    )
    times: list[float] = []
    read, faults = None, 0
    for _ in answer:
        now = time.perf_counter()
        times.append((now - start) * 1e3)
        start = now
        if len(times) == 1:
            read, faults = bytes_read(pids), major_faults(pids)
    after = bytes_read(pids)
    if len(times) != len(question.answer) or answer.stats is None:
        raise UserError(
            f"the server answered {len(times)} tokens of {len(question.answer)}"
            f" ({answer.finish_reason}): give it a context that has room for prompt and answer"
        )
    counted = None if read is None or after is None else after - read
    faults = major_faults(pids) - faults
    timed = Timed(times[0], times[1:], counted, faults, question.answer)
    return Answered(question.kind, timed, answer.stats)


def waits_by_request(spans: Iterable[Span]) -> list[Waits]:
    """What each request's decode steps waited for, in the requests' order, by compute's spans."""
    layers: dict[int, list[Span]] = {}
    for span in spans:
        if span.name == "layer" and span.field("rows") == 1:
            layers.setdefault(span.request, []).append(span)
    return [_waits(layers[request]) for request in sorted(layers)]


def _waits(layers: list[Span]) -> Waits:
    steps = len({span.step for span in layers})
    sums = {
        key: sum(span.field(key) for span in layers)
        for key in ("predictor_ns", "queue_ns", "flash_ns", "reads", "bytes_read")
    }
    return Waits(
        sums["predictor_ns"] / 1e6 / steps,
        sums["queue_ns"] / 1e6 / steps,
        sums["flash_ns"] / 1e6 / steps,
        sums["bytes_read"] / sums["reads"] if sums["reads"] else None,
    )


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting: write KEY=VALUE")
    return key, value


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--prompts", type=int, default=1, help="the given one, and others drawn")
    parser.add_argument("--warm", action="store_true", help="the first prompt a second time")
    parser.add_argument("--clients", type=int, action="append", default=[], help="so many at once")


if __name__ == "__main__":
    sys.exit(main(contend, {}, sys.argv[1:], _add_arguments))
