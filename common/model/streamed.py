"""A store's model, run in one process, its layers streamed from the store's files.

For work on text outside of the services: recording what fires, measuring perplexity. Memory holds
what lies around the layers (embeddings, last norm, head), the resident tensors of one layer, some
blocks of bundles, and as many layers as the caller allows. The FFN is computed in float32, as
compute does it for a block of tokens. Refuses bundles that are damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig

from common.errors import StoreError
from common.lowrank import EMBEDDING
from common.model.act import make_act
from common.model.families import family_named
from common.model.skeleton import build_skeleton, empty, fill, find_resident
from common.packed import unpacked
from common.store.checksum import block_checksums
from common.store.store import Store, forget_pages
from common.store.tensors import Tensor, read_exactly

BLOCK_BYTES = 32 << 20  # of bundles in one read; two lie in memory, and one as float32
KEEP_BYTES = 1 << 30  # of layers kept in memory
_ROWS = 1024  # tokens multiplied at once: bounds the pre-activations of a block
LOGITS_BYTES = 64 << 20  # of logits at once: a long text's would be gigabytes

Bits = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.integer[Any]]

Observe = Callable[[int, torch.Tensor, Bits | None], None]
"""Told, once per layer and forward pass: the layer, the FFN's input float32 [tokens, hidden], and
which neurons fired, uint8 [tokens, neurons / 8 rounded up]: neuron i is bit i % 8 (from the low
end) of byte i // 8, set where its pre-activation is above the activation's threshold. Layer -1 is
what enters decoder layer 0, and has no bits. Tokens are in order, window after window. The
tensor is the model's own: to be read, not changed."""


@dataclass
class Allowance:
    """Memory for layers that stay. What keeps something takes its bytes from `left_bytes`."""

    left_bytes: int


