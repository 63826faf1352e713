"""The ablation's steps: settings that a server takes, gains that add up, verdicts earned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.bench.ablation import make_contenders, make_rows, make_steps, verdict
from common.bench.contenders import Work
from common.config import read_settings
from common.store.geometry import Geometry
from tests.unit.test_bench_figures import request_of, result_of, run_of

LARGE = Geometry(layers=2, neurons=64, hidden=4096, gated=False, dtype="float16")
SMALL = Geometry(layers=2, neurons=64, hidden=768, gated=False, dtype="float16")
GATED = Geometry(layers=2, neurons=64, hidden=4096, gated=True, dtype="float16")
NAMES = ["none", "hybrid", "predictor", "window", "bundling", "look-ahead", "decay", "placement"]


@pytest.mark.parametrize("geometry", [LARGE, SMALL, GATED])
def test_every_steps_settings_are_accepted(geometry: Geometry) -> None:
    steps = make_steps(geometry, Path("placed"))
    assert [step.name for step in steps] == NAMES
    for step in steps:
        given = step.settings or {}
        environ = {f"INFLASH_{key.upper()}": value for key, value in given.items()}
        read_settings(environ | {"INFLASH_STORE": "s", "INFLASH_MEMORY": "7GB"})


def test_each_step_keeps_what_the_last_one_brought() -> None:
    steps = {step.name: step for step in make_steps(LARGE, None)}
    seen = {}
    for name in ("predictor", "window", "bundling", "look-ahead", "decay"):
        given = steps[name].settings or {}
        environ = {f"INFLASH_{key.upper()}": value for key, value in given.items()}
        settings = read_settings(environ | {"INFLASH_STORE": "s"})
        seen[name] = (settings.window, settings.bundling, settings.lookahead, settings.extras)
    assert seen == {
        "predictor": (0, "off", "off", "none"),
        "window": (None, "off", "off", "none"),
        "bundling": (None, "on", "off", "none"),
        "look-ahead": (None, "on", "on", "ahead"),
        "decay": (None, "on", "on", "ahead"),
    }
    assert (steps["look-ahead"].settings or {})["policy"] == "window"
    assert (steps["decay"].settings or {})["policy"] == "decay"


def test_bundles_that_cannot_be_read_apart_leave_that_step_out() -> None:
    steps = {step.name: step for step in make_steps(SMALL, None)}
    assert "4,096" in steps["bundling"].absent
    assert "bundling" not in (steps["window"].settings or {})
    assert not {step.name: step for step in make_steps(GATED, None)}["bundling"].absent


def test_contenders_are_asked_as_their_step_says(tmp_path: Path) -> None:
    steps = make_steps(LARGE, tmp_path / "placed")
    work, slow = Work(tmp_path / "p", 32, 1), Work(tmp_path / "p", 8, 1)
    base = {"memory": "7GB", "cache": "24%", "lookahead": "on"}
    stores = (tmp_path / "store", tmp_path / "placed")
    asked = {one.name: one for one in make_contenders(steps, stores, work, slow, base, 7)}
    assert list(asked) == NAMES
    tokens = {n: one.command[one.command.index("--tokens") + 1] for n, one in asked.items()}
    assert {name for name, count in tokens.items() if count == "8"} == {"none", "hybrid"}
    assert "lookahead=off" in asked["window"].command, "the step's word, not the user's"
    assert "lookahead=on" not in asked["window"].command
    assert "cache=2%" in asked["predictor"].command
    assert "cache=24%" in asked["decay"].command
    assert asked["placement"].files == (tmp_path / "placed",)
    assert not asked["none"].serves
    assert all(one.cap_bytes == 7 for one in asked.values())
    without = make_contenders(make_steps(LARGE, None), (stores[0], None), work, slow, base, 7)
    assert [one.name for one in without] == NAMES[:-1]


def test_gains_are_over_the_last_step_that_was_measured() -> None:
    steps = [step for step in make_steps(SMALL, None) if step.name != "none"]

    def served(times: list[float]) -> Any:
        extra = {"requests": [request_of("rotating", times)], "memory_bytes": 0, "cache_bytes": 0,
                 "cache_share": 0.0, "process_peak_bytes": {}}  # fmt: skip
        return run_of(result_of(times) | extra)

    runs = {
        "hybrid": [served([100.0, 102.0])],
        "predictor": [served([50.0, 51.0])],
        "window": [run_of(None, problem="it was killed")],
        "look-ahead": [served([49.0, 52.0])],
        "decay": [served([99.0, 102.0])],
    }
    rows = {row["step"]: row for row in make_rows(steps, runs)}
    assert "gain" not in rows["hybrid"]
    assert rows["predictor"]["gain"] == pytest.approx(2.0)
    assert rows["predictor"]["verdict"] == "helps"
    assert rows["window"]["failed"] == "it was killed"
    assert "bundle" in rows["bundling"]["absent"]
    assert rows["look-ahead"]["gain"] == pytest.approx(1.0)
    assert rows["look-ahead"]["verdict"] == "within the spread"
    assert rows["decay"]["verdict"] == "slower"
    assert "absent" in rows["placement"]


def figures(rounds: list[float], quartiles: list[float]) -> dict[str, Any]:
    return {"round_ms": rounds, "spread_ms": {"quartiles": quartiles}}


def test_a_verdict_is_every_rounds() -> None:
    before = figures([10.0, 20.0, 30.0], [10.0, 30.0])
    assert verdict(before, figures([9.0, 19.0, 29.0], [9.0, 29.0])) == "helps"
    assert verdict(before, figures([11.0, 21.0, 31.0], [11.0, 31.0])) == "slower"
    assert verdict(before, figures([9.0, 19.0, 31.0], [1.0, 2.0])) == "within the spread"


def test_one_round_needs_quartiles_that_do_not_meet() -> None:
    before = figures([11.0], [10.0, 12.0])
    assert verdict(before, figures([8.0], [7.0, 9.0])) == "helps"
    assert verdict(before, figures([8.0], [7.0, 10.0])) == "within the spread"
    assert verdict(before, figures([14.0], [13.0, 15.0])) == "slower"
