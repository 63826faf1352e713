"""Divides the memory budget into named lines that add up; the cache gets what the others leave.
Every service makes the same plan from the same settings and store.

    resident + kv + predictors + workspace      what the model takes
    serve + gateway + compute + predictor + reader + libraries + kernel     what the processes take
    reserve                                     room that services/reader/pressure.py keeps free
    cache                                       the rest

Refuses a budget that cannot hold all but the cache and its fewest slots, and names the smallest
that can. All sizes in bytes. docs/measurements.md has the figures that the constants round up.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from common import lowrank
from common.cgroup import machine_bytes
from common.config import Settings, cache_bytes
from common.errors import SettingError
from common.limits import (
    KV_ROOM_TOKENS,
    PART_BUNDLES_MIN,
    PART_BYTES_MAX,
    PARTS_IN_FLIGHT_MAX,
    PREFILL_ROWS_MAX,
    PREFILL_ROWS_MIN,
    RUNNING_MAX,
)
from common.policy import slots_by_use
from common.resident import resident_bytes, spare_embedding_bytes
from common.store.geometry import DTYPE_BYTES, Geometry
from common.store.manifest import BIASES
from common.store.store import Store
from common.store.tensors import read_header

# What each process holds of its own before it holds weights (anonymous memory, rounded up).
PROCESS_BYTES = {
    "serve": 32 << 20,
    "gateway": 40 << 20,
    "compute": 320 << 20,
    "predictor": 88 << 20,
    "reader": 36 << 20,
}
# Pages of Python's, torch's and numba's shared objects that are mapped; all processes share them.
LIBRARIES_BYTES = 160 << 20
# Sockets, inodes and other objects that the kernel charges to whoever made it keep them.
KERNEL_BYTES = 24 << 20
PAGE_BYTES_PER_TABLE_BYTE = 512  # a page table has 8 bytes for 4,096 bytes of memory
CACHE_MAPPINGS = 2  # reader and compute: each has page tables of its own for the cache
TOKENIZER_FACTOR = 12  # bytes in the gateway for a byte of tokenizer.json
READER_NEURON_BYTES = 64  # of index, keys, checksums: arrays with an entry for every neuron
# malloc keeps what a block of a prompt frees: this much was held for each byte in use at once.
WORKSPACE_HELD = 2
WORKSPACE_SHARE = 16  # of the budget a block of a prompt may have 1/16, or it is made smaller
BLOCK_CACHE_SHARE = 3 / 4  # and it leaves so much of the cache that the smallest block would
LOGITS_COPIES = 8  # float32 vectors over the vocabulary while a token is chosen
LOGITS_SHARED = 2 * (RUNNING_MAX - 1)  # and those of the other requests in the step
STREAM_COPIES = 6  # float32 blocks [rows, hidden] at once: input, its copy, sum, residual, norms
RESERVE_BYTES_MIN = 32 << 20
RESERVE_SHARE = 64  # 1/64 of the budget, if that is more
SLOTS_MIN = 2  # per layer: one is multiplied while the next lands


@dataclass(frozen=True)
class Plan:
    """`memory_bytes` is the sum of the other fields that end in _bytes."""

    memory_bytes: int
    resident_bytes: int
    kv_bytes: int
    predictors_bytes: int  # weights; the process itself is predictor_bytes
    workspace_bytes: int
    serve_bytes: int
    gateway_bytes: int
    compute_bytes: int
    predictor_bytes: int
    reader_bytes: int
    libraries_bytes: int
    kernel_bytes: int
    reserve_bytes: int
    cache_bytes: int
    cache_bytes_min: int  # of which a cache that shrinks keeps so much
    context: int  # tokens of prompt and answer of one request, at most
    kv_tokens: int  # room in the KV cache, for all requests that run
    block: int  # tokens of a prompt in one step, at most
    slots: tuple[int, ...]  # per layer
    embedding: str  # where it is: memory, as one of the resident tensors; or flash

    def lines(self) -> dict[str, int]:
        """The plan's lines in order, by name; together they are `memory_bytes`."""
        sizes = {k.removesuffix("_bytes"): v for k, v in asdict(self).items() if _is_line(k)}
        assert sum(sizes.values()) == self.memory_bytes
        return sizes


def _is_line(field: str) -> bool:
    return field.endswith("_bytes") and field != "memory_bytes"


