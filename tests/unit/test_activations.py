"""Recording a trace: what it holds is what the recording of the model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from click.testing import CliRunner

from common.learn.recording import record
from common.learn.windows import windows_of
from common.replay import load_trace
from scripts.activations import main


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
