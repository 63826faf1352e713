"""What a bench runs on, in its work folder: made once, and taken again while its parameters match.

    WORK/SHAPE-KEY/checkpoint      planted, Hugging Face layout (common/planted/)
    WORK/SHAPE-KEY/store           converted from it, with the planted predictors
    WORK/SHAPE-KEY/model.gguf      for llama.cpp (rivals/gguf.py)
    WORK/SHAPE-KEY/planted.json    what the plant was measured to be, by the store's id

KEY stands for the configuration, the seed and the versions of what writes these. Nothing is there
under its own name before it is whole. Disk space is checked before anything is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.bench.contenders import why_absent
from common.errors import StoreError, UserError
from common.launch import CHECKOUT
from common.lowrank import has_predictors
from common.model.convert import Report, convert
from common.model.families import family_named, geometry_of
from common.planted import checkpoint as planted_checkpoint
from common.planted.check import measure
from common.planted.checkpoint import make_checkpoint, tensor_shapes
from common.planted.families import plant_of
from common.planted.predictors import plant_predictors
from common.planted.shapes import config_of
from common.planted.shards import checkpoint_bytes
from common.store.manifest import VERSION as STORE_VERSION
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
    checkpoint_bytes: int
    store_bytes: int
    context: int  # tokens, at most

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
        return self.folder / "store"

    @property
    def gguf(self) -> Path:
        return self.folder / "model.gguf"


def shape_of(shape: str | Path) -> Shape:
    """A shape by its name (common/planted/shapes.py) or from a config.json; `UserError`."""
    config = config_of(shape)
    geometry = geometry_of(family_named(config.model_type), config, _DTYPE)
    checkpoint = checkpoint_bytes(tensor_shapes(config, plant_of(config)))
    padding = geometry.layers * geometry.neurons * (geometry.stride_bytes - geometry.bundle_bytes)
    name = shape.stem if isinstance(shape, Path) else shape
    context = int(config.max_position_embeddings)
    return Shape(name, config, checkpoint, checkpoint + padding, context)


def make(
    shape: Shape, work: Path, python: str, checkpoint: bool, gguf: bool, report: Report
) -> Made:
    """Makes what is missing of a shape in `work`.

    Args:
        python: the interpreter of the rivals' packages: it writes the GGUF file.
        checkpoint: whether a rival needs it; the store does not once it is whole.
        gguf: whether the GGUF file is wanted; see `gguf_absent`.
        report: is told of bytes and stages.
    """
    made = Made(work / f"{shape.name}-{shape.key}")
    wants_gguf = gguf and not made.gguf.exists()
    wants_store = not _is_store(made.store)
    wants_checkpoint = (checkpoint or wants_gguf or wants_store) and not made.checkpoint.exists()
    needed = {
        "the checkpoint": shape.checkpoint_bytes if wants_checkpoint else 0,
        "the store": shape.store_bytes if wants_store and not made.store.exists() else 0,
        "the GGUF file": shape.checkpoint_bytes if wants_gguf else 0,
    }
    check_room(work, needed)
    made.folder.mkdir(parents=True, exist_ok=True)
    if wants_checkpoint:
        report.note(f"planting a checkpoint of {shape.name} in {made.checkpoint}")
        make_checkpoint(shape.config, made.checkpoint, SEED, report)
    if wants_store:
        if not made.store.exists():
            report.note(f"converting it into {made.store}")
            convert(made.checkpoint, made.store, report)
        plant_predictors(made.checkpoint, Store.open(made.store))
    if wants_gguf:
        report.note(f"writing {made.gguf} for llama.cpp")
        write_gguf(made.checkpoint, made.gguf, python)
    return made


def check_room(work: Path, needed: dict[str, int]) -> None:
    """`UserError` unless the disk of the folder `work` has room for what is to be written."""
    existing = next(p for p in (work.absolute(), *work.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    total = int(_SPARE * sum(needed.values()))
    if total > free:
        each = ", ".join(f"{what} {size:,}" for what, size in needed.items() if size)
        raise UserError(
            f"too little disk at {work}: {total:,} bytes needed ({each}), {free:,} free; free"
            " some, give another folder with --work, or leave contenders out with --only"
        )


def check_planted(made: Made, tell: Tell) -> list[dict[str, Any]]:
    """The plant's rows: what, published, planted, measured (common/planted/check.py). Measured
    once for a store: it runs the model over some hundred tokens."""
    store, path = Store.open(made.store), made.folder / "planted.json"
    try:
        known = json.loads(path.read_bytes())
        if known["store"] == store.id:
            return list(known["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # measured now, and written anew
    tell("checking the plant against what was published")
    rows = measure(store)
    found = [dataclasses.asdict(row) for row in rows]
    path.write_text(json.dumps({"store": store.id, "rows": found}, indent=1) + "\n")
    return found


def gguf_absent(python: str) -> str:
    """Why `python` cannot write a GGUF file; "" if it can."""
    return why_absent(_gguf_command(python))


def write_gguf(checkpoint: Path, path: Path, python: str) -> None:
    """Writes the checkpoint as a GGUF file, by an interpreter that has the package."""
    program = subprocess.run(
        _gguf_command(python, checkpoint.absolute(), path.absolute()),
        cwd=CHECKOUT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    if program.returncode:
        why = (program.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise UserError(f"{path} was not written: {why}")


def _gguf_command(python: str, *paths: Path) -> list[str | Path]:
    return [python, "-m", "common.bench.gguf_file", *paths]


def _is_store(path: Path) -> bool:
    try:
        return has_predictors(Store.open(path))
    except StoreError:
        return False
