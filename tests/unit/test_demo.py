"""The demo's store follows the model, and what was fitted for it stays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.learn.fitted import FOLDER
from common.lowrank import FILES
from common.model.convert import convert
from common.store.store import Store
from scripts import demo
from tests.conftest import Made


def test_the_store_is_made_anew_and_keeps_what_was_fitted(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: Any, command: str, src: str, dst: str) -> None:
        assert command == "convert"
        convert(Path(src), Path(dst))

    model, store = tmp_path / "model", tmp_path / "demo" / "store"
    for name, value in {"MODEL": model, "STORE": store, "FITTED": tmp_path / "demo" / "fitted",
                        "name": str, "run": run}.items():  # fmt: skip
        monkeypatch.setattr(demo, name, value)
    shutil.copytree(made.checkpoint("opt", "float32"), model)
    demo.convert(Console(quiet=True))
    first = Store.open(store).id
    (store / FOLDER).mkdir()
    fitted = [*FILES, f"{FOLDER}/layer-000.safetensors"]
    for file in fitted:
        (store / file).write_text(file)
    demo.convert(Console(quiet=True))
    assert Store.open(store).id == first, "the same model is the same store: no new fit"
    shutil.rmtree(model)
    shutil.copytree(made.checkpoint("opt-nobias", "float32"), model)
    demo.convert(Console(quiet=True))
    assert Store.open(store).id != first
    for file in fitted:
        assert (store / file).read_text() == file
    assert [path.name for path in store.parent.iterdir()] == ["store"]
