"""What a bench runs on, in its work folder: made once, and taken again while its parameters match.

    WORK/SHAPE-KEY/checkpoint        planted, Hugging Face layout (common/planted/)
    WORK/SHAPE-KEY/store             converted from it, with the planted predictors
    WORK/SHAPE-KEY/store-FORMAT      the same with packed bundles, its resident files the store's
    WORK/SHAPE-KEY/model.gguf        for llama.cpp (rivals/gguf.py)
    WORK/SHAPE-KEY/model-FORMAT.gguf the same quantised
    WORK/SHAPE-KEY/planted*.json     what the plant was measured to be in each store, by its id

KEY stands for the configuration, the seed and the versions of what writes these. Nothing is there
under its own name before it is whole. Whether the disk has room for all that is to be made is
checked before anything is written, and again before each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.bench.contenders import why_absent
from common.bench.names import GGUF, PACKED
from common.bench.rivals.gguf import unfinished_gguf
from common.bench.rivals.program import read_result
from common.errors import StoreError, UserError
from common.launch import CHECKOUT
from common.lowrank import has_predictors
from common.model.convert import Report, Silent, convert
from common.model.families import family_named, geometry_of
from common.planted import checkpoint as planted_checkpoint
from common.planted.check import measure
from common.planted.checkpoint import UNFINISHED_SUFFIX, make_checkpoint, tensor_shapes
from common.planted.families import plant_of
from common.planted.predictors import plant_predictors
from common.planted.shapes import config_of
from common.planted.shards import checkpoint_bytes
from common.store.geometry import Geometry
from common.store.manifest import RESIDENT_DIR
from common.store.manifest import VERSION as STORE_VERSION
from common.store.partial import partial_bytes
from common.store.store import Store

SEED = 0
_SPARE = 1.05  # configuration, predictors, checksums
_DTYPE = "float16"  # of planted weights

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """A model to make: transformers' configuration, and the sizes that follow from it."""

    name: str
    config: Any
    tensors: Mapping[str, tuple[int, ...]]  # the checkpoint's
    geometry: Geometry  # of a store that is not packed

    @property
    def checkpoint_bytes(self) -> int:
        return checkpoint_bytes(list(self.tensors.items()))

    @property
    def context(self) -> int:
        """Tokens, at most."""
        return int(self.config.max_position_embeddings)

    @property
    def resident(self) -> dict[str, tuple[int, ...]]:
        """The tensors that do not lie in bundles."""
        family, geometry = family_named(self.config.model_type), self.geometry
        ffn = {family.tensor(i, part) for i in range(geometry.layers) for part in geometry.parts}
        return {name: shape for name, shape in self.tensors.items() if name not in ffn}

    @property
    def resident_bytes(self) -> int:
        """The same in every store."""
        return checkpoint_bytes(list(self.resident.items()))

    def store_bytes(self, packed: str = "") -> int:
        """Of a store whose bundles are packed so."""
        return self.resident_bytes + dataclasses.replace(self.geometry, packed=packed).ffn_bytes

    def gguf_bytes(self, number_format: str) -> int:
        """Of a GGUF file: as much as the checkpoint, or a scale for each 32 numbers beside them."""
        count = self.checkpoint_bytes // 2
        per_block = {"f16": 64, "q8_0": 34, "q4_0": 18}
        head = (34 - 18) * self.geometry.hidden * int(self.config.vocab_size)
        return (count * per_block[number_format] + head * (number_format == "q4_0")) // 32

    @property
    def key(self) -> str:
        """Changes with whatever changes the bytes that are made."""
        written = self.config.to_dict()
        for where in ("transformers_version", "_name_or_path"):
            written.pop(where, None)
        facts = [written, SEED, planted_checkpoint.VERSION, STORE_VERSION]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Made:
    """Paths of what was made."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def store(self) -> Path:
        return self.packed_store("")

    def packed_store(self, packed: str) -> Path:
        """The store whose bundles are packed so; "": not."""
        return self.folder / f"store{_suffix(packed)}"

    def gguf(self, number_format: str) -> Path:
        return self.folder / f"model{_suffix(number_format.replace('f16', ''))}.gguf"

    def planted(self, packed: str) -> Path:
        return self.folder / f"planted{_suffix(packed)}.json"


def _suffix(number_format: str) -> str:
    return f"-{number_format}" if number_format else ""


def shape_of(shape: str | Path) -> Shape:
    """A shape by its name (common/planted/shapes.py) or from a config.json; `UserError`."""
    config = config_of(shape)
    geometry = geometry_of(family_named(config.model_type), config, _DTYPE)
    name = shape.stem if isinstance(shape, Path) else shape
    return Shape(name, config, dict(tensor_shapes(config, plant_of(config))), geometry)


@dataclass(frozen=True)
class _Piece:
    """Something to make."""

    what: str
    bytes: int  # that it will take of the disk
    make: Callable[[], object]
    passing: int = 0  # that it takes beside them until it is whole


def make(
    shape: Shape, work: Path, python: str, names: Sequence[str], report: Report, *,
    checkpoint: bool = False,
) -> Made:  # fmt: skip
    """Makes what is missing of a shape in `work`; the store that is not packed always.

    Args:
        python: the interpreter of the rivals' packages: it writes GGUF files.
        names: contenders that will run; see `gguf_absent`.
        report: is told of bytes and stages.
        checkpoint: whether it is needed though none of `names` runs on it; it need not be there
            once the others are made.
    """
    made = Made(work / f"{shape.name}-{shape.key}")
    pieces = _pieces(shape, made, python, names, report, checkpoint)
    for place, piece in enumerate(pieces):
        check_room(shape, work, names, pieces[place:], checkpoint)
        made.folder.mkdir(parents=True, exist_ok=True)
        piece.make()
    return made


def _pieces(
    shape: Shape, made: Made, python: str, names: Sequence[str], report: Report, checkpoint: bool
) -> list[_Piece]:
    """What is missing, in the order in which it can be made."""
    pieces = []
    for packed in ["", *(PACKED[name] for name in names if name in PACKED)]:
        path = made.packed_store(packed)
        if not _is_store(path):
            what = f"the {packed} store" if packed else "the store"
            size = 0 if path.exists() else shape.store_bytes(packed)
            size -= partial_bytes(path)  # taken up again
            shared = min(max(0, size), shape.resident_bytes) if packed else 0
            making = partial(_make_store, made, packed, report)
            pieces.append(_Piece(what, max(0, size) - shared, making, shared))
    for number_format in dict.fromkeys(GGUF[name] for name in names if name in GGUF):
        path = made.gguf(number_format)
        if not path.exists():
            what = f"the {number_format.upper()} GGUF file"
            size = shape.gguf_bytes(number_format) - _bytes_of(unfinished_gguf(path))
            writing = partial(_make_gguf, made, number_format, python, report)
            pieces.append(_Piece(what, max(0, size), writing))
    if (pieces or checkpoint or "accelerate" in names) and not made.checkpoint.exists():
        left = made.checkpoint.with_name(made.checkpoint.name + UNFINISHED_SUFFIX)
        size = shape.checkpoint_bytes - _bytes_of(left)
        planting = partial(_make_checkpoint, shape, made, report)
        pieces.insert(0, _Piece("the checkpoint", max(0, size), planting))
    return pieces


def _bytes_of(path: Path) -> int:
    """Of an unfinished file or folder, which makes room for the next try; 0 if there is none."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _make_checkpoint(shape: Shape, made: Made, report: Report) -> None:
    report.note(f"planting a checkpoint of {shape.name} in {made.checkpoint}")
    make_checkpoint(shape.config, made.checkpoint, SEED, report)


