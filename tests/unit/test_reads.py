"""Reads planned from ids and slots."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.limits import READ_BUNDLES_MAX, READ_BYTES_MAX
from services.reader.reads import plan_reads


def as_tuples(ids: list[int], stride: int = 4096) -> list[tuple[int, int, list[int]]]:
    """(offset, length, slots) of the reads of `ids` into slots 100, 101, ..."""
    slots = 100 + np.arange(len(ids), dtype=np.int32)
    reads = plan_reads(np.array(ids, np.int32), slots, stride)
    return [
        (int(o), int(n), reads.slots[a:b].tolist())
        for o, n, a, b in zip(
            reads.offsets, reads.lengths, reads.firsts, reads.firsts[1:], strict=False
        )
    ]


def test_lone_bundles_are_a_read_each():
    assert as_tuples([1, 3]) == [(4096, 4096, [100]), (12288, 4096, [101])]


def test_neighbours_are_one_read():
    assert as_tuples([1, 2, 3, 9]) == [(4096, 12288, [100, 101, 102]), (36864, 4096, [103])]


def test_no_ids_no_reads():
    assert as_tuples([]) == []


def test_a_run_is_cut_at_the_most_bundles_and_at_the_most_bytes():
    assert [len(s) for _, _, s in as_tuples(list(range(600)))] == [256, 256, 88]
    assert [n for _, n, _ in as_tuples(list(range(300)), 16384)] == [1 << 20] * 4 + [44 * 16384]


def test_a_bundle_larger_than_a_read_may_be_is_one_read():
    assert [n for _, n, _ in as_tuples([0, 1], 2 * READ_BYTES_MAX)] == [2 * READ_BYTES_MAX] * 2


def test_offsets_beyond_two_gigabytes():
    assert as_tuples([1 << 20], 1 << 16)[0][0] == 1 << 36


@given(st.sets(st.integers(0, 3000)).map(sorted), st.sampled_from([4096, 8192, 1 << 18, 3 * 4096]))
def test_every_bundle_is_read_once_into_its_slot(ids: list[int], stride: int) -> None:
    reads = as_tuples(ids, stride)
    found = [
        (offset // stride + i, slot)
        for offset, _, slots in reads
        for i, slot in enumerate(slots)
    ]  # fmt: skip
    assert found == [(neuron, 100 + i) for i, neuron in enumerate(ids)]
    for offset, length, slots in reads:
        assert offset % stride == 0
        assert length == len(slots) * stride <= max(READ_BYTES_MAX, stride)
        assert len(slots) <= READ_BUNDLES_MAX
    for (offset, length, _), (following, _, _) in itertools.pairwise(reads):
        full = length + stride > READ_BYTES_MAX or length == READ_BUNDLES_MAX * stride
        assert offset + length < following or full, "neighbours are merged"


SINK = 7


def spans(ids: list[int], gap: int, stride: int = 4096) -> list[list[int]]:
    """What lies in each read, bundle by bundle: a slot, or the sink."""
    slots = 100 + np.arange(len(ids), dtype=np.int32)
    reads = plan_reads(np.array(ids, np.int32), slots, stride, gap, SINK)
    return [a.tolist() for a in np.split(reads.slots, reads.firsts[1:-1])] if len(reads) else []


def test_a_gap_is_read_over_into_the_sink() -> None:
    assert spans([1, 3, 4, 7], 1) == [[100, SINK, 101, 102], [103]]
    assert spans([1, 3, 4, 7], 2) == [[100, SINK, 101, 102, SINK, SINK, 103]]
    assert spans([1, 3, 4, 7], 0) == [[100], [101, 102], [103]]


def test_bytes_of_gaps_are_counted_apart() -> None:
    ids, slots = np.array([5, 7, 20, 22, 24], np.int32), np.arange(5, dtype=np.int32)
    reads = plan_reads(ids, slots, 8192, 1, SINK)
    assert reads.gap_bytes == 3 * 8192
    assert reads.lengths.tolist() == [3 * 8192, 5 * 8192]
    assert reads.offsets.tolist() == [5 * 8192, 20 * 8192]
    assert plan_reads(ids, slots, 8192).gap_bytes == 0


def test_a_gap_needs_a_sink() -> None:
    ids = np.array([1, 3], np.int32)
    with pytest.raises(ValueError, match="no sink"):
        plan_reads(ids, ids, 4096, 1)
    assert len(plan_reads(ids, ids, 4096, 0)) == 2


@given(
    st.sets(st.integers(0, 700)).map(sorted),
    st.integers(0, 5),
    st.sampled_from([4096, 1 << 18, READ_BYTES_MAX, 2 * READ_BYTES_MAX]),
)
def test_with_gaps_every_bundle_still_lands_in_its_slot(
    ids: list[int], gap: int, stride: int
) -> None:
    slots = 100 + np.arange(len(ids), dtype=np.int32)
    reads = plan_reads(np.array(ids, np.int32), slots, stride, gap, SINK)
    bundles_max = max(1, min(READ_BUNDLES_MAX, READ_BYTES_MAX // stride))
    found, sunk = {}, 0
    for i in range(len(reads)):
        targets = reads.slots[reads.firsts[i] : reads.firsts[i + 1]].tolist()
        assert len(targets) <= bundles_max
        assert SINK not in (targets[0], targets[-1]), "a read begins and ends with what was asked"
        runs = itertools.groupby(targets, SINK.__ne__)
        assert max((len(list(run)) for asked, run in runs if not asked), default=0) <= gap
        first = int(reads.offsets[i]) // stride
        found |= {first + j: slot for j, slot in enumerate(targets) if slot != SINK}
        sunk += targets.count(SINK)
    assert found == {neuron: 100 + i for i, neuron in enumerate(ids)}
    assert sunk * stride == reads.gap_bytes
    # What is near enough is one read, unless all that is near makes more than one.
    far = [i for i, (one, other) in enumerate(itertools.pairwise(ids), 1) if other - one > gap + 1]
    runs = [ids[a:b] for a, b in itertools.pairwise([0, *far, len(ids)])] if ids else []
    short = [run[0] * stride for run in runs if run[-1] - run[0] < bundles_max]
    pieces = sum(-(-(run[-1] - run[0] + 1) // bundles_max) for run in runs)
    assert set(short) <= set(reads.offsets.tolist())
    assert len(reads) <= pieces
