"""Reads planned from ids and slots."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.limits import READ_BUNDLES_MAX, READ_BYTES_MAX
from services.reader.reads import plan_reads


def as_tuples(ids: list[int], stride: int = 4096) -> list[tuple[int, int, list[int]]]:
    """(offset, length, slots) of the reads of `ids` into slots 100, 101, ..."""
    slots = 100 + np.arange(len(ids), dtype=np.int64)
    reads = plan_reads(np.array(ids, np.int64), slots, stride)
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
