"""What a bench refuses before it works, what it takes again, and what it needs room for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from common.bench import studies
from common.bench.caps import CACHE_SHARE, check_cap, default_cap, needs_of, settings_of
from common.bench.made import shape_of
from common.bench.names import DEFAULT, GROUPS, NAMES, chosen
from common.bench.options import Options, capped_runs, check
from common.errors import UserError
from common.plan import divide
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
        check(options, shape_of(config))
    return str(raised.value)


def test_sizes_follow_from_the_configuration(config: Path) -> None:
    shape = shape_of(config)
    assert shape.name == "tiny"
    assert shape.context == 256
    ffn = 3 * 512 * 2 * 128 * 2
    padded = 3 * 512 * 4096
    assert shape.store_bytes() - shape.checkpoint_bytes == padded - ffn
    large = shape_of("opt-6.7b")
    assert large.checkpoint_bytes == pytest.approx(13.3e9, rel=0.01)
    assert large.store_bytes() == pytest.approx(13.3e9, rel=0.01)
    half = 32 * 16384 * 8192  # bytes of the FFN that int8 spares
    assert large.store_bytes() - large.store_bytes("int8") == half
    assert large.gguf_bytes("f16") == large.checkpoint_bytes
    assert large.gguf_bytes("q8_0") == pytest.approx(13.3e9 * 34 / 64, rel=0.01)


def options_of(shape: str | Path, **changed: Any) -> Options:
    return dataclasses.replace(Options(shape, Path("work")), **changed)


@pytest.mark.parametrize(
    ("shape", "changed"),
    [
        ("opt-125m", {}),
        ("opt-1.3b", {}),
        ("opt-1.3b", {"ablation": True, "prefill": True, "context_cost": True}),
        ("opt-1.3b", {"clients": (1, 8), "names": NAMES}),
        ("opt-1.3b", {"settings": {"cache": "40%"}}),
        ("opt-6.7b", {"names": NAMES, "prefill": True}),
    ],
)
def test_the_default_cap_is_one_that_servers_take(shape: str, changed: dict[str, Any]) -> None:
    made, options = shape_of(shape), options_of(shape, **changed)
    cap = default_cap(made, capped_runs(options, made, None))
    assert cap >= made.checkpoint_bytes // 2
    runs = capped_runs(options, made, cap)
    check_cap(made, cap, runs)
    for run in runs:
        settings = settings_of(run)
        assert settings.memory == cap
        plan = divide(settings, needs_of(made, settings, run.packed))
        if settings.cache is None:
            assert plan.cache_bytes > 0.95 * made.geometry.ffn_bytes / CACHE_SHARE / 2
    if shape == "opt-6.7b":
        assert cap == made.checkpoint_bytes // 2, "the rest has room in it"


def test_what_is_to_run_says_what_it_takes(config: Path) -> None:
    shape = shape_of(config)
    options = options_of(config, names=("inflash", "inflash_int4"), clients=(2, 4), ablation=True)
    runs = {run.what: run for run in capped_runs(options, shape, 10**9)}
    assert runs["inflash_int4"].packed == "int4"
    assert runs["inflash_int4"].settings["resident"] == "int4"
    together = runs["inflash with --clients 4"].settings["context"]
    assert int(together) == 4 * 64  # a request takes room in steps of 64: 16 + 32 tokens
    assert runs["the ablation's step predictor"].settings["cache"] == "2%"
    roomy = options_of(config, settings={"context": "200"})
    assert capped_runs(roomy, shape, None)[0].settings["context"] == "200"


def test_a_cap_is_refused_by_the_shape_alone() -> None:
    shape = shape_of("opt-1.3b")
    options = options_of("opt-1.3b", context_cost=True)
    with pytest.raises(
        UserError, match=r"cap of 1,300,000,000 bytes: .* smallest budget that"
    ) as e:
        check_cap(shape, 13 * 10**8, capped_runs(options, shape, 13 * 10**8))
    smallest = int(str(e.value).split()[-2].replace(",", ""))
    alone = options_of("opt-1.3b")
    check_cap(shape, smallest, capped_runs(alone, shape, smallest))
    with pytest.raises(UserError, match="--context-cost cannot run"):
        check_cap(shape, smallest, capped_runs(options, shape, smallest))
    with pytest.raises(UserError, match="more than this machine has"):
        check_cap(shape, 2**60, capped_runs(alone, shape, 2**60))


def test_contenders_are_chosen_by_name_and_by_group() -> None:
    assert chosen("default") == DEFAULT
    assert chosen("all") == NAMES
    assert chosen("llama_cpp_q4_0, inflash,inflash") == ("inflash", "llama_cpp_q4_0")
    assert set(chosen("inflash,packed")) == {"inflash", *GROUPS["packed"]}
    assert set(chosen("default,packed")) == set(NAMES)
    with pytest.raises(UserError, match="vllm: there are inflash, inflash_int8"):
        chosen("inflash,vllm")
    for other in ("accelerate", "packed", ""):
        with pytest.raises(UserError, match="name it, too"):
            chosen(other)


def test_what_is_made_is_known_by_its_parameters(config: Path, tmp_path: Path) -> None:
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    same.write_text(json.dumps(dict(reversed(SMALL.items()))))
    other.write_text(json.dumps(SMALL | {"num_hidden_layers": 4}))
    key = shape_of(config).key
    assert shape_of(same).key == key
    assert shape_of(other).key != key


def test_refusals_name_what_to_change(config: Path) -> None:
    assert "context of tiny, 256" in refusal(config, prompt=250)
    assert "--prefill: 514 tokens do not fit" in refusal(config, prefill=True)
    assert "--clients 8: 512 tokens do not fit" in refusal(config, clients=(1, 8))
    assert "1 to 16 at once" in refusal(config, clients=(0,))
    assert "INFLASH_CASH: unknown setting" in refusal(config, settings={"cash": "1"})
    assert "INFLASH_CACHE" in refusal(config, settings={"cache": "200%"})
    assert "--set: threads" in refusal(config, settings={"threads": "2"})
    assert "no such folder" in refusal(config, placed=Path("nowhere"))


def test_what_is_right_is_not_refused(config: Path) -> None:
    check(Options(config, config.parent, settings={"cache": "24%"}), shape_of(config))


@pytest.mark.parametrize(
    ("changed", "name", "refused"),
    [
        ({"hidden_size": 80, "word_embed_proj_dim": 80}, "inflash_int8", False),
        ({"hidden_size": 80, "word_embed_proj_dim": 80}, "inflash_int4", True),
        ({"hidden_size": 80, "word_embed_proj_dim": 80}, "llama_cpp_mmap", False),
        ({"hidden_size": 80, "word_embed_proj_dim": 80}, "llama_cpp_q8_0", True),
        ({"ffn_dim": 500}, "llama_cpp_q4_0", False),
    ],
)
def test_formats_that_rows_cannot_have(
    tmp_path: Path, changed: dict[str, Any], name: str, refused: bool
) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(SMALL | changed))
    if refused:
        assert f"{name} cannot be made of odd" in refusal(path, names=("inflash", name))
    else:
        check(options_of(path, names=("inflash", name)), shape_of(path))


def command(*arguments: str) -> Result:
    return CliRunner().invoke(bench_command, list(arguments))


def test_wrong_usage_says_how(config: Path, tmp_path: Path) -> None:
    assert "exclude each other" in command("--shape", "opt-125m", "--config", f"{config}").stderr
    assert "no size" in command("--cap", "much").stderr
    assert "write KEY=VALUE" in command("--set", "cache").stderr
    assert command("--tokens", "0").exit_code == 2
    for counts in ("", "some", "1,,2", "0", "-1"):
        assert command("--clients", counts).exit_code == 2, counts
    missing = command("--config", f"{config}", "--json", f"{tmp_path}/no/folder/f.json")
    assert missing.exit_code == 1
    assert "there is no folder" in missing.stderr
    unknown = command("--config", f"{config}", "--only", "inflash,vllm", "--work", f"{tmp_path}/w")
    assert unknown.exit_code == 1
    assert "vllm" in unknown.stderr
    small = command("--config", f"{config}", "--cap", "100MB", "--work", f"{tmp_path}/w")
    assert small.exit_code == 1
    assert "the smallest budget that works is" in small.stderr
    assert not (tmp_path / "w").exists()


def test_help_names_contenders_and_how_to_install_them() -> None:
    text = command("--help").stdout
    assert all(name in text for name in NAMES)
    assert "pip install -e '.[bench]'" in text


def test_a_long_prompt_is_a_figure_of_its_own(tmp_path: Path) -> None:
    from tests.unit.test_bench_figures import result_of, run_of

    asked = [studies.Contender(name, [], None, ()) for name in ("inflash", "accelerate")]
    slow = [run_of(result_of([1.0]) | {"prefill_ms": ms}) for ms in (30.0, 10.0, 20.0)]
    runs = {"inflash": slow, "accelerate": [run_of(None, problem="it was killed")]}
    found = studies.prefill(asked, lambda asked: runs)
    assert found["inflash"]["prefill_512_ms"] == 20.0
    assert found["inflash"]["spread_ms"]["max"] == 30.0
    assert found["accelerate"] == {"failed": "it was killed"}


def test_clients_are_counted_over_the_rounds() -> None:
    from tests.unit.test_bench_figures import result_of, run_of

    def served(*rows: tuple[int, float, float]) -> Any:
        names = ("n", "tokens_per_s", "slowest_share")
        return run_of(
            result_of([1.0]) | {"clients": [dict(zip(names, r, strict=True)) for r in rows]}
        )

    asked = studies.Contender("x", [], None, ())
    done = [served((1, 2.0, 1.0), (4, 6.0, 0.9)), served((1, 4.0, 1.0), (4, 5.0, 0.8))]
    rows = studies.clients([asked], (1, 4), lambda asked: {"x": done})["x"]
    assert [(row["n"], row["tokens_per_s"], row["slowest_share"]) for row in rows] == [
        (1, 3.0, 1.0), (4, 5.5, 0.8),
    ]  # fmt: skip
    assert rows[1]["round_tokens_per_s"] == [6.0, 5.0]
    killed = {"x": [run_of(None, problem="it was killed")]}
    assert studies.clients([asked], (1, 4), lambda asked: killed)["x"] == [
        {"n": 1, "failed": "it was killed"}, {"n": 4, "failed": "it was killed"},
    ]  # fmt: skip


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
