"""What a bench refuses before it works, what it takes again, and what it needs room for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from common.bench import studies
from common.bench.made import check_room, shape_of
from common.bench.run import NAMES, Options, check, default_cap
from common.errors import UserError
from scripts.bench import main as bench_command

SMALL = {
    "model_type": "opt", "vocab_size": 300, "hidden_size": 128, "word_embed_proj_dim": 128,
    "ffn_dim": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(SMALL))
    return path


def refusal(config: Path, **changed: Any) -> str:
    options = dataclasses.replace(Options(config, config.parent / "work"), **changed)
    with pytest.raises(UserError) as raised:
        check(options, shape_of(config), changed.get("cap_bytes") or 10**9)
    return str(raised.value)


def test_sizes_follow_from_the_configuration(config: Path) -> None:
    shape = shape_of(config)
    assert shape.name == "tiny"
    assert shape.context == 256
    ffn = 3 * 512 * 2 * 128 * 2
    padded = 3 * 512 * 4096
    assert shape.store_bytes - shape.checkpoint_bytes == padded - ffn
    assert shape_of("opt-6.7b").checkpoint_bytes == pytest.approx(13.3e9, rel=0.01)
    assert default_cap(shape_of("opt-6.7b")) == pytest.approx(6.66e9, rel=0.01)
    assert default_cap(shape) == 1_200_000_000


def test_what_is_made_is_known_by_its_parameters(config: Path, tmp_path: Path) -> None:
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    same.write_text(json.dumps(dict(reversed(SMALL.items()))))
    other.write_text(json.dumps(SMALL | {"num_hidden_layers": 4}))
    key = shape_of(config).key
    assert shape_of(same).key == key
    assert shape_of(other).key != key


def test_refusals_name_what_to_change(config: Path) -> None:
    assert "there are inflash, accelerate" in refusal(config, names=("inflash", "vllm"))
    assert "name it, too" in refusal(config, names=("accelerate",))
    assert "context of tiny, 256" in refusal(config, prompt=250)
    assert "--cap" in refusal(config, cap_bytes=2**60)
    assert "INFLASH_CASH: unknown setting" in refusal(config, settings={"cash": "1"})
    assert "INFLASH_CACHE" in refusal(config, settings={"cache": "200%"})
    assert "--set: threads" in refusal(config, settings={"threads": "2"})
    assert "no such folder" in refusal(config, placed=Path("nowhere"))


def test_what_is_right_is_not_refused(config: Path) -> None:
    check(Options(config, config.parent, settings={"cache": "24%"}), shape_of(config), 10**9)


def test_room_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path / "not" / "yet", {"the store": 1000})
    with pytest.raises(UserError, match=r"too little disk .* \(the store [\d,]+, the GGUF file"):
        check_room(tmp_path / "not" / "yet", {"the store": free, "the GGUF file": 5, "none": 0})


def command(*arguments: str) -> Result:
    return CliRunner().invoke(bench_command, list(arguments))


def test_wrong_usage_says_how(config: Path, tmp_path: Path) -> None:
    assert "exclude each other" in command("--shape", "opt-125m", "--config", f"{config}").stderr
    assert "no size" in command("--cap", "much").stderr
    assert "write KEY=VALUE" in command("--set", "cache").stderr
    assert command("--tokens", "0").exit_code == 2
    missing = command("--config", f"{config}", "--json", f"{tmp_path}/no/folder/f.json")
    assert missing.exit_code == 1
    assert "there is no folder" in missing.stderr
    unknown = command("--config", f"{config}", "--only", "inflash,vllm", "--work", f"{tmp_path}/w")
    assert unknown.exit_code == 1
    assert "vllm" in unknown.stderr
    assert not (tmp_path / "w").exists()


def test_help_names_contenders_and_how_to_install_them() -> None:
    text = command("--help").stdout
    assert all(name in text for name in NAMES)
    assert "pip install -e '.[bench]'" in text


def test_growth_ends_with_the_shape_that_is_benched(config: Path) -> None:
    assert studies.growing_shapes(shape_of("opt-1.3b")) == ["opt-125m", "opt-1.3b"]
    assert studies.growing_shapes(shape_of(config)) == list(studies.GROWING)


def test_processes_cost_what_compute_does_not_compute(tmp_path: Path) -> None:
    from tests.unit.test_bench_figures import request_of, result_of, run_of

    times = [10.0, 12.0]
    stats = {"decode_s": 0.020, "decode_stall_s": 0.006}  # of two tokens: 10 and 3 ms each
    own = {"requests": [request_of("rotating", times, **stats)], "memory_bytes": 0,
           "cache_bytes": 0, "cache_share": 1.0, "process_peak_bytes": {}}  # fmt: skip
    runs = {
        "everything cached": [run_of(result_of(times) | own)],
        "plain": [run_of(result_of([5.0, 5.0]))],
    }
    work = studies.Work(tmp_path / "p", 2, 1)
    plain = studies.contenders.plain(tmp_path, work, "python")
    row = studies.everything_cached(tmp_path, 4, work, plain, lambda asked: runs)
    assert row["computing_ms"] == pytest.approx(7.0)
    assert row["processes_us_per_layer"] == pytest.approx(1000 * (11 - 7) / 4)
    assert row["over_plain_us_per_layer"] == pytest.approx(1000 * (11 - 5) / 4)
    alone = studies.everything_cached(tmp_path, 4, work, "no torch", lambda asked: runs)
    assert alone["plain"] == {"absent": "no torch"}
