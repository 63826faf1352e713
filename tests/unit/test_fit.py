"""`inflash fit` on tiny stores: what it writes, resuming, sharing the work, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from common.errors import StoreError, UserError
from common.learn import recording
from common.learn.fitted import KINDS, save_part
from common.learn.layer import Goal, fit_layer
from common.learn.recording import record
from common.learn.windows import windows_of
from common.limits import PREDICT_REQUESTS_KEPT
from common.lowrank import PICTURE, PREDICTORS, REPORT, Kind, predictor_bytes, read_predictors
from common.store.store import Store
from scripts.fit import _ranges, main
from scripts.verify import main as verify
from services.predictor.predictors import LowRank

ARGUMENTS = ("--tokens", "1024", "--length", "64", "--passes", "0.5", "--threads", "1",
             "--size", "400%")  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.py"
    path.write_text("\n".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(900)))
    return path


@pytest.fixture
def store(store_of: Any, tmp_path: Path) -> Store:
    """A copy: fitting writes into it."""
    shutil.copytree(store_of("llama-relu", "float16").path, tmp_path / "store")
    return Store.open(tmp_path / "store")


def fit(store: Store, text: Path, *more: str) -> Result:
    arguments = [str(store.path), "--text", str(text), *ARGUMENTS, *more]
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_fit_writes_predictors_report_and_picture(store: Store, text: Path) -> None:
    result = fit(store, text, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((store.path / REPORT).read_text())
    assert (store.path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert not (store.path / "fit").exists(), "the recording and the parts are gone"
    assert len(report["layers"]) == store.geometry.layers
    for row in report["layers"]:
        for kind in ("same", "ahead"):
            assert row[kind]["recall"] >= 0.9
            assert row[kind]["recall"] == pytest.approx(1 - row[kind]["false_negatives"])
    for row in report["layers"]:  # a larger cache misses no more
        assert len(row["misses"]) == len(report["cache_shares"])
        assert row["misses"][0] <= 1
        assert row["misses"] == sorted(row["misses"], reverse=True)
    assert report["totals"]["same"]["recall"] >= 0.99
    assert report["totals"]["ahead"]["recall"] >= 0.97
    factors = read_predictors(store)
    assert predictor_bytes(store) == sum(
        array.nbytes
        for kind in factors.values()
        for f in kind
        for array in (f.a.values, f.a.scales, f.b.values, f.b.scales, f.bias)
    )
    again = fit(store, text, "--json")
    assert json.loads(again.stdout) == report
    assert "fitted already" in again.stderr


def test_layers_that_are_fitted_are_kept_and_others_added(store: Store, text: Path) -> None:
    last = store.geometry.layers - 1
    first = fit(store, text, "--layers", f"0-{last - 1}")
    assert first.exit_code == 0, first.output
    assert f"missing: {last}" in first.output
    assert not (store.path / PREDICTORS).exists()
    part = store.path / "fit" / "layer-000.safetensors"
    # Another machine has a copy of the store, and fits the rest.
    other = Store.open(shutil.copytree(store.path, store.path.with_name("other")))
    shutil.rmtree(other.path / "fit")
    assert fit(other, text, "--layers", f"{last}").exit_code == 0
    shutil.copy(other.path / "fit" / f"layer-{last:03}.safetensors", part.parent)
    done = fit(store, text)
    assert done.exit_code == 0, done.output
    assert read_predictors(store)["same"]
    assert not part.exists()
    # In one go it comes to the same.
    alone = Store.open(shutil.copytree(other.path, store.path.with_name("alone")))
    shutil.rmtree(alone.path / "fit")
    assert fit(alone, text).exit_code == 0
    for kind, factors in read_predictors(alone).items():
        for ours, theirs in zip(factors, read_predictors(store)[kind], strict=True):
            np.testing.assert_allclose(ours.b.values, theirs.b.values, atol=2)
            np.testing.assert_allclose(ours.b.scales, theirs.b.scales, rtol=1e-2)


def test_a_stopped_fit_goes_on_with_the_recording_that_it_has(
    store: Store, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(saved_in: Store, layer: int, fits: Any, fingerprint: str) -> None:
        if layer == 1:
            raise KeyboardInterrupt
        save_part(saved_in, layer, fits, fingerprint)

    with monkeypatch.context() as patch:
        patch.setattr("scripts.fit.save_part", stop)
        assert fit(store, text, "--passes", "0").exit_code == 130
    assert (store.path / "fit" / "layer-000.safetensors").exists()

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is run again")

    monkeypatch.setattr(recording, "load_streamed", load)
    assert fit(store, text, "--passes", "0").exit_code == 0
    assert read_predictors(store)["same"]


@pytest.mark.parametrize("name", ["fit/recording.lock", "fit/layer-000.tmp", PICTURE])
def test_what_cannot_be_written_is_told(store: Store, text: Path, name: str) -> None:
    (store.path / name).mkdir(parents=True)
    result = fit(store, text, "--passes", "0")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert name.removesuffix(".tmp") in result.stderr
    assert "run the same command again" in result.stderr


def test_a_store_that_cannot_be_written_is_told_before_the_model_runs(
    store: Store, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: path != store.path)
    result = fit(store, text, "--work", str(tmp_path / "work"))
    assert result.exit_code == 1
    assert f"error: {store.path / PREDICTORS} cannot be written" in result.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_not_finite_are_told(
    store: Store, text: Path, tmp_path: Path, kind: Kind
) -> None:
    found = record(store, windows_of(store, [text], 256, 64).ids, tmp_path / "work")
    x = np.memmap(found.folder / "x-001.bin", found.x_dtype, "r+", shape=(256, found.hidden))
    x[70, 3] = np.nan
    x.flush()
    goal = Goal(0.9, 2.0, bytes_max=1 << 20)
    with pytest.raises(UserError, match=f"layer 1 of .*{kind}: FFN inputs are not finite"):
        fit_layer(store, found, 1, kind, goal, 0.0, lambda *_: None)


def test_what_is_damaged_missing_or_of_another_store_is_refused(store: Store, text: Path) -> None:
    with pytest.raises(StoreError, match=r"no fitted predictors.*inflash fit"):
        read_predictors(store)
    assert fit(store, text, "--passes", "0").exit_code == 0
    path, report = store.path / PREDICTORS, store.path / REPORT
    whole, words = path.read_bytes(), report.read_text()
    assert CliRunner().invoke(verify, [str(store.path)]).exit_code == 0
    path.write_bytes(whole[:-4] + b"\1\2\3\4")
    verified = CliRunner().invoke(verify, [str(store.path)])
    assert verified.exit_code == 1
    assert "predictors.safetensors is damaged" in verified.stdout
    with pytest.raises(StoreError, match=r"damaged.*inflash fit"):
        read_predictors(store)
    path.write_bytes(whole[:1000])
    with pytest.raises(StoreError, match="truncated"):
        read_predictors(store)
    path.write_bytes(whole)
    report.write_text(words.replace(store.id, "0" * 16))
    with pytest.raises(StoreError, match="another store"):
        read_predictors(store)
    report.unlink()
    with pytest.raises(StoreError, match="missing or damaged"):
        read_predictors(store)


def test_the_service_names_what_the_factors_name(store: Store, text: Path) -> None:
    assert fit(store, text, "--passes", "0").exit_code == 0
    factors = read_predictors(store)
    predictor = LowRank(store)
    random = np.random.default_rng(1)
    before, now = random.normal(size=(2, store.geometry.layers + 1, store.geometry.hidden)).astype(
        np.float32
    )
    layers = range(-1, store.geometry.layers)
    for layer in layers:
        assert predictor.look_ahead([1], layer, before[layer][None]) is None, (
            "there is no token before"
        )
        predictor.remember(1, layer, before[layer])
    for layer in layers:
        ahead = predictor.look_ahead([1], layer, now[layer][None])
        predictor.remember(1, layer, now[layer])
        if layer == layers[-1]:
            assert ahead is None
        else:
            features = np.concatenate([now[layer], before[layer], before[layer + 1]])[None]
            expected = factors["ahead"][layer + 1]
            assert ahead is not None
            assert sorted(ahead.tolist()) == expected.name(features).tolist()
            assert (np.diff(expected.scores(features)[0][ahead]) <= 0).all(), "the surest first"
        if layer >= 0:
            named = predictor.name(layer, now[layer][None])
            scores = factors["same"][layer]
            a, blocks = scores.a.values * scores.a.scales[:, None], scores.b.values
            by_rows = blocks.swapaxes(1, 2).reshape(blocks.shape[0] * blocks.shape[2], -1)
            tall = by_rows[: len(scores.bias), : len(a)]
            score = (now[layer] @ a.T) @ tall.T * scores.b.scales + scores.bias
            clear = abs(score) > 1e-3 * abs(score).max()
            assert set(named) & set(np.flatnonzero(clear)) == set(
                np.flatnonzero(clear & (score > 0))
            )
    assert predictor.look_ahead([2], 0, now[:1]) is None, "another request"


def test_requests_are_looked_ahead_together(store: Store, text: Path) -> None:
    assert fit(store, text, "--passes", "0").exit_code == 0
    predictor = LowRank(store)
    x = np.random.default_rng(2).normal(size=(3, 3, store.geometry.hidden)).astype(np.float32)
    for request, rows in enumerate(x):
        for layer in (0, 1):
            predictor.remember(request, layer, rows[layer])
    alone = [predictor.look_ahead([n], 0, rows[2:]) for n, rows in enumerate(x)]
    together = predictor.look_ahead([0, 1, 2, 7], 0, np.concatenate([x[:, 2], x[0, :1]]))
    assert together is not None
    assert set(together) == {int(n) for ids in alone if ids is not None for n in ids}
    assert together[0] in {int(ids[0]) for ids in alone if ids is not None and len(ids)}
    for request in range(100, 100 + PREDICT_REQUESTS_KEPT):
        predictor.remember(request, 0, x[0, 0])
    assert predictor.look_ahead([0], 0, x[0, 2:]) is None, "long ago"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--layers", "3-1"), "no range of layers"),
        (("--layers", "0-99"), "has layers 0 to"),
        (("--size", "much"), "no share"),
        (("--memory", "some"), "no size"),
        (("--text", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_a_users_mistake_is_told(
    store: Store, text: Path, arguments: tuple[str, ...], says: str
) -> None:
    result = fit(store, text, *arguments)
    assert result.exit_code in (1, 2)
    assert says in result.output
    assert "Traceback" not in result.output


def test_ranges() -> None:
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
