"""The plan adds up, and what cannot run is refused with the smallest budget that would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from common.config import Settings
from common.errors import SettingError
from common.plan import make_plan


def settings(store: Any, **values: Any) -> Settings:
    return Settings(store=store.path, run_dir=Path("/r"), **values)


def test_the_parts_add_up(store_of: Any) -> None:
    store = store_of("llama-gqa", "float16")
    plan = make_plan(settings(store, memory=2 * 10**9), store)
    parts = (
        plan.resident_bytes + plan.kv_bytes + plan.predictor_bytes + plan.process_bytes
    ) + plan.cache_bytes
    assert parts == plan.memory_bytes <= 2 * 10**9
    assert plan.cache_bytes == store.geometry.ffn_bytes  # no more than there is


def test_a_cache_share_is_taken_of_every_layer(store_of: Any) -> None:
    store = store_of("opt", "float32")
    plan = make_plan(settings(store, cache="25%"), store)
    assert plan.slots == (store.geometry.neurons // 4,) * store.geometry.layers


def test_grouped_heads_need_less_kv(store_of: Any) -> None:
    whole, grouped = store_of("llama-relu", "float32"), store_of("llama-gqa", "float32")
    sizes = [make_plan(settings(s, cache="50%"), s).kv_bytes for s in (whole, grouped)]
    assert sizes[0] == 2 * sizes[1]


def test_the_smallest_budget_that_is_named_works(store_of: Any) -> None:
    store = store_of("opt", "float32")
    with pytest.raises(SettingError, match="INFLASH_MEMORY") as refusal:
        make_plan(settings(store, memory=1000), store)
    smallest = int(re.findall(r"[\d,]+(?= bytes$)", str(refusal.value))[-1].replace(",", ""))
    assert make_plan(settings(store, memory=smallest), store).memory_bytes == smallest
    with pytest.raises(SettingError):
        make_plan(settings(store, memory=smallest - 1), store)


def test_a_cache_beyond_the_budget_is_refused(store_of: Any) -> None:
    store = store_of("opt", "float32")
    budget = make_plan(settings(store, cache="2%"), store).memory_bytes
    with pytest.raises(SettingError, match="are more than"):
        make_plan(settings(store, memory=budget, cache="100%"), store)
