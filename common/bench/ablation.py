"""The ablation: from the whole model read for every token to all that inflash does, a step at a
time. Each step keeps what the steps before it brought.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.bench import contenders
from common.bench.contenders import Contender, Run, Work
from common.bench.figures import Figures, summarise, summarise_inflash
from common.limits import ALIGN_BYTES
from common.store.geometry import Geometry

STEPS_CHOOSE = ("predictor", "policy", "window", "slots", "extras", "bundling", "lookahead")
ROUNDS_MIN = 3
TINY_CACHE = "2%"  # of the FFN: room for reads on their way, and nothing stays
NOTHING_STAYS = {"cache": TINY_CACHE, "window": "0"}


@dataclass(frozen=True)
class Step:
    """One step: what it changes, and how a server is told so."""

    name: str
    change: str
    settings: dict[str, str] | None  # None: no server, the whole model read for every token
    slow: bool = False  # it reads the whole FFN for a token: fewer tokens tell as much
    placed: bool = False  # on the store whose neurons were placed by a trace
    absent: str = ""  # why it cannot be measured


def make_steps(geometry: Geometry, placed: Path | None) -> list[Step]:
    """The steps in their order. `placed`: a store of the same model made with
    `convert --placement`, or None."""
    apart = cannot_read_apart(geometry)
    bundling = {} if apart else {"bundling": "off"}
    plain = {"lookahead": "off", "extras": "none"} | bundling
    window = {"predictor": "lowrank", "policy": "window"}
    return [
        Step("none", "the whole model is read for every token", None, slow=True),
        Step(
            "hybrid", "attention and embeddings stay in memory, the FFN is read for every token",
            # Whole layers are sequential reads: apart, they would be slow for no reason.
            NOTHING_STAYS | {"predictor": "all", "lookahead": "off", "extras": "none"},
            slow=True,
        ),
        Step(
            "predictor", "only the neurons that a predictor names are read",
            NOTHING_STAYS | plain | {"predictor": "lowrank"},
        ),
        Step("window", "neurons of the last tokens stay, as many as fit", window | plain),
        Step(
            "bundling", "a neuron's rows and columns are one read",
            window | plain | {"bundling": "on"}, absent=apart,
        ),
        Step(
            "look-ahead", "the next layer is read under this one's work",
            window | {"lookahead": "on", "bundling": "on"},
        ),
        Step(
            "decay", "the neurons stay that are used most, not those used last",
            {"predictor": "lowrank", "policy": "decay", "lookahead": "on"},
        ),
        Step(
            "placement", "neurons that fire together lie side by side",
            {"predictor": "lowrank", "policy": "decay", "lookahead": "on"},
            placed=True,
            absent="" if placed else "no store with --placement was given",
        ),
    ]  # fmt: skip


def cannot_read_apart(geometry: Geometry) -> str:
    """Why the parts of such a bundle cannot be reads of their own; "" if they can."""
    if geometry.stride_bytes % (len(geometry.parts) * ALIGN_BYTES) == 0:
        return ""
    return (
        f"a bundle of {geometry.stride_bytes:,} bytes has no {len(geometry.parts)} parts of whole"
        f" multiples of {ALIGN_BYTES:,}, which direct reads need; all steps read whole bundles"
    )


def make_contenders(
    steps: Sequence[Step],
    stores: tuple[Path, Path | None],
    work: Work,
    slow_work: Work,
    base: Mapping[str, str],
    cap_bytes: int,
) -> list[Contender]:
    """The contenders of the steps that can be measured, named as the steps.

    Args:
        stores: the store, and the one that was placed.
        slow_work: for steps that read everything for a token.
        base: a server's settings beside those that steps choose.
    """
    store, placed = stores
    found = []
    for step in steps:
        if step.absent:
            continue
        asked = slow_work if step.slow else work
        if step.settings is None:
            found.append(contenders.whole(step.name, store, asked, cap_bytes))
            continue
        where = placed if step.placed and placed else store
        settings = settings_of(step, base)
        found.append(contenders.inflash(step.name, where, asked, settings, cap_bytes, prompts=2))
    return found


def settings_of(step: Step, base: Mapping[str, str]) -> dict[str, str]:
    """A step's settings: its own, and those of `base` that steps do not choose."""
    kept = {key: value for key, value in base.items() if key not in STEPS_CHOOSE}
    return kept | (step.settings or {})


def make_rows(steps: Sequence[Step], runs: Mapping[str, Sequence[Run]]) -> list[Figures]:
    """A row for each step: its figures, and what it gained over the last step that was measured."""
    rows: list[Figures] = []
    before: Figures | None = None
    for step in steps:
        row: Figures = {"step": step.name, "change": step.change, "settings": step.settings}
        rows.append(row)
        if step.absent:
            row["absent"] = step.absent
            continue
        sum_up = summarise if step.settings is None else summarise_inflash
        figures = sum_up(runs.get(step.name, ()))
        if "failed" in figures:
            row["failed"] = figures["failed"]
            continue
        row |= {key: figures.get(key) for key in _FIELDS}
        if before is not None:
            row["gain"] = before["ms_per_token"] / row["ms_per_token"]
            row["verdict"] = verdict(before, row)
        before = row
    return rows


_FIELDS = (
    "ms_per_token", "round_ms", "spread_ms", "peak_bytes", "bytes_per_token", "read_ms",
    "bytes_per_s_while_reading", "stall_ms", "hit_rate", "cache_share",
)  # fmt: skip


def verdict(before: Figures, now: Figures) -> str:
    """Whether a step helped: "helps" and "slower" where every round says so. Fewer rounds than
    ROUNDS_MIN may have met two states of the machine: then the quartiles must not meet, either."""
    rounds = list(zip(before["round_ms"], now["round_ms"], strict=True))
    (low, high), (low_before, high_before) = (
        figures["spread_ms"]["quartiles"] for figures in (now, before)
    )
    enough = len(rounds) >= ROUNDS_MIN
    if all(after < first for first, after in rounds) and (enough or high < low_before):
        return "helps"
    if all(after > first for first, after in rounds) and (enough or low > high_before):
        return "slower"
    return "within the spread"
