"""Forecasts: memory as a server divides it, speeds that follow from the cost model, and the command
without torch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from common.config import Settings
from common.errors import SettingError, UserError
from common.forecast.behaviour import PUBLISHED, Behaviour, behaviour_of
from common.forecast.forecast import Forecaster
from common.forecast.machine import (
    Drive,
    Machine,
    drive_of_sheet,
    fit_drive,
    load_machine,
    with_drive,
)
from common.forecast.source import Described, describe
from common.forecast.tokens import Work, extra_parts, token_ms
from common.launch import CHECKOUT
from common.lowrank import CACHE_SHARES, REPORT
from common.plan import divide, make_plan, needs_of, smallest_bytes
from scripts.plan import main
from tests.conftest import Made

GB = 10**9
DTYPES = ("float16", "bfloat16", "float32")
OPT_6_7B = {
    "model_type": "opt", "vocab_size": 50272, "hidden_size": 4096, "word_embed_proj_dim": 4096,
    "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32,
    "max_position_embeddings": 2048, "torch_dtype": "float16",
}  # fmt: skip

MACHINE = Machine(
    version=1, host="here", made="2026-01-01T00:00:00+00:00", processor="a processor", cores=2,
    memory_bytes=24 * GB, memory_bytes_per_s=20e9, memory_way="mv of float16", threads=1,
    decode={
        dtype: {"resident": 10e9, "named": 5e9, "fired": 8e9, "context": 4e9} for dtype in DTYPES
    },
    block={dtype: {"resident": [4e-10, 2e-9], "ffn": [1e-9, 4e-9]} for dtype in DTYPES},
    block_rows=[16, 128], predictor_bytes_per_s=3e9, layer_ms=3.0, named_per_layer=100.0,
    start_s=6.0, drive=Drive("here", 10.0, 1.0, 0.05, 80.0, (), {}),
)  # fmt: skip


@pytest.fixture
def opt(tmp_path: Path) -> Described:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(OPT_6_7B))
    return describe(str(path))


def forecaster_of(model: Described, machine: Machine | None = MACHINE, **own: int) -> Forecaster:
    asked = {"context": 2048, "prompt": 32} | own
    return Forecaster(model, behaviour_of(model), machine, **asked)


def speed_at(forecaster: Forecaster, memory: int) -> Any:
    speed = forecaster.at(memory).speed
    assert speed is not None
    return speed


def test_memory_is_divided_as_a_server_divides_it(made: Made) -> None:
    """Of an unfitted store but for the predictors, which a server has others of."""
    store = made.store("llama-gqa", "float16")
    settings = Settings(store=store.path, run_dir=Path("/r"), predictor="all", memory=2 * GB)
    ours, theirs = (
        forecaster_of(describe(str(store.path))).at(2 * GB).plan,
        make_plan(settings, store),
    )
    assert ours is not None
    mine, server = ours.lines(), theirs.lines()
    assert {k: v for k, v in mine.items() if k not in ("predictors", "kernel", "reserve")} == {
        k: v for k, v in server.items() if k not in ("predictors", "kernel", "reserve")
    }


def test_the_smallest_budget_is_the_smallest(made: Made) -> None:
    store = made.store("opt", "float32")
    settings = Settings(store=store.path, run_dir=Path("/r"))
    smallest = smallest_bytes(settings, needs_of(settings, store))
    for memory, works in ((smallest, True), (smallest - 4096, False)):
        asked = dataclasses.replace(settings, memory=memory)
        if works:
            assert make_plan(asked, store).memory_bytes <= memory
        else:
            with pytest.raises(SettingError):
                divide(asked, needs_of(asked, store))


def test_6_7b_in_8_gb(opt: Described) -> None:
    """Known sizes: 6.66 billion parameters, of which 4.29 lie on flash."""
    assert opt.geometry.ffn_bytes == 32 * 16384 * 16384
    assert opt.checkpoint_bytes == pytest.approx(13.3 * GB, rel=0.01)
    found = forecaster_of(opt).at(8 * GB)
    assert found.fits
    assert found.plan is not None
    assert sum(found.plan.lines().values()) <= 8 * GB
    assert 0 < found.cache_share < 0.24
    assert not forecaster_of(opt).at(4 * GB).fits
    assert forecaster_of(opt).at(4 * GB).speed is None


def test_more_memory_reads_less_and_is_no_slower(opt: Described) -> None:
    forecaster = forecaster_of(opt)
    rows = [row for row in forecaster.table(9 * GB) if row.speed]
    assert 9 * GB in [row.memory_bytes for row in rows]
    assert rows[0].memory_bytes == forecaster.smallest_bytes
    speeds = [row.speed for row in rows if row.speed]
    for less, more in itertools.pairwise(speeds):
        assert more.bytes_per_token <= less.bytes_per_token
        assert more.tokens_per_s.expected >= less.tokens_per_s.expected
        assert more.hit_rate >= less.hit_rate
    assert speeds[-1].bytes_per_token == 0
    assert speeds[-1].window_tokens is None


def test_cold_is_no_faster_than_warm_and_reads_cost_time(opt: Described) -> None:
    speed = speed_at(forecaster_of(opt), 12 * GB)
    assert speed.tokens_per_s_cold.expected <= speed.tokens_per_s.expected
    assert speed.first_token_s_cold.expected >= speed.first_token_s.expected
    slow = dataclasses.replace(MACHINE, drive=Drive("slow", 1000.0, 10.0, 0.0, None, (), {}))
    slower = speed_at(forecaster_of(opt, slow), 12 * GB)
    assert slower.tokens_per_s.expected < speed.tokens_per_s.expected / 2
    assert slower.token.products == speed.token.products


def test_the_published_window_is_met(opt: Described) -> None:
    """A cache of 24 % of the FFN misses 2.4 % of it for a token, and holds 4 to 5 tokens."""
    behaviour, published = behaviour_of(opt), PUBLISHED["opt"]
    missed = behaviour.named[0] * behaviour.missed(0, published.cached)
    assert missed == pytest.approx(published.new, rel=0.05)
    assert not behaviour.fitted
    assert "OPT 6.7B" in behaviour.source
    forecaster = forecaster_of(opt)
    size = min(
        (forecaster.at(m * GB // 10) for m in range(75, 120)),
        key=lambda row: abs(row.cache_share - published.cached),
    )
    assert size.speed is not None
    assert size.speed.window_tokens in (3, 4, 5)


@hypothesis_settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_a_larger_cache_misses_no_more(one: float, other: float, measured: bool) -> None:
    misses = ((0.9, 0.7, 0.5, 0.3, 0.1),) if measured else None
    shares = CACHE_SHARES if measured else (0.10, 0.24, 0.024)
    behaviour = Behaviour((0.03,), (0.1,), misses, shares, True, measured, "")
    small, large = sorted((one, other))
    assert 0 <= behaviour.missed(0, large) <= behaviour.missed(0, small) <= 1
    assert behaviour.missed(0, 0.0) == pytest.approx(1)
    assert behaviour.missed(0, 1.0) == pytest.approx(0)


def test_a_fitted_store_speaks_for_itself(made: Made) -> None:
    store = made.store("opt", "float16")
    row = {
        "active": 0.02, "same": {"named_per_active": 2.0}, "misses": [0.8, 0.6, 0.4, 0.2, 0.1]
    }  # fmt: skip
    report = {
        "store": store.id,
        "cache_shares": CACHE_SHARES,
        "layers": [row] * store.geometry.layers,
    }
    path = store.path / REPORT
    try:
        path.write_text(json.dumps(report))
        found = behaviour_of(describe(str(store.path)))
        assert (found.fitted, found.measured) == (True, True)
        assert found.named == (0.04,) * store.geometry.layers
        assert found.missed(0, 0.1) == pytest.approx(0.4)
        del row["misses"]
        path.write_text(json.dumps(report))
        assert not behaviour_of(describe(str(store.path))).measured
    finally:
        path.unlink()


def test_without_a_miss_nothing_is_read(opt: Described) -> None:
    work = Work(10**9, 1e6, 1000.0, 300.0, 0.0, 10.0, 10**6, 0)
    found = token_ms(MACHINE, opt.geometry, work)
    assert found.reads == 0
    assert found.products == pytest.approx(
        1e3 * (0.1 + 1e6 / 4e9 + 1000 * 8192 / 5e9 + 300 * 8192 / 8e9)
    )
    reading = token_ms(MACHINE, opt.geometry, dataclasses.replace(work, missed=500.0))
    assert reading.reads > 0


def test_few_slots_make_more_parts() -> None:
    assert extra_parts(58.0, 1000) == 0
    assert extra_parts(58.0, 130) == 0, "half of them hold a part of the usual size"
    assert extra_parts(58.0, 40) == 2  # three of 20 in place of one
    assert extra_parts(800.0, 84) == 16  # twenty of 42 in place of four
    assert extra_parts(100.0, 128) == 1, "two of 64 in place of one: fewer than 64 are no part"
    assert extra_parts(130.0, 1000) == 0
    assert extra_parts(0.0, 2) == 0


def points(read_us: float, byte_ns: float) -> list[dict[str, float]]:
    sizes = [4096 * 4**power for power in range(5)]
    return [
        {"read_bytes": size, "depth": depth,
         "bytes_per_s": size / (read_us * 1e-6 + size * byte_ns * 1e-9) * depth / 128}
        for depth in (8, 128) for size in sizes
    ]  # fmt: skip


@pytest.mark.parametrize(("read_us", "byte_ns"), [(10.0, 0.5), (0.0, 1.0), (50.0, 0.0)])
def test_the_cost_of_a_read_is_found_again(read_us: float, byte_ns: float) -> None:
    found = fit_drive({"points": points(read_us, byte_ns)}, None, "x")
    assert found.read_us == pytest.approx(read_us, abs=1e-6)
    assert found.byte_ns == pytest.approx(byte_ns, abs=1e-9)
    assert found.error < 1e-6


def test_a_data_sheet_is_a_drive() -> None:
    drive = drive_of_sheet("3.5GB/s@600k")
    assert drive is not None
    assert drive.seconds(1, 4096) == pytest.approx(1 / 600_000)
    assert drive.bytes_per_s == pytest.approx(3.5e9, rel=0.01)
    plain = drive_of_sheet("550MB/s")
    assert plain is not None
    assert plain.read_us == 0
    for text in ("fast", "0GB/s", "3GB", "@600k", "drive.json"):
        assert drive_of_sheet(text) is None
    with pytest.raises(UserError, match="data sheet"):
        with_drive(MACHINE, "no-such-drive")


def write(machine: Machine, path: Path, **changed: Any) -> Path:
    path.write_text(json.dumps(machine.as_object() | changed))
    return path


def test_a_cost_model_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert load_machine(write(MACHINE, tmp_path / "m.json")) == MACHINE
    for changed, said in (
        ({"version": 9}, "version 9"),
        ({"layer_ms": -1.0}, "layer_ms is -1"),
        ({"cores": "two"}, "cores is 'two'"),
        ({"surprise": 1}, "surprise"),
    ):
        with pytest.raises(UserError, match=said):
            load_machine(write(MACHINE, tmp_path / "m.json", **changed))
    (tmp_path / "m.json").write_text("[]")
    with pytest.raises(UserError, match="no machine's cost model"):
        load_machine(tmp_path / "m.json")
    with pytest.raises(UserError, match="inflash doctor"):
        load_machine(tmp_path / "absent.json")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A config.json and a cost model."""
    (tmp_path / "config.json").write_text(json.dumps(OPT_6_7B))
    return str(tmp_path / "config.json"), str(write(MACHINE, tmp_path / "machine.json"))


