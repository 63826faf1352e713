"""Divides the memory budget: resident weights, KV cache, predictor, processes; the cache gets the
rest. Every service makes the same plan from the same settings and store.

All sizes in bytes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Settings, cache_bytes
from common.errors import SettingError
from common.store.geometry import DTYPE_BYTES, Geometry
from common.store.store import Store

# What a process takes before it holds weights: measured proportional set sizes, rounded up.
PROCESS_BYTES = {
    "serve": 50 << 20,
    "gateway": 50 << 20,
    "compute": 350 << 20,
    "predictor": 50 << 20,
    "reader": 50 << 20,
}
SLOTS_MIN = 2  # per layer: one is multiplied while the next lands


@dataclass(frozen=True)
class Plan:
    memory_bytes: int  # the sum of all that follows
    resident_bytes: int
    kv_bytes: int
    predictor_bytes: int
    process_bytes: int
    cache_bytes: int
    context: int  # tokens
    slots: tuple[int, ...]  # per layer


def make_plan(settings: Settings, store: Store) -> Plan:
    """The plan for `store` under `settings`; `SettingError` names the smallest that would work."""
    config = json.loads((store.config_dir / "config.json").read_text(encoding="utf-8"))
    context = min(settings.context, int(config["max_position_embeddings"]))
    geometry = store.geometry
    computed_bytes = DTYPE_BYTES[geometry.compute_dtype]
    fixed = {
        "resident_bytes": store.resident_bytes * computed_bytes // geometry.item_bytes,
        "kv_bytes": context * kv_token_bytes(config, computed_bytes),
        "predictor_bytes": predictor_bytes(settings.predictor, geometry),
        "process_bytes": sum(PROCESS_BYTES.values()),
    }
    slots = _slots_per_layer(settings, geometry, sum(fixed.values()))
    cache = sum(slots) * geometry.stride_bytes
    return Plan(
        memory_bytes=sum(fixed.values()) + cache, cache_bytes=cache, context=context, slots=slots,
        **fixed,
    )  # fmt: skip


def kv_token_bytes(config: dict[str, Any], item_bytes: int) -> int:
    """Bytes of keys and values of one token, all layers; `config` is the model's config.json."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return int(2 * config["num_hidden_layers"] * kv_heads * head_dim * item_bytes)


def predictor_bytes(predictor: str, geometry: Geometry) -> int:
    """Weights that the predictor holds: for `exact` the first part of every bundle, as float32."""
    if predictor == "exact":
        return geometry.layers * geometry.neurons * geometry.hidden * 4
    return 0


def _slots_per_layer(settings: Settings, geometry: Geometry, fixed_bytes: int) -> tuple[int, ...]:
    slot_bytes = geometry.layers * geometry.stride_bytes  # one slot in every layer
    budget = settings.memory if settings.memory is not None else machine_bytes() // 2
    room = budget - fixed_bytes
    if settings.cache is not None:
        wanted = cache_bytes(settings.cache, geometry.ffn_bytes)
        if settings.memory is not None and wanted > room:
            raise SettingError(
                f"INFLASH_CACHE: {wanted:,} bytes are more than the {max(room, 0):,} that"
                f" INFLASH_MEMORY={budget:,} leaves; the smallest that works is"
                f" {fixed_bytes + wanted:,} bytes"
            )
        room = wanted
    slots = min(room // slot_bytes, geometry.neurons)
    if slots < min(SLOTS_MIN, geometry.neurons):
        smallest = SLOTS_MIN * slot_bytes
        if settings.cache is not None:
            raise SettingError(
                f"INFLASH_CACHE: {settings.cache} is too small; the smallest cache that works is"
                f" {smallest:,} bytes"
            )
        raise SettingError(
            f"INFLASH_MEMORY: {budget:,} bytes are too few; the smallest budget that works is"
            f" {fixed_bytes + smallest:,} bytes"
        )
    return (slots,) * geometry.layers


def machine_bytes() -> int:
    """Memory that this machine has, or the container (the root of the cgroups that we see)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no cgroup, or "max"
            continue
    return total