class Bundles:
    """A store's FFN weights, block by block, as float32.

    One block is read in a thread while the caller multiplies another. A layer is kept if, on the
    first pass over it, the allowance has room for all of it. Its bundles' checksums are verified
    on that pass.
    """

    def __init__(self, store: Store, block_bytes: int, allowance: Allowance):
        geometry = store.geometry
        self._store = store
        self._shape = (len(geometry.parts), geometry.neurons, geometry.hidden)
        # Eight neurons fill a byte of the bits that say what fired.
        count = max(8, block_bytes // geometry.stride_bytes // 8 * 8)
        self._count = min(count, geometry.neurons)
        self._raw = np.empty((2, self._count, geometry.stride_bytes), np.uint8)
        self._floats = torch.empty(0)
        if geometry.number_format != "float32":  # those are multiplied where they lie
            self._floats = torch.empty(self._shape[0], self._count, geometry.hidden)
        self._allowance = allowance
        self._kept: dict[int, torch.Tensor] = {}
        self._verified: set[int] = set()

    def blocks(self, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The layer's blocks: first neuron, and float32 [parts, some neurons, hidden].

        A block is valid until the next is asked for. `StoreError` names a damaged bundle.
        """
        if layer in self._kept:
            kept = self._kept[layer]
            for first in range(0, self._shape[1], self._count):
                yield first, kept[:, first : first + self._count]
            return
        keep_bytes = 4 * int(np.prod(self._shape))
        keep = torch.empty(self._shape) if keep_bytes <= self._allowance.left_bytes else None
        for first, block in self._read_blocks(layer):
            if keep is not None:
                kept = keep[:, first : first + block.shape[1]]
                yield first, kept.copy_(block)
            else:
                yield first, block
        self._verified.add(layer)
        if keep is not None:
            self._kept[layer] = keep
            self._allowance.left_bytes -= keep_bytes

    def _read_blocks(self, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        firsts = range(0, self._shape[1], self._count)
        checksums = None if layer in self._verified else self._store.checksums(layer)
        path = self._store.bundle_path(layer)
        # The executor ends, and with it a read under way, before the file is closed.
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1, "bundles") as reader:
            coming = reader.submit(self._read, file.fileno(), layer, 0, checksums)
            for first in firsts:
                raw = coming.result()
                if first != firsts[-1]:
                    following = first + self._count
                    coming = reader.submit(self._read, file.fileno(), layer, following, checksums)
                yield first, self._float32(raw)

    def _read(self, fd: int, layer: int, first: int, checksums: Any) -> npt.NDArray[np.uint8]:
        """The bundles from neuron `first`, in one of two buffers by turns."""
        count = min(self._count, self._shape[1] - first)
        raw = self._raw[first // self._count % 2][:count]
        offset = first * self._store.geometry.stride_bytes
        read_exactly(fd, raw.data.cast("B"), offset, self._store.bundle_path(layer))
        forget_pages(fd)
        if checksums is not None:
            wrong = np.flatnonzero(block_checksums(raw) != checksums[first : first + count])
            if len(wrong):
                raise StoreError(
                    f"layer {layer} neuron {first + int(wrong[0])} of the store"
                    f" {self._store.path} is damaged; run inflash verify, and convert the model"
                    " again"
                )
        return raw

    def _float32(self, raw: npt.NDArray[np.uint8]) -> torch.Tensor:
        """[parts, count, hidden]: of a float32 store `raw` itself, else a copy."""
        parts, _, hidden = self._shape
        geometry = self._store.geometry
        if geometry.packed:
            for index, rows in enumerate(self._floats):
                packed = raw[:, index * geometry.row_bytes : (index + 1) * geometry.row_bytes]
                rows[: len(raw)] = torch.from_numpy(unpacked(packed, geometry.packed, hidden))
            return self._floats[:, : len(raw)]
        dtype: torch.dtype = getattr(torch, geometry.dtype)
        bundles = torch.from_numpy(raw).view(dtype)[:, : parts * hidden]
        rows = bundles.unflatten(1, (parts, hidden)).transpose(0, 1)
        if dtype == torch.float32:
            return rows
        return self._floats[:, : len(raw)].copy_(rows)


class StreamedFFN(nn.Module):
    """The FFN of one layer, in the place of the model's own. Its weights are in `bundles`."""

    def __init__(self, layer: int, store: Store, bundles: Bundles, observe: Observe | None = None):
        super().__init__()
        self.layer = layer
        self.hidden, self.neurons = store.geometry.hidden, store.geometry.neurons
        self.parts = store.geometry.parts
        self.act = make_act(store.activation)
        self.threshold = store.activation.threshold
        # Not buffers: they are the store's, float32, and no part of the model's state dict.
        self.biases = {p: torch.from_numpy(b) for p, b in store.biases(layer).items()}
        self.bundles = bundles
        self.observe = observe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The FFN's output for `x` [..., hidden], in x's shape and dtype; summed in float32."""
        rows = x.reshape(-1, self.hidden).float()
        fired = None
        if self.observe is not None:
            fired = np.empty((len(rows), -(-self.neurons // 8)), np.uint8)
        out = torch.zeros_like(rows)
        if "down" in self.biases:
            out += self.biases["down"]
        for first, block in self.bundles.blocks(self.layer):
            neurons = slice(first, first + block.shape[1])
            for begin in range(0, len(rows), _ROWS):
                some = slice(begin, begin + _ROWS)
                z = self._pre(0, rows[some], block, neurons)
                if fired is not None:
                    bits = np.packbits((z > self.threshold).numpy(), axis=1, bitorder="little")
                    fired[some, first // 8 : first // 8 + bits.shape[1]] = bits
                h = self.act(z)
                if len(self.parts) == 3:
                    h *= self._pre(1, rows[some], block, neurons)
                out[some].addmm_(h, block[-1])
        if self.observe is not None:
            self.observe(self.layer, rows, fired)
        return out.to(x.dtype).view(x.shape)

    def _pre(self, part: int, x: torch.Tensor, block: torch.Tensor, neurons: slice) -> torch.Tensor:
        bias = self.biases.get(self.parts[part])
        return F.linear(x, block[part], None if bias is None else bias[neurons])


def load_streamed(
    store: Store,
    observe: Observe | None = None,
    *,
    keep_bytes: int = KEEP_BYTES,
    block_bytes: int = BLOCK_BYTES,
    layers: int | None = None,
) -> Any:
    """transformers' causal model of `store`, eval mode, on the CPU, in the store's compute dtype.

    Args:
        observe: told each layer's FFN input and what fired.
        keep_bytes: allowance for layers that stay in memory: first for resident tensors, in the
            compute dtype, then for bundles, as float32.
        block_bytes: of bundles in one read.
        layers: builds the first so many decoder layers only; None: all. Its last hidden state is
            then no model's, but what is observed on the way is.

    `StoreError` for a store that cannot be used.
    """
    config = AutoConfig.from_pretrained(store.config_dir)
    config.num_hidden_layers = store.geometry.layers if layers is None else layers
    allowance = Allowance(keep_bytes)
    bundles = Bundles(store, block_bytes, allowance)
    dtype: torch.dtype = getattr(torch, store.geometry.compute_dtype)
    model: Any = build_skeleton(
        config, lambda i: StreamedFFN(i, store, bundles, observe), dtype, attention="sdpa"
    )
    resident = find_resident(model, store.resident_paths()[: 1 + config.num_hidden_layers])
    _load_what_stays(model, resident, allowance)
    if observe is not None:
        _observe_embedding(model, observe)
    return model


def _load_what_stays(model: Any, resident: Mapping[str, Tensor], allowance: Allowance) -> None:
    """Fills what lies around the layers, and layers while the allowance lasts. The others are
    filled whenever they run. They come before bundles: in half precision as many bytes spare
    twice the reads, for those are kept as float32."""
    stay = dict(resident)
    layers = family_named(model.config.model_type).layers
    for index, layer in enumerate(model.get_submodule(layers)):
        prefix = f"{layers}.{index}."
        own = {n.removeprefix(prefix): t for n, t in resident.items() if n.startswith(prefix)}
        layer_bytes = sum(parameter.nbytes for parameter in layer.parameters())
        if layer_bytes <= allowance.left_bytes:
            allowance.left_bytes -= layer_bytes
            continue
        for name in own:
            del stay[prefix + name]
        _fill_when_run(layer, own)
    fill(model, stay)
    model.tie_weights()


def _fill_when_run(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    layer.register_forward_pre_hook(lambda layer, _: fill(layer, tensors))
    # Also where the FFN stops the pass: a caller may keep the model.
    layer.register_forward_hook(lambda layer, *_: empty(layer, tensors), always_call=True)


def _observe_embedding(model: Any, observe: Observe) -> None:
    def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else named["hidden_states"]
        observe(EMBEDDING, x.flatten(0, -2).float(), None)

    layers = model.get_submodule(family_named(model.config.model_type).layers)
    layers[0].register_forward_pre_hook(before, with_kwargs=True)


def final_states(model: Any, ids: Ids) -> torch.Tensor:
    """One forward pass over windows `ids` [count, length], each on its own: what the head is
    given, [count, length, width] in the model's dtype."""
    with torch.inference_mode():
        windows = torch.from_numpy(np.ascontiguousarray(ids, np.int64))
        found: torch.Tensor = model.base_model(input_ids=windows, use_cache=False)[0]
    return found


@dataclass(frozen=True)
class Scores:
    """How a model finds some windows.

    `nll` float32 [windows, length - 1]: the negative log likelihood, in nats, of every token after
    a window's first. `top` int64 [windows, length]: the token ranked first after each token.
    """

    first: int  # index of the first of these windows
    nll: torch.Tensor
    top: torch.Tensor


def run(model: Any, ids: Ids, batch: int, logits_bytes: int = LOGITS_BYTES) -> Iterator[Scores]:
    """The scores of windows `ids` [count, length], `batch` windows in a forward pass.

    Logits are made in blocks of about `logits_bytes`, and not kept.
    """
    for first in range(0, len(ids), batch):
        states = final_states(model, ids[first : first + batch])
        rows = max(1, logits_bytes // (4 * model.config.vocab_size))
        yield _score(model.get_output_embeddings(), states, ids, first, rows)


@torch.inference_mode()
def _score(head: nn.Linear, states: torch.Tensor, ids: Ids, first: int, count: int) -> Scores:
    windows, length, width = states.shape
    targets = torch.zeros(windows, length, dtype=torch.int64)  # the last has none
    targets[:, :-1] = torch.from_numpy(ids[first : first + windows, 1:].astype(np.int64))
    nll, top = torch.empty(windows * length), torch.empty(windows * length, dtype=torch.int64)
    rows, wanted = states.reshape(-1, width), targets.view(-1)
    for begin in range(0, len(rows), count):
        some = slice(begin, begin + count)
        logits = head(rows[some]).float()
        top[some] = logits.argmax(dim=1)
        nll[some] = F.cross_entropy(logits, wanted[some], reduction="none")
    return Scores(first, nll.view(windows, length)[:, :-1], top.view(windows, length))
