"""Runs that a test makes up span by span, as the processes would have recorded them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.messages import SERVICES
from common.spans import COUNTS, FIELDS, Span
from common.trace.run import Run, requests_of
from common.trace.tokens import tokens_of

US = 1000
FACTS: dict[str, Any] = {
    "store": {"path": "/stores/made", "family": "opt", "layers": 2, "neurons": 1000,
              "dtype": "float16", "ffn_bytes": 100_000_000},
    "plan": {"cache_bytes": 25_000_000, "resident_bytes": 50_000_000},
    "settings": {"lookahead": "on", "predictor": "lowrank", "threads": 1},
    "machine": {"cores": 4, "core_cache_bytes": 8_000_000},
}  # fmt: skip


@dataclass
class Maker:
    """Makes a run on a clock of its own. Microseconds in, nanoseconds of spans out."""

    layers: int = 2
    now_ns: int = 1_000_000
    step: int = 100
    spans: dict[str, list[Span]] = field(default_factory=lambda: {s: [] for s in SERVICES})

    def add(self, service: str, name: str, at: tuple[int, int, int], start_ns: int, ns: int,
            **fields: int) -> None:  # fmt: skip
        values = tuple(fields.get(key, 0) for key in FIELDS[name])
        assert not fields.keys() - FIELDS[name]
        self.spans[service].append(Span(name, *at, start_ns, ns, values))

    def lap(self, name: str, at: tuple[int, int, int], us: int, **fields: int) -> None:
        self.add("compute", name, at, self.now_ns, us * US, **fields)
        self.now_ns += us * US

    def token(
        self,
        request: int,
        index: int,
        *,
        predictor: int = 10,
        queue: int = 10,
        flash: int = 10,
        ffn: int = 50,
        delayed: int = 0,
        counts: Mapping[str, int] | None = None,
        read: int = 10,
        ahead: bool = False,
    ) -> None:
        """One token; the waits are those of each layer."""
        began_ns, self.step = self.now_ns, self.step + 1
        for layer in range(self.layers):
            at = request, self.step, layer
            if ahead:
                self.look_ahead(at)
            self.lap("attention", at, 40, product_ns=30 * US)
            asked_ns = self.now_ns
            self.lap("ask", at, 5)
            self.add("predictor", "predict", at, self.now_ns, predictor * US, rows=1, named=9)
            taken_ns = self.now_ns + predictor * US
            self.add("reader", "fetch", at, taken_ns, 2 * US, named=9, missing=4)
            self.add("reader", "read", at, taken_ns + 2 * US, read * US, part=1, neurons=4,
                     reads=2, bytes=16384)  # fmt: skip
            self.lap("wait", at, predictor + queue + flash, part=1, predictor_ns=predictor * US,
                     queue_ns=queue * US, flash_ns=flash * US)  # fmt: skip
            self.lap("ffn", at, ffn, part=1, neurons=9)
            self.lap("release", at, 5, part=1)
            given = {"rows": 1, "hits": 75, "misses": 25, "fired": 60, "read_ns": read * US}
            values = {name: (given | dict(counts or {})).get(name, 0) for name in COUNTS}
            self.add("compute", "layer", at, asked_ns, self.now_ns - asked_ns, **values)
        whole = request, self.step, -1
        self.lap("head", whole, 20, product_ns=15 * US)
        self.lap("sample", whole, 5)
        self.lap("send", whole, 5)
        self.add("compute", "token", whole, began_ns, self.now_ns - began_ns, index=index,
                 delayed_ns=delayed * US)  # fmt: skip

    def look_ahead(self, at: tuple[int, int, int]) -> None:
        """What look-ahead does under a layer's attention."""
        self.add("predictor", "ahead", at, self.now_ns, 8 * US, named=12)
        self.add("reader", "fetch", at, self.now_ns + 9 * US, 2 * US, prefetch=1, named=12)
        self.add("reader", "read", at, self.now_ns + 12 * US, 20 * US, prefetch=1, part=-1,
                 neurons=7, reads=6, bytes=6 * 4096)  # fmt: skip

    def request(self, number: int, tokens: int, **waits: Any) -> None:
        """A request with its tokens, and the gateway's spans of it."""
        began_ns = self.now_ns
        ordinal = sum(span.name == "request" for span in self.spans["gateway"]) + 1
        at = number, -1, -1
        self.now_ns += 10 * US
        self.add("gateway", "queue", at, began_ns, 10 * US, ordinal=ordinal, prompt_tokens=3)
        for index in range(tokens):
            self.token(number, index, **waits)
        self.add("gateway", "request", at, began_ns, self.now_ns - began_ns, ordinal=ordinal,
                 prompt_tokens=3, new_tokens=tokens)  # fmt: skip

    def run(self, **facts: dict[str, Any]) -> Run:
        """All of it, read as a run is."""
        tokens = tokens_of(self.spans["compute"])
        requests = requests_of(self.spans["gateway"], tokens)
        merged = {key: value | facts.get(key, {}) for key, value in FACTS.items()}
        return Run(Path("/run"), merged, self.spans, tokens, requests)