@dataclass(frozen=True)
class Needs:
    """What a plan has to know of a model: of a store, or of one that is not made yet."""

    geometry: Geometry
    config: Mapping[str, Any]  # config.json
    resident_bytes: int  # in the checkpoint's number format
    predictors_bytes: int  # as the predictor holds them
    tokenizer_bytes: int  # of tokenizer.json
    named_shares: tuple[float, ...] | None  # of a layer's neurons, that its predictor names
    packed_bytes: int | None = None  # resident, where the setting `resident` has them packed
    embedding_bytes: int = 0  # of resident_bytes, what can stay on flash

    def without_embedding(self) -> Needs:
        """The same with the embedding on flash."""
        geometry, packed = self.geometry, self.packed_bytes
        if packed is not None:
            packed -= _computed_bytes(geometry, self.embedding_bytes)
        rest = self.resident_bytes - self.embedding_bytes
        return replace(self, resident_bytes=rest, packed_bytes=packed, embedding_bytes=0)


def make_plan(settings: Settings, store: Store) -> Plan:
    """The plan for `store` under `settings`; `SettingError` names the smallest that would work."""
    return divide(settings, needs_of(settings, store))


def needs_of(settings: Settings, store: Store) -> Needs:
    """What a store needs under `settings`; `SettingError` if it has not what they ask for."""
    asked = lowrank.named_shares(store)
    sizes = {name: tensor.nbytes for name, tensor in store.resident_tensors().items()}
    if settings.slots == "use" and asked is None:
        raise SettingError(
            f"INFLASH_SLOTS: use, but {store.path} has no fitted predictors: run"
            f" `inflash fit {store.path}`, or choose equal"
        )
    return Needs(
        geometry=store.geometry,
        config=json.loads((store.config_dir / "config.json").read_text(encoding="utf-8")),
        resident_bytes=store.resident_bytes,
        predictors_bytes=_predictors_bytes(resolve_predictor(settings, store), store),
        tokenizer_bytes=_tokenizer_bytes(store),
        named_shares=None if asked is None else tuple(asked),
        packed_bytes=_packed_bytes(settings.resident, store),
        embedding_bytes=spare_embedding_bytes(sizes, settings.resident),
    )


def divide(settings: Settings, needs: Needs) -> Plan:
    """The plan for a model with such `needs`; `SettingError` names the smallest that would work."""
    if settings.embedding == "flash" and not needs.embedding_bytes:
        raise SettingError(
            "INFLASH_EMBEDDING: flash, but this model's embedding is its head as well, which every"
            " token multiplies: leave the setting out, or pack the head (INFLASH_RESIDENT=int8)"
        )
    if settings.embedding == "memory" or not needs.embedding_bytes:
        return _with_best_block(settings, needs)
    if settings.embedding == "auto":
        with contextlib.suppress(SettingError):
            plan = _with_best_block(settings, needs)
            if min(plan.slots) == needs.geometry.neurons:  # no neuron could have its room
                return plan
    return replace(_with_best_block(settings, needs.without_embedding()), embedding="flash")


def _with_best_block(settings: Settings, needs: Needs) -> Plan:
    *larger, smallest = _blocks(settings, needs)
    plan = _divide(settings, needs, smallest)
    for block in larger:
        with contextlib.suppress(SettingError):
            found = _divide(settings, needs, block)
            if found.cache_bytes >= plan.cache_bytes * BLOCK_CACHE_SHARE:
                return found
    return plan


def _blocks(settings: Settings, needs: Needs) -> list[int]:
    """Sizes of a prompt's block, the best first.

    A larger one reads the FFN less often. But from so many tokens on as the machine makes
    operations while the drive gives a byte, 70 to some hundreds, reads are under products anyway.
    """
    context = _context(settings, needs)
    if settings.block is not None:
        return [min(settings.block, context)]
    budget = settings.memory if settings.memory is not None else machine_bytes() // 2
    sizes, size = [], PREFILL_ROWS_MAX
    while size > PREFILL_ROWS_MIN:
        if _workspace_bytes(needs, context, size) * WORKSPACE_SHARE <= budget:
            sizes.append(size)
        size //= 2
    return [min(size, context) for size in (*sizes, PREFILL_ROWS_MIN)]


def _context(settings: Settings, needs: Needs) -> int:
    return min(settings.context, int(needs.config["max_position_embeddings"]))


