"""What names a model: stores, checkpoints, config.json, and a Hub that is a server on loopback."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from common.errors import StoreError, UserError
from common.forecast import hub
from common.forecast.source import describe
from tests.checkpoints import VARIANTS, make_checkpoint
from tests.conftest import Made

FILES = ("config.json", "model.safetensors", "tokenizer.json")


def weights_bytes(made: Made, variant: str) -> tuple[int, int]:
    """Resident and FFN bytes of a store, by the conversion itself; headers left out."""
    store = made.store(variant, "float16")
    from common.store.manifest import BIASES
    from common.store.tensors import read_header

    paths = [*store.resident_paths(), store.path / BIASES]
    return sum(t.nbytes for p in paths for t in read_header(p).values()), store.geometry.ffn_bytes


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_arithmetic_agrees_with_the_conversion(made: Made, variant: str, tmp_path: Path) -> None:
    """From config.json alone, from headers, and from the store: the same model."""
    folder = made.checkpoint(variant, "float16")
    resident, ffn = weights_bytes(made, variant)
    store = made.store(variant, "float16")
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    for name in (folder, tmp_path / "config.json"):
        found = describe(str(name))
        assert found.geometry == store.geometry
        assert found.activation == store.activation
        assert (found.resident_bytes, found.geometry.ffn_bytes) == (resident, ffn)
    assert describe(str(store.path)).resident_bytes == store.resident_bytes


def test_shards_are_one_model(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "whole", "llama-gqa", "float16")
    make_checkpoint(tmp_path / "cut", "llama-gqa", "float16", sharded=True)
    whole, cut = (describe(str(tmp_path / name)) for name in ("whole", "cut"))
    assert whole.resident_bytes == cut.resident_bytes
    shard = next((tmp_path / "cut").glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(StoreError, match=shard.name):
        describe(str(tmp_path / "cut"))


def test_pickled_weights_are_described_by_their_configuration(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "opt", "float16", pickled=True)
    found = describe(str(tmp_path))
    assert found.geometry.dtype == "float16"
    assert "no safetensors headers" in found.notes[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"quantization_config": {"bits": 4}}, "quantised already"),
        ({"dtype": "float8", "torch_dtype": "float8"}, "float8"),
    ],
)
def test_what_cannot_be_run_is_refused(
    made: Made, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    config = json.loads((made.checkpoint("llama-relu", "float16") / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said):
        describe(str(path))


def test_a_missing_key_is_named(made: Made, tmp_path: Path) -> None:
    config = json.loads((made.checkpoint("opt", "float16") / "config.json").read_text())
    del config["ffn_dim"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(StoreError, match="has no ffn_dim"):
        describe(str(path))


def test_headers_that_disagree_with_the_configuration_are_refused(
    made: Made, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(made.checkpoint("opt", "float16"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ffn_dim": config["ffn_dim"] * 2}))
    with pytest.raises(StoreError, match=r"fc1.* has shape"):
        describe(str(folder))


def test_nothing_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name a store"):
        describe(str(tmp_path / "absent"))
    with pytest.raises(StoreError, match="neither store nor checkpoint"):
        describe(str(tmp_path))


class _Files(http.server.SimpleHTTPRequestHandler):
    """A Hub: /OWNER/NAME/resolve/REVISION/FILE, of a folder, with ranges as far as `honours`."""

    honours = True
    sent = 0

    def do_HEAD(self) -> None:
        self._reply(body=False)

    def do_GET(self) -> None:
        self._reply(body=True)

    def _reply(self, body: bool) -> None:
        *_, name = self.path.split("/")
        path = Path(self.directory) / name
        if "/gated/" in self.path or not path.is_file():
            self.send_error(401 if "/gated/" in self.path else 404)
            return
        content = path.read_bytes()
        asked = self.headers.get("Range")
        if asked and self.honours:
            first, last = asked.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            part = content
            self.send_response(200)
        self.send_header("Content-Length", f"{len(part)}")
        self.end_headers()
        if body:
            with contextlib.suppress(ConnectionError):  # who has its header leaves
                for start in range(0, len(part), 65536):
                    self.wfile.write(part[start : start + 65536])
                    type(self).sent += len(part[start : start + 65536])

    def log_message(self, *_: Any) -> None: ...


@contextlib.contextmanager
def hub_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, honours: bool = True
) -> Iterator[type[_Files]]:
    handler = type("Handler", (_Files,), {"honours": honours, "sent": 0})
    make = functools.partial(handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), make)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )  # fmt: skip
    try:
        yield handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_model_of_the_hub_by_its_header(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made.checkpoint("llama-gqa", "bfloat16")
    with hub_of(folder, monkeypatch):
        found = describe("owner/name")
    assert found.kind == "Hub"
    assert found.resident_bytes == describe(str(folder)).resident_bytes
    assert found.geometry.dtype == "bfloat16"  # which only the header has, if config.json lies
    assert found.tokenizer_bytes == (folder / "tokenizer.json").stat().st_size


def test_a_hub_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "opt", "float16", sharded=True)
    with hub_of(tmp_path, monkeypatch):
        assert describe("owner/name").resident_bytes == describe(str(tmp_path)).resident_bytes


def test_no_more_is_read_than_the_header(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a server that sends the whole file where a range was asked for."""
    folder = made.checkpoint("opt", "float16")
    for name in FILES:
        shutil.copy(folder / name, tmp_path / name)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole + bytes(64 << 20))
    with hub_of(tmp_path, monkeypatch, honours=False) as server:
        assert describe("owner/name").resident_bytes == describe(str(folder)).resident_bytes
        assert server.sent < 32 << 20  # what the sockets' buffers took, and no 64 MB


def test_a_header_that_is_none_is_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(made.checkpoint("opt", "float16") / "config.json", tmp_path / "config.json")
    for content, said in (
        ((1 << 40).to_bytes(8, "little") + b"{}", "no safetensors file"),
        ((1 << 20).to_bytes(8, "little") + b"{}", "ends inside its header"),
        ((2).to_bytes(8, "little") + b"{]", "corrupt safetensors header"),
        (b"abc", "it has 3 bytes"),
    ):
        (tmp_path / "model.safetensors").write_bytes(content)
        with hub_of(tmp_path, monkeypatch), pytest.raises(UserError, match=said):
            describe("owner/name")


def test_what_the_hub_has_not_or_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_of(tmp_path, monkeypatch):
        with pytest.raises(UserError, match="no such model"):
            describe("owner/name")
        with pytest.raises(UserError, match="HF_TOKEN"):
            describe("gated/name")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )  # fmt: skip
        with pytest.raises(UserError, match="cannot be asked about owner/name"):
            describe("owner/name")


@pytest.mark.parametrize("text", ["a/b/c", "/tmp/x", "../x/y", "owner/", "a b/c", "owner"])
def test_what_is_no_id(text: str) -> None:
    assert not hub.is_id(text)