def _make_store(made: Made, packed: str, report: Report) -> None:
    path = made.packed_store(packed)
    if not path.exists():
        report.note(f"converting it into {path}")
        convert(made.checkpoint, path, report, bundles=packed or "float")
    if packed:
        _share_resident(made.store, path)
    # The same for each: in all of them the neurons lie as in the checkpoint.
    plant_predictors(made.checkpoint, Store.open(path))


def _share_resident(plain: Path, packed: Path) -> None:
    """Makes the packed store's resident files, which are the plain one's, links to them: a third of
    a model less on the disk. Where a file system has no links they stay copies."""
    digests = {entry.path: entry.sha256 for entry in Store.open(plain).manifest.files}
    for entry in Store.open(packed).manifest.files:
        ours, theirs = packed / entry.path, plain / entry.path
        same = entry.path.startswith(RESIDENT_DIR) and digests.get(entry.path) == entry.sha256
        if same and not ours.samefile(theirs):
            link = ours.with_name(ours.name + ".link")
            with contextlib.suppress(OSError):
                link.hardlink_to(theirs)
                link.replace(ours)


def _make_gguf(made: Made, number_format: str, python: str, report: Report) -> None:
    path = made.gguf(number_format)
    report.note(f"writing {path} for llama.cpp")
    write_gguf(made.checkpoint, path, python, number_format, report)


