"""A recording: what every FFN layer was given, and which of its neurons fired, for some text.

    x-LLL.bin        FFN input of layer LLL, [tokens, hidden], float16 or float32; "embedding" in
                     the place of LLL: what enters decoder layer 0
    fired-LLL.bin    uint8 [tokens, neurons / 8 rounded up]: see `Observe` in streamed.py
    ids.bin          token ids, int32 [tokens]
    recording.json   written last: without it, the folder is no recording

Tokens come in windows of `length`, each run on its own: nothing precedes a window's first token.
Files are written from first byte to last while the model runs, and read by memory map. Refuses to
begin where the drive lacks room for all of it, and to open what was not finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.errors import UserError
from common.lowrank import EMBEDDING
from common.model.streamed import KEEP_BYTES, Bits, Ids, final_states, load_streamed
from common.store.geometry import Geometry
from common.store.partial import sync_folder
from common.store.store import Store, forget_pages

META = "recording.json"
LOCK = "recording.lock"
BATCH_TOKENS = 4096  # in one forward pass: more would spare few reads, under long computing
ACTIVATION_BYTES = 1 << 30  # of one forward pass
_VERSION = 1
_SYNC_BYTES = 128 << 20  # written and not yet on the drive: page cache that we cause
_FLOAT16_MAX = 65504.0
_ROWS_ALIVE = 12  # of `hidden` float32 numbers, per token, at a pass's peak: 8 to 12 were measured

Progress = Callable[[int, int], None]
"""Told how many tokens are done, and of how many."""


@dataclass(frozen=True)
class Recording:
    """A finished recording. Made by `record`, or by `open` from its folder."""

    folder: Path
    store_id: str
    text_digest: str  # of the token ids
    tokens: int
    length: int  # of a window, in tokens
    hidden: int
    neurons: int
    x_dtype: str  # "float16" or "float32"
    layers: tuple[int, ...]  # whose neurons are recorded; x also of the one before each

    @classmethod
    def open(cls, folder: Path) -> Recording:
        """The recording in `folder`; `UserError` if there is none, or none that is finished."""
        where = folder / META
        try:
            found = cls._of(folder, json.loads(where.read_bytes()))
        except FileNotFoundError:
            raise UserError(
                f"{folder} holds no finished recording: it has no {META}; record the text again"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{where} is no recording's: {error}; delete {folder}, and record the text again"
            ) from None
        for name, size in found.files().items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(
                    f"the recording {folder} is damaged: {name} is missing or has not"
                    f" {size:,} bytes; delete the folder, and record the text again"
                )
        return found

    @classmethod
    def _of(cls, folder: Path, content: dict[str, Any]) -> Recording:
        if content.pop("version") != _VERSION:
            raise ValueError("it is of another version")
        layers = tuple(int(layer) for layer in content.pop("layers"))
        for name in ("tokens", "length", "hidden", "neurons"):
            if type(content[name]) is not int or content[name] < 1:
                raise ValueError(f"{name} is {content[name]!r}")
        return cls(folder, layers=layers, **content)

    @property
    def x_layers(self) -> tuple[int, ...]:
        """The layers whose x is there, ascending."""
        return _x_layers(self.layers)

    def x(self, layer: int) -> npt.NDArray[Any]:
        """Read-only map [tokens, hidden] of the layer's FFN input, float16 or float32."""
        if layer not in self.x_layers:
            raise ValueError(f"x of layer {layer} is not recorded")
        return self._map(_x_file(layer), self.x_dtype, self.hidden)

    def fired(self, layer: int) -> Bits:
        """Read-only map uint8 [tokens, neurons / 8 rounded up]; `unpack` makes bool of rows."""
        if layer not in self.layers:
            raise ValueError(f"the neurons of layer {layer} are not recorded")
        return self._map(_fired_file(layer), "uint8", -(-self.neurons // 8))

    def ids(self) -> npt.NDArray[np.int32]:
        """Read-only map int32 [windows, length] of the token ids."""
        return self._map("ids.bin", "<i4", self.length)

    def unpack(self, fired: Bits) -> npt.NDArray[np.bool_]:
        """bool [rows, neurons] of some rows of `fired`."""
        bits = np.unpackbits(fired, axis=1, count=self.neurons, bitorder="little")
        return bits.view(np.bool_)

    def files(self) -> dict[str, int]:
        """Names of its files but the meta file, with the bytes that each must have."""
        x_bytes = self.tokens * self.hidden * np.dtype(self.x_dtype).itemsize
        files = {_x_file(layer): x_bytes for layer in self.x_layers}
        fired_bytes = self.tokens * -(-self.neurons // 8)
        files |= {_fired_file(layer): fired_bytes for layer in self.layers}
        return files | {"ids.bin": 4 * self.tokens}

    def _map(self, name: str, dtype: str, width: int) -> npt.NDArray[Any]:
        mapped = np.memmap(self.folder / name, np.dtype(dtype), "r")
        return mapped.reshape(-1, width)


def _x_layers(layers: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({near for layer in layers for near in (layer - 1, layer)}))


def _x_file(layer: int) -> str:
    return f"x-{'embedding' if layer == EMBEDDING else f'{layer:03}'}.bin"


def _fired_file(layer: int) -> str:
    return f"fired-{layer:03}.bin"


def recording_bytes(geometry: Geometry, tokens: int, layers: Iterable[int] | None = None) -> int:
    """Bytes on the drive of a recording of `tokens` tokens; `layers` None: of all layers."""
    return sum(_planned(Path(), geometry, tokens, layers).files().values())


def _planned(
    folder: Path, geometry: Geometry, tokens: int, layers: Iterable[int] | None
) -> Recording:
    """The recording that will be there, but for what the text decides."""
    chosen = tuple(sorted(set(range(geometry.layers) if layers is None else layers)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= geometry.layers:
        raise UserError(f"the model has layers 0 to {geometry.layers - 1}, not {list(chosen)}")
    return Recording(
        folder=folder,
        store_id="",
        text_digest="",
        tokens=tokens,
        length=0,
        hidden=geometry.hidden,
        neurons=geometry.neurons,
        x_dtype="float32" if geometry.dtype == "float32" else "float16",
        layers=chosen,
    )


def text_digest(ids: Ids) -> str:
    """Hex digest of token ids [windows, length]: the same text, cut alike, has the same."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i4").tobytes()).hexdigest()


def windows_per_pass(geometry: Geometry, length: int) -> int:
    """Windows of `length` tokens for one forward pass: as many as make BATCH_TOKENS, fewer where
    activations would take more than ACTIVATION_BYTES, and one whatever its length."""
    token_bytes = 4 * _ROWS_ALIVE * geometry.hidden
    return max(1, min(BATCH_TOKENS, ACTIVATION_BYTES // token_bytes) // length)


def record(
    store: Store,
    ids: Ids,
    folder: Path,
    *,
    layers: Sequence[int] | None = None,
    batch: int | None = None,
    keep_bytes: int = KEEP_BYTES,
    progress: Progress = lambda done, total: None,
) -> Recording:
    """Runs the store's model over windows `ids` [count, length] and records it in `folder`.

    A finished recording of the same store, text and layers is returned as it is; any other that is
    there is replaced. Stopped at any moment, it leaves nothing that opens.

    Args:
        layers: whose neurons are wanted, None: all. Layers after the last are not run.
        batch: windows in a forward pass; None: see `windows_per_pass`.
        keep_bytes: allowance for layers that stay in memory (see `load_streamed`).

    `UserError` if the drive lacks room, or another process records there; `StoreError` for a
    damaged store.
    """
    count, length = ids.shape
    plan = dataclasses.replace(
        _planned(folder, store.geometry, count * length, layers),
        store_id=store.id,
        text_digest=text_digest(ids),
        length=length,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        with contextlib.suppress(UserError):
            if (found := Recording.open(folder)) == plan:
                progress(plan.tokens, plan.tokens)
                return found
        _check_room(plan)
        _clear(folder)
        batch = batch or windows_per_pass(store.geometry, length)
        _write(store, plan, ids, batch, keep_bytes, progress)
    return Recording.open(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / LOCK).open("wb") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process is recording in {folder}: wait for it or stop it"
            ) from None
        yield


def _ours(folder: Path) -> list[Path]:
    """Files of any recording in `folder`, the meta file first."""
    names = (META, f"{META}.tmp", "x-*.bin", "fired-*.bin", "ids.bin")
    return [path for name in names for path in sorted(folder.glob(name))]


def _clear(folder: Path) -> None:
    for path in _ours(folder):
        path.unlink()
    sync_folder(folder)  # the meta file is gone before another byte is written


def _check_room(plan: Recording) -> None:
    needed_bytes = sum(plan.files().values())
    replaced_bytes = sum(path.stat().st_size for path in _ours(plan.folder))
    free_bytes = shutil.disk_usage(plan.folder).free + replaced_bytes
    if needed_bytes > free_bytes:
        fit = free_bytes * plan.tokens // needed_bytes
        raise UserError(
            f"too little disk for the recording in {plan.folder}: {needed_bytes:,} bytes needed,"
            f" {free_bytes:,} free; fewer tokens (--tokens, at most {fit:,}) need less"
        )


def _write(
    store: Store, plan: Recording, ids: Ids, batch: int, keep_bytes: int, progress: Progress
) -> None:
    with _Files(plan) as files:
        files.append("ids.bin", np.ascontiguousarray(ids, "<i4"))
        x_layers = frozenset(plan.x_layers)

        def observe(layer: int, x: torch.Tensor, fired: Bits | None) -> None:
            if layer in x_layers:
                files.append(_x_file(layer), _in_dtype(x, plan.x_dtype))
            if layer in plan.layers and fired is not None:
                files.append(_fired_file(layer), fired)

        model = load_streamed(store, observe, keep_bytes=keep_bytes, layers=plan.layers[-1] + 1)
        progress(0, plan.tokens)
        for first in range(0, len(ids), batch):
            final_states(model, ids[first : first + batch])
            progress(min(first + batch, len(ids)) * plan.length, plan.tokens)
    content = {k: v for k, v in dataclasses.asdict(plan).items() if k != "folder"}
    temporary = plan.folder / f"{META}.tmp"
    with temporary.open("w") as meta:
        json.dump({"version": _VERSION} | content, meta, indent=1)
        meta.flush()
        os.fsync(meta.fileno())
    temporary.rename(plan.folder / META)
    sync_folder(plan.folder)


def _in_dtype(x: torch.Tensor, dtype: str) -> npt.NDArray[Any]:
    if dtype == "float16":  # of a bfloat16 model it may be more than that holds
        x = x.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half()
    return np.ascontiguousarray(x.numpy())


class _Files:
    """The files of a recording in the making: appended to, and pushed out of the page cache."""

    def __init__(self, plan: Recording):
        self._stack = contextlib.ExitStack()
        self._files = {
            name: self._stack.enter_context((plan.folder / name).open("xb", buffering=0))
            for name in plan.files()
        }
        self._dirty_bytes = 0

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._stack:
            if kind is None:
                self._sync()

    def append(self, name: str, values: npt.NDArray[Any]) -> None:
        """Writes `values`, contiguous; `UserError` if the drive does not take them."""
        left = values.data.cast("B")
        try:
            while left:  # a raw write may be short
                left = left[self._files[name].write(left) :]
            self._dirty_bytes += values.nbytes
            if self._dirty_bytes >= _SYNC_BYTES:
                self._sync()
        except OSError as error:  # another process took the room, or the drive fails
            where = self._files[name].name
            raise UserError(f"{where} cannot be written: {error.strerror}") from None

    def _sync(self) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())
            forget_pages(file.fileno())
        self._dirty_bytes = 0
