"""The plan adds up, and what cannot run is refused with the smallest budget that would."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from common import lowrank
from common.config import Settings
from common.errors import SettingError
from common.limits import PREFILL_ROWS_MIN
from common.lowrank import REPORT
from common.plan import Plan, make_plan, resolve_predictor
from common.store.store import Store
from common.store.tensors import make_header
from scripts.serve import main, plan_table

GB = 10**9


def settings(store: Any, **values: Any) -> Settings:
    return Settings(store=store.path, run_dir=Path("/r"), **values)


def smallest_in(refusal: SettingError) -> int:
    return int(re.findall(r"[\d,]+(?= bytes$)", str(refusal))[-1].replace(",", ""))


def assert_adds_up(plan: Plan, budget: int) -> None:
    assert sum(plan.lines().values()) == plan.memory_bytes <= budget
    assert all(size >= 0 for size in plan.lines().values())


@pytest.fixture
def fitted(store_of: Any) -> Any:
    """A store with a file of low-rank factors, 30 numbers; the file goes again."""
    store = store_of("opt", "float16")
    path = store.path / lowrank.PREDICTORS
    tensors = [("a", "float16", (2, 5)), ("b", "float16", (4, 4)), ("bias", "float32", (4,))]
    path.write_bytes(make_header(tensors) + bytes(2 * 26 + 4 * 4))
    yield store
    path.unlink()


def test_the_lines_add_up(store_of: Any) -> None:
    store = store_of("llama-gqa", "float16")
    plan = make_plan(settings(store, memory=2 * GB), store)
    assert_adds_up(plan, 2 * GB)
    assert plan.cache_bytes == store.geometry.ffn_bytes  # no more than there is
    assert plan.resident_bytes == store.resident_bytes


def test_the_embedding_stays_on_flash_unless_all_neurons_are_cached(store_of: Any) -> None:
    store = store_of("llama-gqa", "float16")
    name, tensors = "model.embed_tokens.weight", store.resident_tensors()
    kept, spared = (make_plan(settings(store, cache=c), store) for c in ("100%", "40%"))
    assert (kept.embedding, spared.embedding) == ("memory", "flash")
    assert kept.resident_bytes - spared.resident_bytes == tensors[name].nbytes
    asked = [
        make_plan(settings(store, cache="40%", embedding=e), store) for e in ("memory", "flash")
    ]
    assert [plan.embedding for plan in asked] == ["memory", "flash"]
    assert asked[0].resident_bytes == kept.resident_bytes
    assert asked[1] == spared


def test_the_cache_has_the_room_of_the_embedding(store_of: Any) -> None:
    store = store_of("llama-gqa", "float32")
    kept = make_plan(settings(store, cache="50%", block=64, embedding="memory"), store)
    spared = make_plan(settings(store, memory=kept.memory_bytes, block=64), store)
    assert spared.embedding == "flash"
    assert sum(spared.slots) > sum(kept.slots)


def test_an_embedding_that_is_the_head_stays_in_memory(store_of: Any) -> None:
    store = store_of("llama-tied", "float16")
    assert make_plan(settings(store, cache="40%"), store).embedding == "memory"
    with pytest.raises(SettingError, match=r"^INFLASH_EMBEDDING: flash, but .* is its head"):
        make_plan(settings(store, cache="40%", embedding="flash"), store)
    packed = make_plan(settings(store, cache="40%", resident="int8"), store)
    assert packed.embedding == "flash", "its head has rows of its own"


def test_room_is_kept_free(store_of: Any) -> None:
    store = store_of("opt", "float32")
    for budget in (2 * GB, 64 * GB):
        plan = make_plan(settings(store, memory=budget), store)
        assert plan.reserve_bytes >= plan.memory_bytes // 64
        assert plan.reserve_bytes >= 32 << 20


def test_a_cache_share_is_taken_of_every_layer(store_of: Any) -> None:
    store = store_of("opt", "float32")
    plan = make_plan(settings(store, cache="25%"), store)
    assert plan.slots == (store.geometry.neurons // 4,) * store.geometry.layers
    assert_adds_up(plan, plan.memory_bytes)


def test_grouped_heads_need_less_kv(store_of: Any) -> None:
    whole, grouped = store_of("llama-relu", "float32"), store_of("llama-gqa", "float32")
    sizes = [make_plan(settings(s, cache="50%"), s).kv_bytes for s in (whole, grouped)]
    assert sizes[0] == 2 * sizes[1]


def test_a_longer_context_needs_more_room_to_work(store_of: Any) -> None:
    store = store_of("opt", "float32")
    plans = [make_plan(settings(store, cache="50%", context=c), store) for c in (64, 512)]
    assert plans[0].workspace_bytes < plans[1].workspace_bytes
    assert plans[0].kv_bytes * 8 == plans[1].kv_bytes


def test_bfloat16_is_planned_as_it_is_computed(store_of: Any) -> None:
    half, single = store_of("opt", "bfloat16"), store_of("opt", "float32")
    plans = [make_plan(settings(s, cache="50%"), s) for s in (half, single)]
    assert plans[0].kv_bytes == plans[1].kv_bytes
    assert plans[0].resident_bytes == 2 * half.resident_bytes


def test_factors_are_planned_as_int8_with_scales(fitted: Any) -> None:
    plan = make_plan(settings(fitted, cache="50%"), fitted)
    numbers, rows, biases = 2 * 5 + 4 * 4, 2 + 4, 4
    assert plan.predictors_bytes == numbers + 4 * rows + 4 * biases
    exact = make_plan(settings(fitted, cache="50%", predictor="exact"), fitted)
    shape = fitted.geometry
    assert exact.predictors_bytes == shape.layers * shape.neurons * shape.hidden * 4


def test_auto_is_lowrank_where_the_store_was_fitted(fitted: Any) -> None:
    assert resolve_predictor(settings(fitted), fitted) == "lowrank"
    assert resolve_predictor(settings(fitted, predictor="exact"), fitted) == "exact"


def test_auto_is_exact_where_it_was_not(store_of: Any) -> None:
    store = store_of("opt", "float32")
    assert resolve_predictor(settings(store), store) == "exact"
    with pytest.raises(SettingError, match="inflash fit"):
        make_plan(settings(store, predictor="lowrank"), store)


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    variant=st.sampled_from(["opt", "llama-gqa"]),
    predictor=st.sampled_from(["all", "exact"]),
    context=st.integers(1, 4096),
    cache=st.one_of(st.none(), st.sampled_from(["2%", "40%", "100%"])),
    beyond=st.integers(0, 10 * GB),
)
def test_the_smallest_budget_that_is_named_works(
    store_of: Any, variant: str, predictor: str, context: int, cache: str | None, beyond: int
) -> None:
    store = store_of(variant, "float32")
    given_too: dict[str, Any] = {"predictor": predictor, "context": context, "cache": cache}
    with pytest.raises(SettingError, match="INFLASH_MEMORY") as refusal:
        make_plan(settings(store, memory=1000, **given_too), store)
    smallest = smallest_in(refusal.value)
    assert make_plan(settings(store, memory=smallest, **given_too), store).memory_bytes == smallest
    with pytest.raises(SettingError, match=f"{smallest:,} bytes$"):
        make_plan(settings(store, memory=smallest - 1, **given_too), store)
    budget = smallest + beyond
    assert_adds_up(make_plan(settings(store, memory=budget, **given_too), store), budget)


def test_a_cache_too_small_to_stream_a_layer_is_refused(store_of: Any) -> None:
    store = store_of("opt", "float32")
    with pytest.raises(SettingError, match="INFLASH_CACHE") as refusal:
        make_plan(settings(store, cache="1000"), store)
    smallest = smallest_in(refusal.value)
    plan = make_plan(settings(store, cache=str(smallest)), store)
    assert plan.cache_bytes == plan.cache_bytes_min == smallest


def test_serve_prints_the_plan_and_starts_nothing(store_of: Any, run_dir: Path) -> None:
    store = store_of("opt", "float32")
    arguments = [str(store.path), "--run-dir", str(run_dir), "--plan", "--predictor", "exact"]
    as_json = CliRunner().invoke(main, [*arguments, "--json"])
    assert as_json.exit_code == 0, as_json.output
    plan = json.loads(as_json.stdout)
    sizes = [v for k, v in plan.items() if k.endswith("_bytes") and k != "memory_bytes"]
    assert sum(sizes) == plan["memory_bytes"]
    table = CliRunner().invoke(main, arguments).stdout
    widths = {line.index(" MB") for line in table.splitlines()}
    assert len(widths) == 1
    assert table.splitlines()[-1].split()[0] == "memory"


def test_the_table_names_every_line(store_of: Any) -> None:
    store = store_of("opt", "float32")
    plan = make_plan(settings(store, cache="50%"), store)
    named = [line.split()[0] for line in plan_table(plan).splitlines()]
    assert named == [*plan.lines(), "memory"]


def test_slots_follow_what_predictors_name(store_of: Any, tmp_path: Path) -> None:
    store = Store.open(shutil.copytree(store_of("opt", "float32").path, tmp_path / "store"))
    equal = make_plan(settings(store, cache="50%"), store)
    assert len(set(equal.slots)) == 1
    with pytest.raises(SettingError, match="inflash fit"):
        make_plan(settings(store, cache="50%", slots="use"), store)
    rows = [
        {"active": 0.01 * (layer + 1), "same": {"named_per_active": 2.0}}
        for layer in range(store.geometry.layers)
    ]
    report = {"store": store.id, "layers": rows}
    (store.path / REPORT).write_text(json.dumps(report))
    shared = make_plan(settings(store, cache="50%", predictor="exact"), store)
    assert sum(shared.slots) == sum(equal.slots)
    assert list(shared.slots) == sorted(shared.slots)
    assert shared.slots[-1] > 2 * shared.slots[0]
    assert shared.memory_bytes == equal.memory_bytes
    (store.path / REPORT).write_text(json.dumps(report | {"store": "another"}))
    assert make_plan(settings(store, cache="50%"), store).slots == equal.slots


def test_a_block_of_a_prompt_is_smaller_where_memory_is_short(store_of: Any) -> None:
    store = store_of("opt", "float32")
    large = make_plan(settings(store, memory=4 * GB), store)
    assert (large.block, large.context) == (512, 512)
    with pytest.raises(SettingError) as refusal:
        make_plan(settings(store, memory=GB // 10), store)
    short = make_plan(settings(store, memory=smallest_in(refusal.value)), store)
    assert PREFILL_ROWS_MIN <= short.block < large.block
    assert short.workspace_bytes < large.workspace_bytes
    given = make_plan(settings(store, memory=4 * GB, block=100), store)
    assert given.block == 100
    assert short.workspace_bytes < given.workspace_bytes < large.workspace_bytes
    # A larger block comes when memory has room for it, not out of the cache.
    plans = [make_plan(settings(store, memory=short.memory_bytes + (n << 18)), store)
             for n in range(200)]  # fmt: skip
    assert len({plan.block for plan in plans}) > 1
    for one, after in itertools.pairwise(plans):
        assert after.cache_bytes >= 0.7 * one.cache_bytes
