"""Conversion: a Hugging Face checkpoint becomes a store, job by job, with bounded memory.

The plan is made, and everything that can be refused is refused, before a byte is written. Then each
layer's bundles and resident tensors, what lies around the layers, the configuration, and the
manifest. Who shows the progress decides how: see `Report`.

With a trace, each layer's neurons lie in the order that common/model/placement.py finds. The
predictors of another store of the same checkpoint can come along: only their rows' order changes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.errors import StoreError
from common.lowrank import PICTURE, PREDICTORS, REPORT
from common.model.bundling import Loss, write_bundles
from common.model.checkpoint import Checkpoint, open_checkpoint
from common.model.configuration import make_config
from common.model.layout import (
    Layout,
    header_of,
    make_layout,
    placed_biases,
    safetensors_bytes,
)
from common.model.placement import carried, check_fits, open_donor, order_of_layer
from common.outputs import sentences
from common.replay import Trace, load_trace
from common.store.checksum import file_sha256
from common.store.geometry import pack_problem
from common.store.manifest import (
    BIASES,
    CONFIG_DIR,
    FileEntry,
    Manifest,
    bundle_file,
    checksum_file,
    order_file,
)
from common.store.partial import Partial, open_partial, partial_bytes, refuse_existing
from common.store.store import Order, Store, store_id
from common.store.tensors import Tensor, read_header

COPY_BYTES = 16 << 20
_CONFIG_BYTES = 32 << 20  # room on the drive for configuration, tokenizer and manifest


class Report(Protocol):
    """Who is told how a conversion goes."""

    def start(self, total_bytes: int, done_bytes: int) -> None: ...
    def advance(self, written_bytes: int) -> None: ...
    def note(self, sentence: str) -> None: ...


class Silent:
    """A report that tells nobody."""

    def start(self, total_bytes: int, done_bytes: int) -> None: ...
    def advance(self, written_bytes: int) -> None: ...
    def note(self, sentence: str) -> None: ...


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will make; sizes in bytes."""

    source: str
    family: str
    activation: str
    layers: int
    neurons: int  # per layer
    hidden: int
    dtype: str
    bundles: str  # number format of the bundles: the dtype, or what they are packed as
    bundle_bytes: int
    stride_bytes: int
    padding_share: float  # of the bundle files
    ffn_bytes: int
    resident_bytes: int
    disk_needed_bytes: int
    disk_free_bytes: int
    tokenizer: bool
    placement: str | None  # the trace that neurons are placed by
    placement_tokens: int
    predictors: str | None  # the store whose predictors come along


@dataclass(frozen=True)
class Result:
    """What a conversion made."""

    store: str
    id: str
    bytes_written: int
    bytes_resumed: int  # were there from an interrupted run
    seconds: float
    weight_error: float | None  # of packed bundles, relative, root mean square over all numbers
    weight_error_worst: float | None  # of the layer where it is largest
    worst_layer: int | None


@dataclass(frozen=True)
class _Source:
    """What a conversion is of: the checkpoint, and what was asked for beside it."""

    checkpoint: Checkpoint
    layout: Layout
    placement: Path | None
    trace: Trace | None  # of `placement`; its ids are the checkpoint's neurons
    donor: Store | None  # whose predictors come along

    @property
    def fingerprint(self) -> str:
        """Changes when a file of the checkpoint does, or the trace, or the bundles' format."""
        trace = [] if self.placement is None else [file_sha256(self.placement)]
        packed = [self.layout.geometry.packed] if self.layout.geometry.packed else []
        return " ".join([self.checkpoint.fingerprint(), *trace, *packed])

    @property
    def total_bytes(self) -> int:
        """Bytes of the store and its predictors, but for configuration, manifest and report."""
        geometry = self.layout.geometry
        orders = 4 * geometry.neurons * geometry.layers if self.trace else 0
        carried = read_header(self.donor.path / PREDICTORS) if self.donor else {}
        return self.layout.total_bytes + orders + (safetensors_bytes(carried) if carried else 0)


def plan_conversion(
    src: Path,
    dst: Path,
    placement: Path | None = None,
    predictors: Path | None = None,
    bundles: str = "float",
) -> ConversionPlan:
    """The plan for converting `src` into `dst`; `UserError` says why there is none."""
    with _sentences():
        return _plan(_prepare(src, placement, predictors, bundles), dst)


