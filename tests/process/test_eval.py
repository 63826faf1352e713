"""`inflash eval` on stores whose predictors are written by hand: what it must find is known."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from common.config import Settings
from common.launch import CHECKOUT, Server
from common.lowrank import AHEAD_PARTS, PREDICTORS, REPORT, Floats, Kind, tensor_name
from common.plan import make_plan
from common.segment import segment_path
from common.store.store import Store
from scripts.eval import CACHE, exact_problem, options_for, show
from scripts.eval import main as eval_command
from tests.conftest import Made

EVAL = [sys.executable, "-m", "inflash", "eval"]
TEXT = "def read(path):\n    for name in open(path):\n        print(name, path)\n" * 60
LENGTH = 16
DEADLINE_S = 60


def everything(neurons: int, features: int) -> dict[str, Floats]:
    """Factors that name every neuron."""
    zero = {"a": np.zeros((1, features), np.float32), "b": np.zeros((neurons, 1), np.float32)}
    return zero | {"bias": np.ones(neurons, np.float32)}


def rows_of(store: Store, layer: int) -> dict[str, Floats]:
    """The layer's own rows as factors: they name what fires, and what is within rounding of it."""
    part = store.geometry.parts[0]
    bias = store.biases(layer).get(part, np.zeros(store.geometry.neurons, np.float32))
    rows, eye = store.rows(layer, part), np.eye(store.geometry.hidden, dtype=np.float32)
    # int8 rows are off by up to a 254th of their largest value for each unit of |x|.
    slack = np.abs(rows).max(axis=1) / 254 * store.geometry.hidden
    margin: Floats = bias - np.float32(store.activation.threshold) + slack + np.float32(1e-4)
    return {"a": eye, "b": rows, "bias": margin.astype(np.float32)}


def fit_by_hand(store: Store, folder: Path, exactly: bool) -> Store:
    """A copy of `store` whose `same` predictors are exact, or else name everything; `ahead` do."""
    shutil.copytree(store.path, folder)
    geometry = store.geometry
    tensors = {}
    for layer in range(geometry.layers):
        same = rows_of(store, layer) if exactly else everything(geometry.neurons, geometry.hidden)
        ahead = everything(geometry.neurons, AHEAD_PARTS * geometry.hidden)
        kinds: dict[Kind, dict[str, Floats]] = {"same": same, "ahead": ahead}
        for kind, factors in kinds.items():
            for field, values in factors.items():
                tensors[tensor_name(layer, kind, field)] = values
    save_file(tensors, folder / PREDICTORS)
    digest = hashlib.sha256((folder / PREDICTORS).read_bytes()).hexdigest()
    (folder / REPORT).write_text(json.dumps({"store": store.id, "sha256": digest}))
    return Store.open(folder)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def evaluate(store: Path, text: Path, *options: str) -> Result:
    """The command, in this process: a start of its own takes seconds."""
    sizes = ["--tokens", "64", "--length", f"{LENGTH}", "--decode-tokens", "32"]
    return CliRunner().invoke(eval_command, [str(store), "--text", str(text), *sizes, *options])


def test_predictors_that_lose_nothing(
    made: Made, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = fit_by_hand(made.store("llama-gqa"), tmp_path / "store", exactly=True)
    result = evaluate(store.path, text, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert (found["tokens"], found["tokens_served"], found["tokens_scored"]) == (64, 32, 30)
    dense = found["perplexity"]["dense"]
    assert dense > 2
    assert found["perplexity"] == pytest.approx(dict.fromkeys(found["perplexity"], dense), 1e-4)
    assert found["perplexity_dense_all"] != pytest.approx(dense, 1e-4), "of more text"
    assert (found["top1_agreement"], found["top1_agreement_exact"]) == (1.0, 1.0)
    assert found["recall"] == dict.fromkeys(found["recall"], 1.0)
    assert 1.0 <= found["named_per_active"]["same"] < 1.15, "int8 rows name a few too many"
    assert found["named_per_active"]["ahead"] > 1.5
    assert found["false_positives"]["ahead"] == 1.0
    layers = found["layers"]
    assert [row["layer"] for row in layers] == list(range(store.geometry.layers))
    # The log of layers and the figures of requests are made apart: they count the same neurons.
    hits, misses = (sum(row[field] for row in layers) for field in ("hits", "misses"))
    assert found["hit_rate"]["lowrank"] == pytest.approx(hits / (hits + misses))
    assert found["late_tokens"] == 2 * (LENGTH - 2), "each window's prompt and last token are not"
    fired, late = (sum(row[field] for row in layers[1:]) for field in ("fired", "late_fired"))
    assert found["late_fraction"] == pytest.approx(late / fired)
    assert 0 < late < fired
    assert found["bytes_per_token"] > 0
    assert found["bytes_per_token_exact"] > 0
    cache = int(float(CACHE.rstrip("%")) / 100 * store.geometry.ffn_bytes)
    slot_of_each = store.geometry.layers * store.geometry.stride_bytes
    assert cache - slot_of_each < found["cache_bytes"]["lowrank"] <= cache
    show(found)
    shown = capsys.readouterr().out
    assert f"perplexity of 30 tokens: dense {dense:.4f}, exact" in shown
    assert shown.count("100.00%") >= 2 * store.geometry.layers


def test_exact_is_left_out_where_it_does_not_fit(made: Made, tmp_path: Path) -> None:
    store = fit_by_hand(made.store("opt"), tmp_path / "store", exactly=False)
    cache = {"cache": "25%", "block": "64"}  # it may not be made smaller to fit
    budget = make_plan(settings_of(store, "lowrank", cache), store).memory_bytes
    tight, ample = cache | {"memory": f"{budget}"}, cache | {"memory": f"{2 * budget}"}
    make_plan(settings_of(store, "lowrank", tight), store)  # raises unless it fits
    assert "the smallest budget" in exact_problem(settings_of(store, "exact", tight), store)
    assert exact_problem(settings_of(store, "exact", ample), store) == ""


def settings_of(store: Store, predictor: str, options: dict[str, str]) -> Settings:
    return Server(options_for(store, options, predictor, LENGTH)).settings


def test_a_store_without_predictors_is_refused(made: Made, text: Path) -> None:
    result = evaluate(made.store("opt").path, text)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "run `inflash fit" in result.stderr


def test_a_context_shorter_than_a_window_is_refused(made: Made, text: Path, tmp_path: Path) -> None:
    store = fit_by_hand(made.store("opt"), tmp_path / "store", exactly=False)
    result = evaluate(store.path, text, "--context", "8")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "--context 8: a window has 16 tokens" in result.stderr


def test_without_a_temporary_folder_it_is_refused(
    made: Made, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    result = evaluate(made.store("opt").path, text)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "stopped: No usable temporary directory found in ['/tmp']; see" in result.stderr


def test_ctrl_c_leaves_nothing(made: Made, text: Path, tmp_path: Path, run_dir: Path) -> None:
    store = fit_by_hand(made.store("opt"), tmp_path / "store", exactly=False)
    long = ["--tokens", "4000", "--length", "400", "--decode-tokens", "4000", "--context", "512"]
    process = subprocess.Popen(
        [*EVAL, str(store.path), "--text", str(text), *long],
        env=os.environ | {"TMPDIR": str(run_dir)},
        cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + DEADLINE_S
    logs: list[Path] = []
    while not logs or not logs[0].stat().st_size:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
        logs = list(run_dir.glob("inflash-*/log/compute.spans"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (130, "")
    assert "stopped before the end" in err
    assert "Traceback" not in err
    assert not segment_path(logs[0].parent.parent).exists()  # run_dir is looked through, too