def _divide(settings: Settings, needs: Needs, block: int) -> Plan:
    geometry, context = needs.geometry, _context(settings, needs)
    fixed = _fixed_lines(settings, needs, block)
    each = _slots_per_layer(settings, geometry, sum(fixed.values()))
    slots = _share(each, settings.slots, needs)
    cache = sum(slots) * geometry.stride_bytes
    fixed["kernel_bytes"] += _cache_tables(cache)
    taken = sum(fixed.values()) + cache
    reserve = _reserve(taken)
    return Plan(
        memory_bytes=taken + reserve,
        **fixed,
        reserve_bytes=reserve,
        cache_bytes=cache,
        cache_bytes_min=min(cache, _slots_min(geometry) * geometry.layers * geometry.stride_bytes),
        context=context,
        kv_tokens=settings.sequences * kv_room(context),
        block=block,
        slots=slots,
        embedding="memory",
    )


def smallest_bytes(settings: Settings, needs: Needs) -> int:
    """The smallest budget that works; `settings` without one, and without a cache."""
    block = _blocks(settings, needs)[-1]
    geometry = needs.geometry
    if settings.embedding != "memory":
        needs = needs.without_embedding()
    layer_slot = geometry.layers * geometry.stride_bytes
    taken = sum(_fixed_lines(settings, needs, block).values())
    taken += _slots_min(geometry) * (layer_slot + _cache_tables(layer_slot))
    # A plan takes the reserve from the budget, which is the larger.
    return max(taken + _reserve(taken), -(-taken * RESERVE_SHARE // (RESERVE_SHARE - 1)))


def resolve_predictor(settings: Settings, store: Store) -> str:
    """The predictor that `settings` mean for `store`: all, exact or lowrank. `SettingError` if the
    store has not what was asked for."""
    if settings.predictor == "auto":
        return "lowrank" if lowrank.has_predictors(store) else "exact"
    if settings.predictor == "lowrank" and not lowrank.has_predictors(store):
        raise SettingError(
            f"INFLASH_PREDICTOR: lowrank, but {store.path} has no {lowrank.PREDICTORS}: run"
            f" `inflash fit {store.path}`, or choose exact"
        )
    return settings.predictor


def kv_room(tokens: int) -> int:
    """Tokens of room in the KV cache that a sequence of `tokens` takes."""
    return -(-tokens // KV_ROOM_TOKENS) * KV_ROOM_TOKENS


def kv_token_bytes(config: Mapping[str, Any], item_bytes: int) -> int:
    """Bytes of keys and values of one token, all layers; `config` is the model's config.json."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return int(2 * config["num_hidden_layers"] * kv_heads * _head_width(config) * item_bytes)


def _head_width(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _fixed_lines(settings: Settings, needs: Needs, block: int) -> dict[str, int]:
    """Every line but the cache and the reserve; the kernel's without its share for the cache."""
    geometry, context = needs.geometry, _context(settings, needs)
    kv_tokens = settings.sequences * kv_room(context)
    computed_bytes = DTYPE_BYTES[geometry.compute_dtype]
    resident = needs.packed_bytes
    if resident is None:
        resident = _computed_bytes(geometry, needs.resident_bytes)
    lines = {
        "resident_bytes": resident,
        "kv_bytes": kv_tokens * kv_token_bytes(needs.config, computed_bytes),
        "predictors_bytes": needs.predictors_bytes,
        "workspace_bytes": _workspace_bytes(needs, context, block),
    }
    kernel = KERNEL_BYTES + sum(lines.values()) // PAGE_BYTES_PER_TABLE_BYTE
    lines |= {f"{name}_bytes": size for name, size in PROCESS_BYTES.items()}
    lines["gateway_bytes"] += TOKENIZER_FACTOR * needs.tokenizer_bytes
    lines["reader_bytes"] += READER_NEURON_BYTES * geometry.layers * geometry.neurons
    return lines | {"libraries_bytes": LIBRARIES_BYTES, "kernel_bytes": kernel}


def _packed_bytes(resident: str, store: Store) -> int | None:
    """Resident bytes in memory where matrices are packed; None where they are not."""
    if resident == "float":
        return None
    tensors = store.resident_tensors() | read_header(store.path / BIASES)
    return resident_bytes(tensors, resident, store.geometry.compute_dtype)


def _computed_bytes(geometry: Geometry, size: int) -> int:
    """Bytes in memory of `size` bytes in the checkpoint's number format."""
    return size * DTYPE_BYTES[geometry.compute_dtype] // geometry.item_bytes


def _predictors_bytes(predictor: str, store: Store) -> int:
    """Weights that the predictor holds: for `exact` the first part of every bundle, as float32."""
    geometry = store.geometry
    if predictor == "lowrank":
        return lowrank.predictor_bytes(store)
    if predictor == "exact":
        return geometry.layers * geometry.neurons * geometry.hidden * 4
    return 0


def part_bundles(geometry: Geometry) -> int:
    """Neurons of a layer that compute multiplies with a block of tokens at a time, at most."""
    return min(max(PART_BYTES_MAX // geometry.stride_bytes, 1), geometry.neurons)


def parts_of(misses: float) -> int:
    """Parts in which a layer's misses land where there are slots for all: few enough to be worth
    their messages, enough of them to multiply meanwhile. They are of one size: none is a crumb."""
    return max(1, min(int(misses) // PART_BUNDLES_MIN, PARTS_IN_FLIGHT_MAX))


def _workspace_bytes(needs: Needs, context: int, block: int) -> int:
    """What compute takes and gives back in a step: the largest is a block of a long prompt."""
    geometry, config = needs.geometry, needs.config
    rows = min(block, context)
    part = part_bundles(geometry)
    # Of a part, what threads hold as float32 and their products pack; its products with all rows.
    ffn = part * (geometry.row_bytes + geometry.hidden * 4 + 3 * rows * 4)
    stream = STREAM_COPIES * rows * geometry.hidden * 4
    width = config["num_attention_heads"] * _head_width(config)
    # Queries and output, keys and values as float32, and the mask, as bytes and as float32.
    attention = (2 * rows + 2 * context) * width * 4 + rows * context * 5
    logits = (LOGITS_COPIES + LOGITS_SHARED) * config["vocab_size"] * 4
    return WORKSPACE_HELD * int(stream + max(ffn, attention) + logits)


def _tokenizer_bytes(store: Store) -> int:
    path = store.config_dir / "tokenizer.json"
    return path.stat().st_size if path.is_file() else 0


def _cache_tables(cache: int) -> int:
    return CACHE_MAPPINGS * cache // PAGE_BYTES_PER_TABLE_BYTE


def _reserve(taken: int) -> int:
    """The reserve of a plan whose other lines are `taken`: RESERVE_SHARE of the sum with it."""
    return max(RESERVE_BYTES_MIN, -(-taken // (RESERVE_SHARE - 1)))


def _slots_min(geometry: Geometry) -> int:
    return min(SLOTS_MIN, geometry.neurons)


def _share(each: int, slots: str, needs: Needs) -> tuple[int, ...]:
    """The slots of every layer where they have `each` on average: as the setting `slots` says; of
    one pool what layers may come to have."""
    geometry, asked = needs.geometry, needs.named_shares
    if asked is None or slots == "equal":
        return (each,) * geometry.layers
    total, least = each * geometry.layers, min(each, _slots_min(geometry))
    return tuple(slots_by_use(asked, total, least, geometry.neurons))


def _slots_per_layer(settings: Settings, geometry: Geometry, fixed: int) -> int:
    """How many slots a layer has on average. `fixed` is the sum of the plan's lines without cache,
    its page tables, and reserve."""
    layer_slot = geometry.layers * geometry.stride_bytes  # one slot in every layer
    layer_slot += _cache_tables(layer_slot)
    smallest = fixed + _slots_min(geometry) * layer_slot
    slots = geometry.neurons
    if settings.cache is not None:
        wanted = cache_bytes(settings.cache, geometry.ffn_bytes)
        slots = min(slots, wanted // (geometry.layers * geometry.stride_bytes))
        if slots < _slots_min(geometry):
            raise SettingError(
                f"INFLASH_CACHE: {settings.cache} is too small; the smallest cache that works is"
                f" {_slots_min(geometry) * geometry.layers * geometry.stride_bytes:,} bytes"
            )
        smallest = fixed + slots * layer_slot
    if settings.cache is None or settings.memory is not None:
        budget = settings.memory if settings.memory is not None else machine_bytes() // 2
        reserve = max(RESERVE_BYTES_MIN, -(-budget // RESERVE_SHARE))
        room = (budget - reserve - fixed) // layer_slot
        if fixed + max(room, 0) * layer_slot < smallest:
            raise SettingError(_refusal(settings, budget, smallest + _reserve(smallest)))
        slots = min(slots, room)
    return slots


def _refusal(settings: Settings, budget: int, smallest: int) -> str:
    what = f" with INFLASH_CACHE={settings.cache}" if settings.cache is not None else ""
    return (
        f"INFLASH_MEMORY: {budget:,} bytes are too few{what}; the smallest budget that works is"
        f" {smallest:,} bytes"
    )
