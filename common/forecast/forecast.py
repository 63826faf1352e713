"""What a machine will do with a model in so much memory: fit, cache, hits, first token, tokens/s.

Divides memory as a server does (common/plan.py), takes from the model's behaviour what a cache of
that size misses, and from the machine's cost model what that takes. Pure. A speed is a range: the
expectation divided and multiplied by a factor that measured runs lay within (docs/forecast.md).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Settings
from common.errors import SettingError
from common.forecast.behaviour import Behaviour, predictor_bytes
from common.forecast.machine import Machine
from common.forecast.source import Described
from common.forecast.tokens import (
    Token,
    Work,
    computed_bytes,
    extra_parts,
    prompt_ms,
    token_ms,
)
from common.limits import PART_BYTES_MAX, PREDICT_ROWS_MAX
from common.lowrank import AHEAD_PARTS
from common.lowrank import predictor_bytes as fitted_bytes
from common.plan import Needs, Plan, divide, kv_token_bytes, smallest_bytes
from common.store.geometry import DTYPE_BYTES

SPREAD = 1.6  # measured runs lay within the expectation divided and multiplied by it
SPREAD_PUBLISHED = 2.0  # where how much tokens share is not the store's own
WINDOW_MAX = 1024  # tokens; a cache that holds more holds what matters
ROWS = 8  # of the table over memory sizes
GRID = 33  # sizes among which the knee is looked for
KNEE_GAIN_MIN = 0.1  # below it more memory gains nothing worth a knee
TOKENS_COLD = 32  # of an answer from an empty cache


@dataclass(frozen=True)
class Range:
    """An expectation, and what runs are to lie between."""

    expected: float
    low: float
    high: float

    @classmethod
    def around(cls, expected: float, factor: float) -> Range:
        return cls(expected, expected / factor, expected * factor)


@dataclass(frozen=True)
class Speed:
    """What is foretold of a size of cache."""

    window_tokens: int | None  # whose neurons the cache holds; None: it holds all there are
    hit_rate: (
        float  # of what a layer names, as an answer's figures count: look-ahead's reads are in
    )
    cached_rate: float  # of that, what the cache holds from earlier tokens
    bytes_per_token: float
    token: Token  # warm, by cause
    tokens_per_s: Range  # warm: other text was answered before
    tokens_per_s_cold: Range  # the first TOKENS_COLD tokens of an answer from an empty cache
    first_token_s: Range  # after the prompt, warm
    first_token_s_cold: Range
    start_s: float  # until a server is ready


@dataclass(frozen=True)
class Forecast:
    """One size of memory."""

    memory_bytes: int
    fits: bool
    plan: Plan | None
    cache_share: float  # of the FFN
    speed: Speed | None  # None: it does not fit, or the machine is not known

    def as_object(self) -> dict[str, Any]:
        """As JSON has it; the plan by its lines."""
        content = dataclasses.asdict(self)
        if self.plan is not None:
            content["plan"] = {**self.plan.lines(), "slots": sum(self.plan.slots)}
        return content


class Forecaster:
    """Foretells of one model, on one machine, for one length of prompt."""

    def __init__(
        self,
        model: Described,
        behaviour: Behaviour,
        machine: Machine | None,
        context: int,
        prompt: int,
    ) -> None:
        """`context` and `prompt` in tokens. Without a machine, memory alone is foretold."""
        self._model, self._behaviour, self._machine = model, behaviour, machine
        self._prompt = prompt
        fitted = behaviour.fitted and model.store is not None
        self.predictors_bytes = (
            fitted_bytes(model.store) if fitted and model.store else predictor_bytes(model)
        )
        self._needs = Needs(
            geometry=model.geometry, config=model.config, resident_bytes=model.resident_bytes,
            predictors_bytes=self.predictors_bytes, tokenizer_bytes=model.tokenizer_bytes,
            embedding_bytes=model.embedding_bytes,
            named_shares=behaviour.named if fitted else None,
        )  # fmt: skip
        self._settings = Settings(store=Path(model.name), run_dir=Path(), context=context)
        self.smallest_bytes = smallest_bytes(self._settings, self._needs)
        self.largest_bytes = self._largest()

    @property
    def spread(self) -> float:
        """The factor of a range."""
        return SPREAD if self._behaviour.measured else SPREAD_PUBLISHED

    def _largest(self) -> int:
        """Where all of the FFN is cached: more memory changes nothing."""
        plan = divide(dataclasses.replace(self._settings, cache="100%"), self._needs)
        return max(plan.memory_bytes, self.smallest_bytes)

    def at(self, memory_bytes: int) -> Forecast:
        """The forecast for a budget."""
        settings = dataclasses.replace(self._settings, memory=memory_bytes)
        try:
            plan = divide(settings, self._needs)
        except SettingError:
            return Forecast(memory_bytes, False, None, 0.0, None)
        share = plan.cache_bytes / self._model.geometry.ffn_bytes
        speed = None if self._machine is None else self._speed(self._machine, plan)
        return Forecast(memory_bytes, True, plan, share, speed)

    def table(self, asked: int) -> list[Forecast]:
        """Forecasts from the smallest size to the largest, `asked` and the knee among them."""
        sizes = {self.smallest_bytes, self.largest_bytes, asked}
        if (knee := self.knee) is not None:
            sizes.add(knee.memory_bytes)
        for place in range(1, ROWS - 1):
            sizes.add(self._between(place / (ROWS - 1)))
        return [self.at(size) for size in sorted(sizes)]

    @functools.cached_property
    def knee(self) -> Forecast | None:
        """Where more memory begins to gain little: the size whose speed lies furthest above the
        straight line from the smallest to the largest. None where memory gains next to nothing, or
        the machine is not known."""
        if self._machine is None or self.largest_bytes <= self.smallest_bytes:
            return None
        found = [self.at(self._between(place / (GRID - 1))) for place in range(GRID)]
        speeds = [one.speed.tokens_per_s.expected for one in found if one.speed is not None]
        if len(speeds) < GRID or speeds[-1] < speeds[0] * (1 + KNEE_GAIN_MIN):
            return None
        rise = [
            (speed - speeds[0]) / (speeds[-1] - speeds[0]) - place / (GRID - 1)
            for place, speed in enumerate(speeds)
        ]
        best = max(range(GRID), key=lambda place: rise[place])
        return found[best] if rise[best] > 0 else None

    def _between(self, share: float) -> int:
        return self.smallest_bytes + int(share * (self.largest_bytes - self.smallest_bytes))

    def _speed(self, machine: Machine, plan: Plan) -> Speed:
        geometry, prompt = self._model.geometry, self._prompt
        shares = [slots / geometry.neurons for slots in plan.slots]
        work = self._work(self._missed(shares), plan.slots)
        warm = token_ms(machine, geometry, work)
        cold = [token_ms(machine, geometry, self._work(missed, plan.slots)).total
                for missed in self._cold_misses(shares)]  # fmt: skip
        cached = sum(plan.slots) / (geometry.neurons * geometry.layers)
        first = [self._first_token_ms(machine, plan, prompt, held) for held in (cached, 0.0)]
        resident = self._model.resident_bytes + self.predictors_bytes
        around = Range.around
        return Speed(
            window_tokens=self._window(shares),
            hit_rate=1 - work.missed * work.demand_share / max(work.named, 1e-9),
            cached_rate=1 - work.missed / max(work.named, 1e-9),
            bytes_per_token=work.read * geometry.stride_bytes,
            token=warm,
            tokens_per_s=around(1e3 / warm.total, self.spread),
            tokens_per_s_cold=around(1e3 * len(cold) / sum(cold), self.spread),
            first_token_s=around(first[0] / 1e3, self.spread),
            first_token_s_cold=around(first[1] / 1e3, self.spread),
            start_s=machine.start_s + resident / machine.drive.bytes_per_s,
        )

    def _work(self, missed: Sequence[float], slots: Sequence[int]) -> Work:
        """Of a token that misses so many neurons of each layer in a cache of `slots`."""
        model, behaviour, geometry = self._model, self._behaviour, self._model.geometry
        named = sum(behaviour.named) * geometry.neurons
        item_bytes = DTYPE_BYTES[geometry.compute_dtype]
        # Of both predictors' factors, those of the layer itself.
        own = 1 / (1 + (geometry.neurons + AHEAD_PARTS * geometry.hidden)
                   / (geometry.neurons + geometry.hidden))  # fmt: skip
        work = Work(
            multiplied_bytes=computed_bytes(geometry, model.multiplied_bytes),
            context_bytes=self._prompt * kv_token_bytes(model.config, item_bytes),
            named=named,
            fired=sum(behaviour.fired) * geometry.neurons,
            missed=sum(missed),
            cache_by_named=sum(slots) / max(named, 1e-9),
            same_bytes=int(own * self.predictors_bytes),
            extra_parts=0,
        )
        demands = (count * work.demand_share for count in missed)
        extra = sum(map(extra_parts, demands, slots))
        return dataclasses.replace(work, extra_parts=extra)

    def _missed(self, shares: Sequence[float]) -> list[float]:
        """Neurons of each layer that a token names and the cache has not, where a layer has
        `shares` cached."""
        behaviour = self._behaviour
        return [
            self._model.geometry.neurons * behaviour.named[layer] * behaviour.missed(layer, share)
            for layer, share in enumerate(shares)
        ]

    def _cold_misses(self, shares: Sequence[float]) -> Iterator[list[float]]:
        """Misses of each of the first tokens: an empty cache holds what was missed so far. What a
        prompt has streamed through the rest of it is there by chance."""
        behaviour, neurons = self._behaviour, self._model.geometry.neurons
        held = [0.0] * len(shares)
        for _ in range(TOKENS_COLD):
            found = []
            for layer, share in enumerate(shares):
                chance = (share - held[layer]) / max(1 - held[layer], 1e-9)
                new = behaviour.named[layer] * behaviour.missed(layer, held[layer])
                found.append(neurons * new * (1 - chance))
                held[layer] = min(held[layer] + new, share)
            yield found

    @functools.cached_property
    def _unions(self) -> list[float]:
        """Share of the FFN that 0, 1, 2, ... tokens name together, up to WINDOW_MAX."""
        behaviour, layers = self._behaviour, self._model.geometry.layers
        unions = [0.0]
        for _ in range(WINDOW_MAX):
            held = unions[-1]
            new = sum(behaviour.named[n] * behaviour.missed(n, held) for n in range(layers))
            unions.append(min(held + new / layers, 1.0))
        return unions

    def _window(self, shares: Sequence[float]) -> int | None:
        """Tokens that a cache remembers: as many as it takes to fill it."""
        most = sum(shares) / len(shares)
        if self._unions[-1] < most:
            return None
        return max(0, bisect.bisect_right(self._unions, most) - 1)

    def _first_token_ms(self, machine: Machine, plan: Plan, prompt: int, cached: float) -> float:
        geometry = self._model.geometry
        resident = computed_bytes(geometry, self._model.multiplied_bytes)
        if prompt <= PREDICT_ROWS_MAX:  # predicted; of a longer one layers are streamed whole
            touched, parts = self._unions[prompt], geometry.layers
        else:
            touched, parts = 1.0, sum(self._parts(slots) for slots in plan.slots)
        tokens = prompt, plan.block
        return prompt_ms(machine, geometry, resident, *tokens, touched, cached, parts)

    def _parts(self, slots: int) -> int:
        """Parts in which a layer is streamed through so many slots: one lands while another is
        multiplied."""
        geometry = self._model.geometry
        part = max(1, PART_BYTES_MAX // geometry.stride_bytes)
        if slots < geometry.neurons:
            part = max(1, min(part, slots // 2))
        return -(-geometry.neurons // part)
