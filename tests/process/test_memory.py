"""`--memory SIZE` is kept in a cgroup of exactly SIZE; the cache gives way to a limit that falls.

Needs a cgroup of our own: version 1 or 2, and the right to make one; else it is skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import OPTConfig

from common import lowrank
from common.cgroup import Group, memory_groups
from common.launch import CHECKOUT
from common.limits import STOP_S
from common.model.convert import convert
from common.store.manifest import (
    BIASES,
    CONFIG_DIR,
    MANIFEST,
    FileEntry,
    bundle_file,
    checksum_file,
    resident_file,
)
from common.store.store import Store
from inflash import Client
from services.reader.pressure import LOOK_EVERY_S, STEPS, read_sources
from tests.checkpoints import BOS, EOS, PAD, VOCAB, make_tokenizer, random_model
from tests.conftest import assert_clean

MB = 1 << 20
PROMPT = list(range(10, 40))


class TestBudget:
    LAYERS, NEURONS, HIDDEN = 6, 81920, 1024
    TOKENS = 200

    @pytest.mark.timeout(300)
    def test_a_budget_of_half_the_model_is_kept(self, tmp_path: Path, run_dir: Path) -> None:
        store = make_store(tmp_path, self.LAYERS, self.NEURONS, self.HIDDEN, "float16")
        add_factors(store)
        model_bytes = store.geometry.ffn_bytes + store.resident_bytes
        size = model_bytes // 2
        with own_group() as group, limited_server(group, size, store, run_dir) as (client, plan):
            answer = client.generate(
                list(range(3, 131)), max_new_tokens=self.TOKENS, ignore_eos=True
            )
            tokens = list(answer)
            swapped = [_status_kb(pid, "VmSwap") for pid in group.pids()]
            peak = group.peak()
        print(f"model {model_bytes:,}, budget {size:,}, peak {peak:,} bytes; plan:\n{plan}")
        assert len(tokens) == self.TOKENS
        assert len(swapped) == 5
        assert not any(swapped)
        assert group.kills == 0
        assert 0 < peak <= size


class TestPressure:
    LAYERS, NEURONS, HIDDEN = 4, 16384, 512
    TOKENS = 60

    @pytest.mark.timeout(300)
    def test_a_limit_that_falls_takes_slots_and_gives_them_back(
        self, tmp_path: Path, run_dir: Path
    ) -> None:
        store = make_store(tmp_path, self.LAYERS, self.NEURONS, self.HIDDEN, "float32")
        options = ("--cache", "60%", "--predictor", "exact")
        with own_group() as group, limited_server(group, None, store, run_dir, *options) as server:
            client, _ = server
            before = self.generate(client)
            planned = slots(client)
            limit = group.used() + 100 * MB
            group.set_soft_limit(limit)
            time.sleep(3 * LOOK_EVERY_S)
            assert slots(client) == planned, "there is room"

            during = self.generate(client, lambda: group.set_soft_limit(limit * 8 // 10))
            shrunk = wait_for(client, lambda now: now < planned)
            assert group.used() < limit * 8 // 10
            assert self.generate(client) == during == before

            group.set_soft_limit(None)
            grown = wait_for(client, lambda now: now > shrunk + planned // STEPS)
            assert grown <= planned
            assert self.generate(client) == before
            print(f"slots {planned:,} → {shrunk:,} → {grown:,}")
        assert group.kills == 0

    def generate(self, client: Client, on_tenth: Callable[[], None] | None = None) -> list[int]:
        ids = []
        for token in client.generate(PROMPT, max_new_tokens=self.TOKENS, ignore_eos=True):
            ids.append(token.id)
            if len(ids) == 10 and on_tenth is not None:
                on_tenth()
        assert len(ids) == self.TOKENS
        return ids


def slots(client: Client) -> int:
    return int(client.status()["services"]["reader"]["counters"]["slots"])


def wait_for(client: Client, wanted: Callable[[int], bool]) -> int:
    """The slots in use, as soon as they are as `wanted`."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        now = slots(client)
        if wanted(now):
            return now
        time.sleep(0.2)
    raise AssertionError(f"{slots(client):,} slots are in use after 30 s")


@dataclass
class Capped:
    """A cgroup of our own."""

    group: Group
    kills: int = 0  # when it ended

    def _names(self, version_1: str, version_2: str) -> Path:
        name = version_1 if self.group.version == 1 else version_2
        return self.group.folder / f"memory.{name}"

    def set_limit(self, size: int) -> None:
        self._names("limit_in_bytes", "max").write_text(str(size))

    def set_soft_limit(self, size: int | None) -> None:
        none = "-1" if self.group.version == 1 else "max"
        self._names("soft_limit_in_bytes", "high").write_text(none if size is None else str(size))

    def peak(self) -> int:
        return int(self._names("max_usage_in_bytes", "peak").read_text())

    def used(self) -> int:
        """What cannot be reclaimed, as the server's reader counts it."""
        source = read_sources([self.group])[0]
        return source.limit_bytes - source.headroom_bytes

    def pids(self) -> list[int]:
        return [int(pid) for pid in (self.group.folder / "cgroup.procs").read_text().split()]

    def count_kills(self) -> int:
        text = self._names("oom_control", "events").read_text()
        return int(re.findall(r"^oom_kill (\d+)$", text, re.MULTILINE)[0])