def run_plan(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, [*arguments])
    assert done.exit_code == code, done.output
    return done.output


def test_the_command_says_it_all(files: tuple[str, str], tmp_path: Path) -> None:
    model, machine = files
    said = run_plan(
        model, "--memory", "9GB", "--machine", machine, "--plot", str(tmp_path / "k.png")
    )
    for words in ("Fits in 9.00 GB", "tokens/s, warm", "knee", "asked for", "OPT 6.7B", "Disk:"):
        assert words in said
    assert (tmp_path / "k.png").stat().st_size > 10_000
    refused = run_plan(model, "--memory", "2GB", "--machine", machine)
    assert "Does not fit in 2.00 GB: the smallest budget that works is" in refused


def test_as_json(files: tuple[str, str]) -> None:
    model, machine = files
    found = json.loads(
        run_plan(model, "--memory", "9GB", "--machine", machine, "--drive", "7GB/s@1000k", "--json")
    )
    assert found["forecast"]["fits"]
    assert sum(v for k, v in found["forecast"]["plan"].items() if k != "slots") <= 9 * GB
    speed = found["forecast"]["speed"]["tokens_per_s"]
    assert speed["low"] < speed["expected"] < speed["high"]
    assert found["machine"]["drive"] == "data sheet: 7GB/s@1000k"
    assert found["knee_bytes"] in [row["memory_bytes"] for row in found["table"]]


def test_without_a_cost_model_memory_is_foretold(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFLASH_RUN_DIR", str(tmp_path / "none"))
    said = run_plan(files[0], "--memory", "9GB")
    assert "Fits in 9.00 GB" in said
    assert "run `inflash doctor`" in said
    assert "--machine FILE" in run_plan(files[0], "--drive", "1GB/s", code=1)
    run_plan(files[0], "--memory", "much", code=2)
    assert "there is no nowhere/at/all" in run_plan("nowhere/at/all", code=1)


BLOCKED = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None
from scripts.plan import main
main(sys.argv[1:])
"""


def test_it_works_without_torch(files: tuple[str, str], made: Made) -> None:
    """Of a config.json, a checkpoint's folder and a store."""
    config, machine = files
    for model in (config, made.checkpoint("opt", "float16"), made.store("opt", "float16").path):
        done = subprocess.run(
            [sys.executable, "-c", BLOCKED, str(model), "--memory", "9GB", "--machine", machine,
             "--json"],
            cwd=CHECKOUT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(done.stdout)["forecast"]["speed"]["tokens_per_s"]["expected"] > 0
