"""The floors: what a token touches, what the drive gives for its reads, what overlap saved."""

from __future__ import annotations

import math

import pytest
from transformers import AutoModelForCausalLM

from common.bench.floors import (
    drive_bytes_per_s,
    make_floors,
    overlap_efficiency,
    touched,
)
from common.bench.memory import matrices_bytes
from common.limits import READS_IN_FLIGHT_MAX
from common.probes import measure_drive, measure_memory
from common.store.store import Store
from tests.conftest import Made

POINTS = [
    {"read_bytes": 4096, "depth": 1, "bytes_per_s": 1e8},
    {"read_bytes": 4096, "depth": 128, "bytes_per_s": 1e9},
    {"read_bytes": 8192, "depth": 128, "bytes_per_s": 2e9},
    {"read_bytes": 16384, "depth": 128, "bytes_per_s": 3e9},
]


def weights_of(made: Made, variant: str, without: tuple[str, ...]) -> int:
    """Bytes of a checkpoint's parameters outside of the FFN and of `without`, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(made.checkpoint(variant, "float16"))
    skipped = (*without, "fc1.weight", "fc2.weight", "gate_proj", "up_proj", "down_proj")
    skipped += ("fc1.bias", "fc2.bias")  # a number for a neuron: of no account
    named = model.named_parameters(remove_duplicate=True)
    return 2 * sum(p.numel() for name, p in named if not any(part in name for part in skipped))


@pytest.mark.parametrize(
    ("variant", "without"),
    [
        ("opt", ("embed_positions",)),  # tied: the tokens' embedding is the head
        ("opt-untied", ("embed_positions", "embed_tokens")),
        ("llama-relu", ("embed_tokens",)),
    ],
)
def test_resident_bytes_are_those_that_are_multiplied(
    made: Made, variant: str, without: tuple[str, ...]
) -> None:
    store = made.store(variant, "float16")
    assert touched(store, 0, 0, 0).resident == weights_of(made, variant, without)


def test_neurons_and_context_are_counted_in_rows(made: Made) -> None:
    plain, gated = made.store("opt", "float16"), made.store("llama-relu", "float16")
    row = 64 * 2
    assert touched(plain, 10, 4, 0).ffn == (10 + 4) * row
    assert touched(gated, 10, 4, 0).ffn == (10 + 2 * 4) * row
    assert touched(plain, 0, 0, 5).kv == 5 * 3 * 2 * 64 * 2


def test_the_drives_speed_is_that_of_the_reads_that_were_made() -> None:
    assert drive_bytes_per_s(POINTS, 4096) == pytest.approx(1e9)
    mixed = 5120 / (0.75 * 4096 / 1e9 + 0.25 * 8192 / 2e9)
    assert drive_bytes_per_s(POINTS, 5120) == pytest.approx(mixed), "a quarter of them are larger"
    assert drive_bytes_per_s(POINTS, 1 << 20) == pytest.approx(3e9)
    assert drive_bytes_per_s(POINTS, 100) == pytest.approx(1e9), "no read is smaller"
    slower = [*POINTS, {"read_bytes": 8192, "depth": 256, "bytes_per_s": 0.5e9}]
    assert drive_bytes_per_s(slower, 8192) == pytest.approx(2e9), "a floor takes the best depth"


def test_floors_are_bytes_over_speed(made: Made) -> None:
    store = made.store("opt", "float16")
    figures = {"bytes_per_read": 4096.0, "bytes_per_token": 2e6, "own_bytes_per_token": 1e6,
               "named_per_token": 10.0, "fired_per_token": 4.0, "context_tokens": 5.0}  # fmt: skip
    drive = {"stride_bytes": 4096, "points": POINTS}
    memory = {"bytes_per_s": 1e9, "way": "mv of float16"}
    floors = make_floors(store, figures, drive, memory)
    total = touched(store, 10, 4, 5).total
    assert floors["read_ms"] == pytest.approx(2.0)
    assert floors["compute_ms"] == pytest.approx(total / 1e6)
    assert floors["touched_bytes_per_token"]["total"] == total
    uncounted = figures | {"bytes_per_token": None, "bytes_per_read": None}
    assert make_floors(store, uncounted, drive, memory)["read_ms"] == pytest.approx(1.0)


def test_overlap_efficiency() -> None:
    floors = {"read_ms": 40.0, "compute_ms": 60.0}
    assert overlap_efficiency(100.0, 60.0, floors) == 1.0
    assert overlap_efficiency(100.0, 100.0, floors) == 0.0
    assert overlap_efficiency(100.0, 80.0, floors) == 0.5
    assert overlap_efficiency(100.0, 110.0, floors) == -0.25, "worse than in turn"
    assert overlap_efficiency(60.0, 50.0, floors) is None


def test_matrices_are_beyond_the_cache_and_within_memory() -> None:
    assert matrices_bytes(480 << 20, 64 << 30) == 4 * (480 << 20)
    assert matrices_bytes(None, 64 << 30) == 1 << 30
    assert matrices_bytes(480 << 20, 2 << 30) == (2 << 30) // 4


def test_memory_is_measured_in_every_format() -> None:
    found = measure_memory("--bytes", f"{16 << 20}")
    assert set(found["ways"]) == {"mv of float16", "mv of bfloat16", "mv of float32"}
    assert found["bytes_per_s"] == max(found["ways"].values()) == found["ways"][found["way"]]
    assert math.isfinite(found["bytes_per_s"])
    assert found["bytes_per_s"] > 0


def test_the_drive_is_measured_over_sizes_and_depths(made: Made) -> None:
    store: Store = made.store("opt", "float16")
    found = measure_drive(store.path, "--seconds", "0.005")
    stride = store.geometry.stride_bytes
    assert found["stride_bytes"] == stride
    pairs = {(point["read_bytes"], point["depth"]) for point in found["points"]}
    sizes = {size for size, _ in pairs}
    assert sizes == {stride * 2**power for power in range(9)}, "256 neurons: up to a whole layer"
    assert len(pairs) == len(found["points"])
    assert (stride, READS_IN_FLIGHT_MAX) in pairs or (stride, 16) in pairs
    assert all(point["bytes_per_s"] > 0 for point in found["points"])