@contextlib.contextmanager
def own_group() -> Iterator[Capped]:
    """A new memory cgroup beside or below our own; skips where none can be made."""
    reason = "this process is in no memory cgroup"
    for parent in memory_groups():
        folder = parent.folder / f"inflash-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError as error:
            reason = f"{parent.folder}: no cgroup can be made: {error.strerror}"
            continue
        capped = Capped(Group(folder, parent.version))
        try:
            try:
                capped.set_limit(1 << 40)
                capped.peak()
            except OSError as error:
                reason = f"{parent.folder} has no memory controller for us: {error.strerror}"
                continue
            yield capped
            capped.kills = capped.count_kills()
            return
        finally:
            _remove(folder)
    pytest.skip(reason)


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + 5
    while True:
        try:
            return folder.rmdir()
        except OSError:  # the last process's exit is being counted
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def limited_server(
    capped: Capped, size: int | None, store: Store, run_dir: Path, *options: str
) -> Iterator[tuple[Client, str]]:
    """A client of `inflash serve` with all its processes in a cgroup, limited to `size` and told
    to keep it; and the plan that it printed."""
    if size is not None:
        capped.set_limit(size)
        options = ("--memory", str(size), *options)
    command = [sys.executable, "-m", "scripts.serve", str(store.path), "--run-dir", str(run_dir)]
    procs = capped.group.folder / "cgroup.procs"
    entered = ["sh", "-c", f'echo $$ > "{procs}" && exec "$@"', "sh"]
    process = subprocess.Popen(
        [*entered, *command, *options], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            if line.startswith("ready:"):
                break
            lines.append(line)
        else:
            raise AssertionError(f"the server ended with status {process.wait()}")
        with Client(run_dir) as client:
            yield client, "".join(lines)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(4 * STOP_S)
        process.stdout.close()
    assert status == 0
    assert_clean(run_dir)


def _status_kb(pid: int, key: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)[0])


def make_store(folder: Path, layers: int, neurons: int, hidden: int, dtype: str) -> Store:
    """A random OPT with one layer, converted; then `layers` layers that share its files: so much
    of a model takes a second to make. 5 % of its neurons fire."""
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=1,
        num_attention_heads=8,
        ffn_dim=neurons,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        dropout=0.0,
    )
    model: Any = random_model(config, seed=0)
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias.fill_(-1.6 * 0.2 * hidden**0.5)
    model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(folder / "checkpoint")
    make_tokenizer().save_pretrained(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "store")
    return repeat_layer(Store.open(folder / "store"), layers)


def repeat_layer(store: Store, layers: int) -> Store:
    """The store with its only layer `layers` times, by hard links."""
    path = store.path
    entries = {entry.path: entry for entry in store.manifest.files}
    for layer in range(1, layers):
        for name_of in (bundle_file, checksum_file):
            os.link(path / name_of(0), path / name_of(layer))
            entries[name_of(layer)] = dataclasses.replace(entries[name_of(0)], path=name_of(layer))
        tensors = load_file(path / resident_file(0))
        moved = {k.replace("layers.0.", f"layers.{layer}."): v for k, v in tensors.items()}
        save_file(moved, path / resident_file(layer), {"format": "pt"})
    biases = load_file(path / BIASES)
    all_biases = {
        k.replace("layers.0.", f"layers.{layer}."): v.copy()
        for k, v in biases.items()
        for layer in range(layers)
    }
    save_file(all_biases, path / BIASES, {"format": "pt"})
    config = path / CONFIG_DIR / "config.json"
    text = re.sub(r'("num_hidden_layers": )1\b', rf"\g<1>{layers}", config.read_text())
    config.write_text(text)
    written = [resident_file(layer) for layer in range(1, layers)]
    for name in (*written, BIASES, f"{CONFIG_DIR}/config.json"):
        raw = (path / name).read_bytes()
        entries[name] = FileEntry(name, len(raw), hashlib.sha256(raw).hexdigest())
    manifest = dataclasses.replace(
        store.manifest,
        geometry=dataclasses.replace(store.geometry, layers=layers),
        files=tuple(entries.values()),
    )
    (path / MANIFEST).write_bytes(manifest.to_json())
    return Store.open(path)


def add_factors(store: Store, rank: int = 4, share: float = 0.002) -> None:
    """Predictors that name about `share` of the neurons, at random: as many reads as real ones."""
    shape, random = store.geometry, np.random.default_rng(0)
    tensors = {}
    for layer in range(shape.layers):
        for kind, features in (("same", shape.hidden), ("ahead", 3 * shape.hidden)):
            a = random.standard_normal((rank, features)) / features**0.5
            b = random.standard_normal((shape.neurons, rank))
            scores = random.standard_normal((200, rank)) @ b[:2000].T
            bias = np.full(shape.neurons, -np.quantile(scores, 1 - share))
            for name, values in (("a", a), ("b", b), ("bias", bias)):
                key = lowrank.tensor_name(layer, kind, name)  # type: ignore[arg-type]
                tensors[key] = values.astype(np.float16)
    path = store.path / lowrank.PREDICTORS
    save_file(tensors, path)
    report = {"store": store.id, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (store.path / lowrank.REPORT).write_text(json.dumps(report))
