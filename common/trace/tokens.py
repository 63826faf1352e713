"""What became of each token's time: compute's spans, put together by token. Pure.

Compute's spans lie end to end (services/compute/laps.py), so what a token took is the sum of its
spans; each counts as one cause:

    compute     products of matrices, the FFN's parts, choosing the token
    predictor   compute waited until the neurons were named
    queue       compute waited while a message lay between two processes
    flash       compute waited for reads
    others      compute was at other requests' prompts
    python      the model's own code around its products; messages made and sent
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from common.limits import RUNNING_MAX
from common.spans import COUNTS, NO_LAYER, Span

CAUSES = ("compute", "predictor", "queue", "flash", "others", "python")
IN_A_LAYER = tuple(cause for cause in CAUSES if cause != "others")
WAITS = ("predictor", "queue", "flash")
_WITH_PRODUCTS = ("embed", "attention", "head")
_COMPUTE = ("ffn", "sample")
_PYTHON = ("admit", "ask", "release", "send")
LEAVES = (*_WITH_PRODUCTS, *_COMPUTE, *_PYTHON, "wait", "others")
UNFINISHED_MAX = 2 * RUNNING_MAX  # requests of which a token is not whole


@dataclass(frozen=True)
class Layer:
    """One layer of one step: its attention and its FFN."""

    layer: int
    step: int
    start_ns: int  # of the attention
    asked_ns: int  # when the FFN began
    end_ns: int
    by_cause: dict[str, int]  # ns
    counts: dict[str, int]  # common.spans.COUNTS

    @property
    def ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True)
class Token:
    """One token: from the one before, or its request's begin in compute, until it was sent."""

    request: int
    index: int  # in its answer; 0 holds the whole prompt
    start_ns: int
    ns: int
    delayed_ns: int  # of `ns`, ready to run and without a core
    by_cause: dict[str, int]  # ns
    layers: tuple[Layer, ...]
    spans: tuple[Span, ...]  # all of compute's, in time

    @property
    def end_ns(self) -> int:
        return self.start_ns + self.ns

    def count(self, name: str) -> int:
        """The sum of a count over the layers."""
        return sum(layer.counts[name] for layer in self.layers)


def causes_of(span: Span) -> Iterator[tuple[str, int]]:
    """What a leaf counts as: (cause, ns)."""
    if span.name == "wait":
        yield from ((cause, span.field(f"{cause}_ns")) for cause in WAITS)
    elif span.name in _WITH_PRODUCTS:
        products = span.field("product_ns")
        yield "compute", products
        yield "python", span.ns - products
    elif span.name in _COMPUTE:
        yield "compute", span.ns
    elif span.name in _PYTHON:
        yield "python", span.ns
    elif span.name == "others":
        yield "others", span.ns


@dataclass
class Assembler:
    """Puts tokens together as compute's spans come, those of several requests among each other;
    keeps what belongs to the next."""

    _spans: dict[int, list[Span]] = field(default_factory=dict)  # by request

    def feed(self, spans: Iterable[Span]) -> Iterator[Token]:
        """The tokens that these spans complete."""
        for span in spans:
            own = self._spans.setdefault(span.request, [])
            own.append(span)
            if span.name == "token":
                yield _token(own)
                del self._spans[span.request]
            elif len(self._spans) > UNFINISHED_MAX:  # some were cancelled, or failed, within one
                oldest = min(self._spans, key=lambda request: self._spans[request][-1].end_ns)
                del self._spans[oldest]


def tokens_of(spans: Iterable[Span]) -> list[Token]:
    """All whole tokens in compute's spans, in time. The first of a request that is there may have
    lost its oldest spans to a full file: it is left out then."""
    return list(filter(_is_whole, Assembler().feed(s for s in spans if s.name != "beat")))


def _is_whole(token: Token) -> bool:
    return bool(token.spans) and token.spans[0].start_ns <= token.start_ns


def _token(spans: list[Span]) -> Token:
    *inner, last = spans
    by_cause = dict.fromkeys(CAUSES, 0)
    by_layer: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for span in inner:
        for cause, ns in causes_of(span):
            by_cause[cause] += ns
        if span.layer != NO_LAYER:
            by_layer[span.step, span.layer].append(span)
    return Token(
        request=last.request,
        index=last.field("index"),
        start_ns=last.start_ns,
        ns=last.ns,
        delayed_ns=last.field("delayed_ns"),
        by_cause=by_cause,
        layers=tuple(layer for group in by_layer.values() if (layer := _layer(group))),
        spans=tuple(inner),
    )


def _layer(spans: list[Span]) -> Layer | None:
    """A layer of its spans; None if its end is not among them."""
    by_name = {span.name: span for span in spans}
    attention, whole = by_name.get("attention"), by_name.get("layer")
    if attention is None or whole is None:
        return None
    by_cause = dict.fromkeys(CAUSES, 0)
    for span in spans:
        for cause, ns in causes_of(span):
            by_cause[cause] += ns
    return Layer(
        layer=whole.layer,
        step=whole.step,
        start_ns=attention.start_ns,
        asked_ns=whole.start_ns,
        end_ns=whole.end_ns,
        by_cause=by_cause,
        counts=dict(zip(COUNTS, whole.fields, strict=True)),
    )
