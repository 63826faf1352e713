"""Who is ready, who lives, who is lost. Pure: takes messages, times and what the system says.

Owns the verdict that ends a server: a service that does not get ready, is silent, hangs, or whose
process is gone. A message alone ends nothing, and a message whose pid is not that of the service's
claim in the run directory is refused: what anyone can send to a socket must not stop a server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.limits import HANG_S, HEALTH_LOST_S, SLEPT_S, START_S
from common.messages import SERVICES, Fault, Health, Ready
from inflash._wire import VERSION

OBSERVER = "gateway"


@dataclass(frozen=True, slots=True)
class Loss:
    service: str
    reason: str


@dataclass(slots=True)
class Peer:
    """What is known of one service. Times are seconds of the loop's clock."""

    heard: float
    turned: float  # when its beat last grew
    pid: int | None = None
    ready: bool = False
    beat: int = -1
    uptime_s: float = 0.0
    fault: str = ""
    counters: dict[str, int] = field(default_factory=dict)


class Watch:
    """The health of all services, the gateway's own included; it is the one not judged."""

    def __init__(self, store_id: str, now: float):
        self._store_id = store_id
        self._born = self._looked = now
        self._peers = {name: Peer(heard=now, turned=now) for name in SERVICES}
        self.loss: Loss | None = None

    @property
    def ready(self) -> bool:
        """Whether every service is ready and none is lost."""
        return self.loss is None and all(peer.ready for peer in self._peers.values())

    @property
    def state(self) -> str:
        """starting, ready or failing."""
        if self.loss is not None:
            return "failing"
        return "ready" if self.ready else "starting"

    def receive(
        self, message: Ready | Health | Fault, claimed: Callable[[str], int | None], now: float
    ) -> bool:
        """Takes a message; False if it is not from the service. `claimed` gives the pid in a
        service's claim, asked until its first message."""
        peer = self._peers.get(message.service)
        if peer is None:
            return False
        if peer.pid is None and claimed(message.service) == message.pid:
            peer.pid = message.pid
        if message.pid != peer.pid:
            return False
        if isinstance(message, Ready):
            if peer.ready:
                return False  # said once; another one is not from it
            peer.ready = True
            peer.turned = now
            self._check(message)
        elif isinstance(message, Fault):
            peer.fault = message.reason
        else:
            peer.uptime_s, peer.counters = message.uptime_s, message.counters
            if message.beat != peer.beat:  # not >: one wrong number must not stop the clock
                peer.beat, peer.turned = message.beat, now
        peer.heard = now
        return True

    def look(self, now: float, alive: Callable[[int], bool]) -> Loss | None:
        """The verdict. `alive` tells whether a process runs."""
        if now - self._looked > SLEPT_S:
            # Stopped and continued: what the others said meanwhile may not be received yet.
            for peer in self._peers.values():
                peer.heard = peer.turned = now
        self._looked = now
        if self.loss is None:
            losses = [
                (bool(peer.fault), Loss(name, reason))
                for name, peer in self._peers.items()
                if name != OBSERVER and (reason := self._judge(peer, now, alive))
            ]
            # One that ended without a word was killed: the words of others follow from it.
            self.loss = min(losses, key=lambda loss: loss[0])[1] if losses else None
        return self.loss

    def lose(self, service: str, reason: str) -> None:
        """A loss that was met elsewhere: the service does not take its messages."""
        self.loss = self.loss or Loss(service, reason)

    def report(self) -> dict[str, dict[str, Any]]:
        """Each service's pid, state, uptime and counters."""
        return {
            name: {
                "pid": peer.pid,
                "state": self._state_of(name, peer),
                "uptime_s": peer.uptime_s,
                "counters": peer.counters,
            }
            for name, peer in self._peers.items()
        }

    def _check(self, ready: Ready) -> None:
        if ready.protocol != VERSION:
            self.lose(ready.service, f"it speaks protocol {ready.protocol}, the gateway {VERSION}")
        elif ready.store_id != self._store_id:
            self.lose(
                ready.service,
                f"it serves store {ready.store_id!r:.80}, the gateway {self._store_id!r:.80}",
            )

    def _judge(self, peer: Peer, now: float, alive: Callable[[int], bool]) -> str:
        """Why the service is lost, or ""."""
        if peer.pid is not None and not alive(peer.pid):
            return peer.fault or f"process {peer.pid} has ended"
        if not peer.ready:
            late = now - self._born >= START_S
            return f"not ready within {START_S:.0f} s (limit START_S)" if late else ""
        if now - peer.heard >= HEALTH_LOST_S:
            silence = f"silent for {now - peer.heard:.1f} s (limit HEALTH_LOST_S)"
            return f"{silence}; its last word: {peer.fault}" if peer.fault else silence
        if now - peer.turned >= HANG_S:
            return f"its loop has not turned for {now - peer.turned:.0f} s (limit HANG_S)"
        return ""

    def _state_of(self, name: str, peer: Peer) -> str:
        if self.loss is not None and self.loss.service == name:
            return "lost"
        return "ready" if peer.ready else "starting"