def convert(
    src: Path,
    dst: Path,
    report: Report | None = None,
    placement: Path | None = None,
    predictors: Path | None = None,
    bundles: str = "float",
) -> Result:
    """Converts the checkpoint in `src` into the store `dst`, or goes on where a run was stopped.

    Peak memory is bounded whatever the model's size. Stopped at any moment, it leaves `dst` absent
    and `dst`.partial to resume from.

    Args:
        placement: a trace of the model (common/replay.py), for the order of each layer's neurons;
            in memory it takes a byte per token and neuron of one layer, and some hundred MB.
        predictors: another store of the same checkpoint, in any order, whose predictors come along.
        bundles: number format of the bundles: "float", as in the checkpoint; "int8"; "int4".

    Raises:
        UserError: why it cannot be done.
    """
    with _sentences():
        return _convert(_prepare(src, placement, predictors, bundles), dst, report or Silent())


def _sentences() -> AbstractContextManager[None]:
    return sentences("conversion stopped", "run the same command again to resume", StoreError)


def _prepare(src: Path, placement: Path | None, predictors: Path | None, bundles: str) -> _Source:
    checkpoint = open_checkpoint(src)
    layout = make_layout(checkpoint)
    if bundles != "float":
        geometry = dataclasses.replace(layout.geometry, packed=bundles)
        if problem := pack_problem(bundles, geometry.hidden):
            raise StoreError(f"{src} has bundles that cannot be packed: {problem}")
        layout = dataclasses.replace(layout, geometry=geometry)
    trace = donor = None
    if placement is not None:
        trace = load_trace(placement)
        check_fits(trace, layout.geometry.layers, layout.geometry.neurons)
    if predictors is not None:
        donor = open_donor(predictors, layout.family.name, layout.activation, layout.geometry)
    return _Source(checkpoint, layout, placement, trace, donor)


def _plan(source: _Source, dst: Path) -> ConversionPlan:
    checkpoint, layout = source.checkpoint, source.layout
    geometry, activation = layout.geometry, layout.activation
    threshold = f" above {activation.threshold}" if activation.threshold else ""
    existing = next(p for p in dst.absolute().parents if p.exists())
    return ConversionPlan(
        source=str(checkpoint.folder),
        family=layout.family.name,
        activation=activation.name + threshold,
        layers=geometry.layers,
        neurons=geometry.neurons,
        hidden=geometry.hidden,
        dtype=geometry.dtype,
        bundles=geometry.number_format,
        bundle_bytes=geometry.bundle_bytes,
        stride_bytes=geometry.stride_bytes,
        padding_share=1 - geometry.bundle_bytes / geometry.stride_bytes,
        ffn_bytes=geometry.ffn_bytes,
        resident_bytes=layout.resident_bytes,
        disk_needed_bytes=source.total_bytes + _CONFIG_BYTES,
        disk_free_bytes=shutil.disk_usage(existing).free + partial_bytes(dst),
        tokenizer=checkpoint.has_tokenizer,
        placement=str(source.placement) if source.placement else None,
        placement_tokens=source.trace.tokens if source.trace else 0,
        predictors=str(source.donor.path) if source.donor else None,
    )


def _convert(source: _Source, dst: Path, report: Report) -> Result:
    refuse_existing(dst)
    plan = _plan(source, dst)
    if plan.disk_needed_bytes > plan.disk_free_bytes:
        raise StoreError(
            f"too little disk at {dst.parent}: {plan.disk_needed_bytes:,} bytes needed,"
            f" {plan.disk_free_bytes:,} free"
        )
    started = time.monotonic()
    with open_partial(dst, source.fingerprint) as partial:
        resumed, losses = partial.done_bytes, dict[int, Loss]()
        _tell(source, partial, report)
        for name, run in _jobs(source, losses):
            if name not in partial.done:
                entries: list[FileEntry] = []
                run(partial, entries, report.advance)
                partial.finish(name, entries)
        manifest = _manifest(source, partial)
        raw = manifest.to_json()
        if source.donor:
            made = Store(partial.folder, manifest, store_id(raw))
            _write_predictors(source.donor, made, partial, report.advance)
        partial.publish(raw)
        total = partial.done_bytes
    store = Store.open(dst)
    seconds = time.monotonic() - started
    return Result(str(dst), store.id, total - resumed, resumed, seconds, *_errors(losses))


def _errors(losses: Mapping[int, Loss]) -> tuple[float | None, float | None, int | None]:
    """Of all layers that were packed together, of the worst one, and which it is."""
    if not losses:
        return None, None, None
    worst = max(losses, key=lambda layer: losses[layer].relative)
    every = sum(losses.values(), start=Loss(0.0, 0.0))
    return every.relative, losses[worst].relative, worst


def _tell(source: _Source, partial: Partial, report: Report) -> None:
    checkpoint, layout = source.checkpoint, source.layout
    if partial.started_over:
        others = "another checkpoint, format or trace"
        report.note(f"{partial.folder} was begun from {others}: starting over")
    elif partial.done:
        report.note(f"resuming: {partial.done_bytes:,} bytes are there already")
    if layout.unused:
        shown = ", ".join(layout.unused[:3]) + (", ..." if len(layout.unused) > 3 else "")
        report.note(f"{len(layout.unused)} tensors have no place in the model: {shown}")
    if source.placement:
        report.note(f"placing neurons by {source.placement}: a large layer takes half a minute")
    if not checkpoint.has_tokenizer:
        report.note("the checkpoint has no tokenizer: the store will take token ids only")
    report.start(source.total_bytes, min(partial.done_bytes, source.total_bytes))