def check_room(
    shape: Shape, work: Path, names: Sequence[str], pieces: Sequence[_Piece], checkpoint: bool
) -> None:
    """`UserError` unless the disk of the folder `work` has room for what is to be written: what
    needs how much, and which of the contenders `names` would do with less."""
    existing = next(p for p in (work.absolute(), *work.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if (total := _room(pieces)) <= free:
        return
    each = ", ".join(f"{piece.what} {piece.bytes:,}" for piece in pieces if piece.bytes)
    fewer, less = _fewer(shape, work, names, checkpoint, free)
    hint = ""
    if less < total:
        hint = f", or measure fewer contenders: --only {','.join(fewer)} needs {less:,}"
    raise UserError(
        f"too little disk at {work}: {total:,} bytes needed ({each}), {free:,} free; free"
        f" some, give another folder with --work{hint}"
    )


def _fewer(
    shape: Shape, work: Path, names: Sequence[str], checkpoint: bool, free: int
) -> tuple[list[str], int]:
    """Of the contenders `names` as many as there is room for, inflash in any case; and the bytes
    that they need."""
    made = Made(work / f"{shape.name}-{shape.key}")

    def needed(some: Sequence[str]) -> int:
        return _room(_pieces(shape, made, "", some, Silent(), checkpoint))

    others = [name for name in names if name != "inflash"]
    for count in range(len(others), -1, -1):
        sets = [["inflash", *some] for some in itertools.combinations(others, count)]
        best = min(sets, key=needed)
        if needed(best) <= free:
            break
    return best, needed(best)


def _room(pieces: Sequence[_Piece]) -> int:
    """The most that the pieces take of the disk while they are made one after the other."""
    taken = most = 0
    for piece in pieces:
        most = max(most, taken + piece.bytes + piece.passing)
        taken += piece.bytes
    return int(_SPARE * most)


def check_planted(made: Made, packed: str, tell: Tell) -> list[dict[str, Any]]:
    """The plant's rows in one of the stores: what, published, planted, measured
    (common/planted/check.py). Measured once for a store: it runs the model over some hundred tokens
    with the store's own bundles, and resident matrices as they are in the checkpoint."""
    store, path = Store.open(made.packed_store(packed)), made.planted(packed)
    try:
        known = json.loads(path.read_bytes())
        if known["store"] == store.id:
            return list(known["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # measured now, and written anew
    tell(f"checking the plant in {store.path} against what was published")
    rows = measure(store)
    found = [dataclasses.asdict(row) for row in rows]
    path.write_text(json.dumps({"store": store.id, "rows": found}, indent=1) + "\n")
    return found


def gguf_absent(python: str) -> str:
    """Why `python` cannot write a GGUF file; "" if it can."""
    return why_absent(_gguf_command(python))


def write_gguf(
    checkpoint: Path, path: Path, python: str, number_format: str, report: Report
) -> None:
    """Writes the checkpoint as a GGUF file, by an interpreter that has the package."""
    command = _gguf_command(python, checkpoint.absolute(), path.absolute(), number_format)
    done = 0
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=errors, text=True
    ) as program:  # fmt: skip
        try:
            for line in program.stdout or ():
                told = read_result(line) or {}
                if not done:
                    report.start(told.get("total", 0), 0)
                report.advance(told.get("done", done) - done)
                done = told.get("done", done)
        except BaseException:
            program.kill()
            raise
        program.wait()
        if program.returncode:
            errors.seek(0)
            why = (errors.read().strip().splitlines() or ["it was killed"])[-1]
            raise UserError(f"{path} was not written: {why}")


def _gguf_command(python: str, *arguments: str | Path) -> list[str | Path]:
    return [python, "-m", "common.bench.gguf_file", *arguments]


def _is_store(path: Path) -> bool:
    try:
        return has_predictors(Store.open(path))
    except StoreError:
        return False
