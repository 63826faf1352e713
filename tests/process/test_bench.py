"""`inflash bench` from a config.json to report and picture, with real servers in real cages."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from common import probes
from common.bench import floors
from scripts.bench import main as bench_command
from tests.unit.test_bench_run import SMALL


@pytest.mark.timeout(240)
def test_a_bench_of_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same programs on less: gigabytes of matrices tell no more about a report.
    memory = functools.partial(probes.measure_memory, "--bytes", f"{16 << 20}")
    monkeypatch.setattr(probes, "measure_memory", memory)
    drive = probes.measure_drive
    few = ("--seconds", "0.05", "--depth", "32", "--bundles", "1")
    monkeypatch.setattr(probes, "measure_drive", lambda store: drive(store, *few))
    config, work = tmp_path / "tiny.json", tmp_path / "work"
    config.write_text(json.dumps(SMALL | {"max_position_embeddings": 600}))
    files = {name: tmp_path / name for name in ("bench.json", "bench.png")}
    result = CliRunner().invoke(
        bench_command,
        ["--config", f"{config}", "--cap", "1GB", "--set", "cache=25%", "--work", f"{work}",
         "--tokens", "16", "--rival-tokens", "2", "--prompt", "16", "--prompts", "2",
         "--rounds", "1", "--only", "inflash,inflash_int8,accelerate", "--prefill",
         "--clients", "1,2",
         "--json", f"{files['bench.json']}", "--plot", f"{files['bench.png']}"],
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(files["bench.json"].read_text())
    assert files["bench.png"].read_bytes().startswith(b"\x89PNG")
    ours = found["contenders"]["inflash"]
    assert list(ours["requests"]) == ["cold", "warm", "rotating"]
    assert ours["spread_ms"]["count"] == 16, "the rotating prompt's"
    assert ours["ms_per_token"] > 0
    assert 0 < ours["own_bytes_per_token"] < 3 * 512 * 4096
    if ours["bytes_per_token"]:
        # Two counts of the same reads: the kernel's, and the server's own.
        assert ours["bytes_per_token"] == pytest.approx(ours["own_bytes_per_token"], rel=0.5)
    assert ours["warm_bytes"] == 0
    if not ours["not_enforced"]:
        assert 50_000_000 < ours["peak_bytes"] <= 1_000_000_000
    assert ours["cache_share"] == pytest.approx(0.25, abs=0.01)
    assert found["contenders"]["llama_cpp_mmap"] == {"absent": "not asked for"}
    rival = found["contenders"]["accelerate"]
    assert "pip install accelerate" in rival.get("absent", "") or rival["ms_per_token"] > 0
    packed = found["contenders"]["inflash_int8"]
    assert packed["ms_per_token"] > 0
    assert packed["fired_per_token"] == pytest.approx(ours["fired_per_token"], rel=0.2)
    assert packed["named_per_token"] == pytest.approx(ours["named_per_token"], rel=0.2)
    assert ours["prefill_512_ms"] == found["prefill"]["contenders"]["inflash"]["prefill_512_ms"]
    assert packed["prefill_512_ms"] > 0
    assert [row["n"] for row in found["clients"]] == [1, 2]
    assert list(found["packed_clients"]) == ["inflash_int8"]
    for rows in (found["clients"], found["packed_clients"]["inflash_int8"]):
        assert all(row["tokens_per_s"] > 0 for row in rows)
        assert all(0 <= row["slowest_share"] <= 1 for row in rows)
    limits = found["floors"]
    assert limits["read_ms"] > 0
    assert limits["compute_ms"] > 0
    assert found["serial_ms"] == found["serial"]["ms_per_token"]
    assert found["overlap_efficiency"] == floors.overlap_efficiency(
        found["serial_ms"], ours["ms_per_token"], limits
    )
    planted = {row["what"]: row for row in found["planted"]}
    assert planted["neurons that fire"]["measured"] == pytest.approx(0.033, abs=0.015)
    assert "look-ahead" in result.stdout
    assert "not asked for" not in result.stdout
    (made,) = work.iterdir()
    names = {"checkpoint", "store", "store-int8", "planted.json", "planted-int8.json"}
    assert {path.name for path in made.iterdir()} >= names
