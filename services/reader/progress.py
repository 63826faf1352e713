"""How far one demand is, and what compute is told of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages import Fetch, Resident
from common.policy import Slots
from services.reader.cache import Ids


@dataclass(frozen=True)
class Brought:
    """What a part tells beside its neurons."""

    cached: bool = False
    prefetched: int = 0
    extra: int = 0
    reads: int = 0
    bytes_read: int = 0
    wasted_bytes: int = 0


NOTHING = Brought()


NOT_ASKED = -1
"""As what is left of a layer: its demand has not come."""


@dataclass
class Progress:
    """How far one demand is; or, until it comes, what was sent ahead of it."""

    fetch: Fetch  # at first the prefetch
    taken_ns: int
    todo: Ids  # ascending; neither sent nor in a group
    left: int = NOT_ASKED  # neurons not sent, the answer to the demand apart
    group_size: int = 0  # neurons of one group, at most
    early: Ids | None = None  # sent before the demand came
    in_flight: int = 0  # groups
    next_part: int = 0
    answered: int = 0  # the part that answers the demand
    parts: dict[int, Slots] = field(default_factory=dict)  # sent and not released
    over: bool = False  # dropped or failed: nothing more is sent

    @property
    def asked(self) -> bool:
        """Whether the layer's demand has come."""
        return self.left != NOT_ASKED

    @property
    def done(self) -> bool:
        return not self.parts and (self.over or self.left == 0)

    def ask(self, fetch: Fetch, taken_ns: int, todo: Ids, left: int, group_size: int) -> None:
        """The demand has come; `left` without what its answer, the next part, brings."""
        self.fetch, self.taken_ns = fetch, taken_ns
        self.todo, self.left, self.group_size = todo, left, group_size
        self.answered = self.next_part

    def part(self, ids: Ids, slots: Slots, brought: Brought, now_ns: int) -> Resident:
        """The next part: `ids` lie in `slots`, which are pinned until its Release."""
        part = self.next_part
        self.next_part += 1
        if self.asked and part > self.answered:
            self.left -= len(ids)
        self.parts[part] = slots
        fetch = self.fetch
        return Resident(
            request=fetch.request,
            step=fetch.step,
            layer=fetch.layer,
            part=part,
            left=self.left,
            cached=brought.cached,
            prefetched=brought.prefetched,
            extra=brought.extra,
            reads=brought.reads,
            bytes_read=brought.bytes_read,
            wasted_bytes=brought.wasted_bytes,
            read_ns=0,  # the loop's to say: it has the clock
            named_ns=fetch.named_ns,
            taken_ns=self.taken_ns,
            landed_ns=now_ns,
            ids=ids.astype("<i4", copy=False).tobytes(),
            slots=slots.astype("<i4", copy=False).tobytes(),
        )
