"""Recording a trace: what it holds is what the recording of the model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from common.learn.recording import record
from common.learn.windows import windows_of
from common.model.convert import convert
from common.replay import Trace, load_trace
from common.store.store import Store
from scripts.activations import main
from tests.unit.test_placement import write_predictors, write_trace


def test_a_trace_has_what_fired(store_of: Any, tmp_path: Path) -> None:
    store = store_of("opt", "float32")
    text = tmp_path / "text.py"
    text.write_text("\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(200)))
    options = ["--text", str(text), "--tokens", "256", "--length", "64"]
    out = tmp_path / "trace.npz"
    result = CliRunner().invoke(main, [str(store.path), str(out), *options])
    assert result.exit_code == 0, result.output
    trace = load_trace(out)
    windows = windows_of(store, [text], 256, 64).ids
    recording = record(store, windows, tmp_path / "recording")
    assert (trace.tokens, trace.layers) == (windows.size, store.geometry.layers)
    assert trace.starts.tolist() == list(range(0, windows.size, 64))
    for layer in range(trace.layers):
        for token in (0, 77, trace.tokens - 1):
            (fired,) = recording.unpack(recording.fired(layer)[token : token + 1])
            assert trace.asked(token, layer).tolist() == fired.nonzero()[0].tolist()


def test_what_predictors_name_needs_predictors(store_of: Any, tmp_path: Path) -> None:
    store = store_of("opt", "float32")
    arguments = [str(store.path), str(tmp_path / "t.npz"), "--text", str(tmp_path)]
    result = CliRunner().invoke(main, [*arguments, "--names", "named"])
    assert result.exit_code == 1
    assert "inflash fit" in result.output


def test_where_the_trace_goes_is_looked_at_first(tmp_path: Path) -> None:
    out = tmp_path / "nowhere" / "t.npz"
    arguments = [str(tmp_path / "no-store"), str(out), "--text", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert f"error: {out} cannot be written: there is no folder {out.parent}" in result.stderr


def recorded(store: Store, out: Path, *options: str) -> Trace:
    result = CliRunner().invoke(main, [str(store.path), str(out), *options])
    assert result.exit_code == 0, result.output
    return load_trace(out)


@pytest.mark.parametrize("names", ["fired", "named"])
def test_a_trace_has_the_checkpoints_neurons_in_whatever_order_they_lie(
    names: str, made: Any, tmp_path: Path
) -> None:
    src = made.checkpoint("opt", "float32")
    convert(src, tmp_path / "plain")
    plain = Store.open(tmp_path / "plain")
    write_predictors(plain)
    trace = write_trace(plain, tmp_path / "trace.npz")
    convert(src, tmp_path / "placed", placement=trace, predictors=plain.path)
    placed = Store.open(tmp_path / "placed")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 300, 256))
    options = ["--ids", str(tmp_path / "ids.npy"), "--length", "64", "--names", names]
    one, other = (recorded(s, tmp_path / f"{s.id}.npz", *options) for s in (plain, placed))
    assert one.tokens == 256
    for layer in range(one.layers):
        assert len(one.ids[layer]) > 256
        assert not np.array_equal(placed.order(layer), np.arange(one.neurons))
        assert other.firsts[layer].tolist() == one.firsts[layer].tolist()
        assert other.ids[layer].tolist() == one.ids[layer].tolist()


def test_token_ids_are_run_in_windows(store_of: Any, tmp_path: Path) -> None:
    store = store_of("opt", "float32")
    ids = np.random.default_rng(0).integers(0, 300, 300)
    np.save(tmp_path / "ids.npy", ids)
    options = ["--ids", str(tmp_path / "ids.npy"), "--length", "64", "--tokens", "192"]
    trace = recorded(store, tmp_path / "trace.npz", *options)
    assert trace.tokens == 192
    assert trace.starts.tolist() == [0, 64, 128]
    windows = ids[:192].reshape(3, 64).astype(np.int32)
    recording = record(store, windows, tmp_path / "recording")
    (fired,) = recording.unpack(recording.fired(1)[100:101])
    assert trace.asked(100, 1).tolist() == fired.nonzero()[0].tolist()


REFUSED = {
    "no integers": (np.zeros(100), 64, "no array of at least 64 integers"),
    "too few": (np.zeros(63, np.int64), 64, "no array of at least 64 integers"),
    "outside": (np.full(64, 300), 64, "outside of the vocabulary, 0 to 299"),
    "below": (np.full(64, -1), 64, "outside of the vocabulary"),
    "longer than the context": (np.zeros(600, np.int64), 600, "longer than the model's context"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ids_that_are_refused(case: str, store_of: Any, tmp_path: Path) -> None:
    ids, length, reason = REFUSED[case]
    np.save(tmp_path / "ids.npy", ids)
    arguments = [str(store_of("opt", "float32").path), str(tmp_path / "t.npz")]
    options = ["--ids", str(tmp_path / "ids.npy"), "--length", str(length)]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert result.exit_code == 1
    assert reason in " ".join(result.output.split())
    for wrong in ([], [*options, "--text", str(tmp_path)]):
        result = CliRunner().invoke(main, [*arguments, *wrong])
        assert result.exit_code == 2
        assert "give --text, or else --ids" in result.output
    assert not (tmp_path / "t.npz").exists()