Advance = Callable[[int], None]
Job = Callable[[Partial, list[FileEntry], Advance], None]


def _jobs(source: _Source, losses: dict[int, Loss]) -> Iterator[tuple[str, Job]]:
    """Named pieces of work, in order. A job's files are journalled together; what packing a layer
    lost goes into `losses`."""
    layout = source.layout

    def bundles(layer: int) -> Job:
        return lambda partial, entries, advance: _write_layer(
            source, layer, losses, partial, entries, advance
        )

    def tensors(path: str, named: Mapping[str, Tensor]) -> Job:
        return lambda partial, entries, advance: _write_tensors(
            path, named, partial, entries, advance
        )

    def biases(named: Mapping[str, Tensor]) -> Job:
        return lambda partial, entries, advance: _write_tensors(
            BIASES, placed_biases(named, layout.geometry, partial.folder), partial, entries, advance
        )

    for layer in range(layout.geometry.layers):
        yield f"bundles of layer {layer}", bundles(layer)
    for path, named in layout.safetensors.items():
        yield path, biases(named) if path == BIASES and source.trace else tensors(path, named)
    yield CONFIG_DIR, lambda partial, entries, _: _write_config(source.checkpoint, partial, entries)


def _write_layer(
    source: _Source,
    layer: int,
    losses: dict[int, Loss],
    partial: Partial,
    entries: list[FileEntry],
    advance: Advance,
) -> None:
    layout = source.layout
    order: Order | None = None
    if source.trace:
        order = order_of_layer(source.trace, layer)
        with partial.file(order_file(layer), entries) as sink:
            sink.write(order.astype("<i4").tobytes())
            advance(4 * len(order))
    with partial.file(bundle_file(layer), entries) as sink:

        def write(data: memoryview) -> None:
            sink.write(data)
            advance(len(data))

        checksums, loss = write_bundles(layout.weights[layer], layout.geometry, write, order)
        if loss is not None:
            losses[layer] = loss
    with partial.file(checksum_file(layer), entries) as sink:
        sink.write(checksums.tobytes())
        advance(checksums.nbytes)


def _write_tensors(
    path: str,
    named: Mapping[str, Tensor],
    partial: Partial,
    entries: list[FileEntry],
    advance: Advance,
) -> None:
    """A safetensors file, its tensors copied in blocks."""
    buffer = memoryview(bytearray(COPY_BYTES))
    with partial.file(path, entries) as sink:
        header = header_of(named)
        sink.write(header)
        advance(len(header))
        for tensor in named.values():
            for start in range(0, tensor.nbytes, COPY_BYTES):
                part = buffer[: min(COPY_BYTES, tensor.nbytes - start)]
                tensor.read_into(part, start)
                sink.write(part)
                advance(len(part))


def _write_config(checkpoint: Checkpoint, partial: Partial, entries: list[FileEntry]) -> None:
    with tempfile.TemporaryDirectory(prefix="config.", dir=partial.folder) as scratch:
        make_config(checkpoint, Path(scratch))
        for path in sorted(Path(scratch).iterdir()):
            with partial.file(f"{CONFIG_DIR}/{path.name}", entries) as sink:
                sink.write(path.read_bytes())


def _manifest(source: _Source, partial: Partial) -> Manifest:
    checkpoint, layout = source.checkpoint, source.layout
    entries = [e for name, _ in _jobs(source, {}) for e in partial.done[name]]
    return Manifest(
        family=layout.family.name,
        activation=layout.activation,
        geometry=layout.geometry,
        source=checkpoint.folder.absolute().name,
        source_files=tuple(path.name for path in checkpoint.weight_files),
        files=tuple(entries),
    )


def _write_predictors(donor: Store, made: Store, partial: Partial, advance: Advance) -> None:
    """The donor's predictors and their report, for the store `made`, which is not yet published.
    Killed in between, they are written again."""
    entries: list[FileEntry] = []
    _write_tensors(PREDICTORS, carried(donor, made), partial, entries, advance)
    report = json.loads((donor.path / REPORT).read_bytes())
    report |= {"store": made.id, "sha256": entries[0].sha256, "bytes": entries[0].size}
    with partial.file(REPORT, entries) as sink:
        sink.write((json.dumps(report, indent=1) + "\n").encode())
    if (donor.path / PICTURE).is_file():
        with partial.file(PICTURE, entries) as sink:
            sink.write((donor.path / PICTURE).read_bytes())
