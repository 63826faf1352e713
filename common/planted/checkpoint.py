"""Makes a planted checkpoint: a Hugging Face folder, and what its plant knows of it.

    config.json, generation_config.json, model-NNNNN-of-NNNNN.safetensors, their index
    planted.json           seed, targets, and what each layer's calibration found
    planted.safetensors    what the planted predictors are made of, per layer:
                           layers.L.p [rank, hidden], layers.L.a [neurons, rank],
                           layers.L.bias [neurons], and the curves of both predictors

There is no tokenizer: prompts are token ids, all equally likely. How it is planted: see
common/planted/layer.py. The folder is written beside its place and renamed: it is whole, or is not
there. The same configuration and seed give the same bytes, on one kind of processor.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from common.errors import UserError
from common.learn.curve import Curve
from common.model.convert import Report, Silent
from common.model.skeleton import meta_model
from common.outputs import sentences
from common.planted import layer as plant_layer
from common.planted.families import LOGIT_STD, Plant, plant_of
from common.planted.layer import LayerPlant, Planting
from common.planted.noise import noise_blocks, signs, token_ids
from common.planted.shards import Shapes, Shards, checkpoint_bytes
from common.store.partial import refuse_existing, sync_folder

VERSION = 1
FACTS = "planted.json"
FACTORS = "planted.safetensors"
UNFINISHED_SUFFIX = ".planting"
STREAMS = 4  # of calibration
STREAM_TOKENS = 96
_THREADS = 2  # whatever the machine has: how a product is divided among them shows in its last bits
_DISK_SPARE_BYTES = 1 << 28  # for planted.safetensors and configuration


@dataclass(frozen=True)
class Planted:
    """A planted checkpoint on disk. Made by `make_checkpoint`, or by `open` from its folder."""

    folder: Path
    facts: dict[str, Any]  # planted.json

    @classmethod
    def open(cls, folder: Path) -> Planted:
        """`UserError` if the folder is no planted checkpoint."""
        try:
            facts = json.loads((folder / FACTS).read_bytes())
            version = facts["version"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{folder} is no planted checkpoint: it has no readable {FACTS}; make one, or name"
                " another folder"
            ) from None
        if version != VERSION:
            raise UserError(f"{folder / FACTS} has version {version}, not {VERSION}: make it again")
        return cls(folder, facts)

    @property
    def layers(self) -> int:
        return len(self.facts["layers"])

    def factors(self, layer: int) -> dict[str, torch.Tensor]:
        """p, a and bias of a layer, and its curves' counts, by name."""
        with safe_open(self.folder / FACTORS, "pt") as file:
            prefix = f"layers.{layer}."
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def make_checkpoint(config: Any, folder: Path, seed: int, report: Report | None = None) -> Planted:
    """Plants a checkpoint of `config` (see `config_of`) in `folder`, which must not exist.

    `report` is told of bytes, as a conversion's is. Stopped, it leaves `folder`.planting, which the
    next run removes. `UserError` if it cannot be written.
    """
    with sentences(f"{folder} cannot be written"), torch.inference_mode(), _threads(_THREADS):
        refuse_existing(folder)
        partial = folder.with_name(folder.name + UNFINISHED_SUFFIX)
        if partial.exists():
            shutil.rmtree(partial)
        plant = plant_of(config)
        shapes = tensor_shapes(config, plant)
        total = checkpoint_bytes(shapes)
        _check_room(folder, total)
        partial.mkdir(parents=True)
        (report or Silent()).start(total, 0)
        _make(config, plant, shapes, partial, seed, report or Silent())
        refuse_existing(folder)
        partial.rename(folder)
        sync_folder(folder.parent)
    return Planted.open(folder)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_room(folder: Path, total: int) -> None:
    existing = next(p for p in folder.absolute().parents if p.exists())
    free = shutil.disk_usage(existing).free
    if free < total + _DISK_SPARE_BYTES:
        raise UserError(
            f"too little disk at {folder.parent}: {total + _DISK_SPARE_BYTES:,} bytes needed,"
            f" {free:,} free; free some, or choose another folder"
        )


def tensor_shapes(config: Any, plant: Plant) -> Shapes:
    """Names and shapes of the model's tensors, in the order in which they are written."""
    model: Any = meta_model(config, torch.float16)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for tied in model.all_tied_weights_keys:
        shapes.pop(tied, None)
    order = [plant.embedding]
    if (positions := plant.positions()) is not None:
        order.append(positions[0])
    order += _final_norm(plant, shapes)
    order += [plant.head] if plant.head else []
    for layer in range(plant.widths.layers):
        order += [name for name, _ in plant.constants(layer)]
        order += [f"{plant.prefix}.{layer}.{name}.weight" for name in plant.attention]
        ffn = [f"{plant.prefix}.{layer}.{name}.weight" for name in plant.ffn]
        if (biases := plant.biases(layer)) is not None:
            ffn = [ffn[0], biases[0], *ffn[1:], biases[1]]
        order += ffn
    if sorted(order) != sorted(shapes):
        odd = sorted(set(order) ^ set(shapes))
        raise UserError(f"a {config.model_type} with the tensors {', '.join(odd)} is not planted")
    return [(name, shapes[name]) for name in order]


def _final_norm(plant: Plant, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The last norm's weight, and its bias where it has one."""
    names = (plant.final_norm, plant.final_norm.replace("weight", "bias"))
    return [name for name in names if name in shapes]


def _make(
    config: Any, plant: Plant, shapes: Shapes, folder: Path, seed: int, report: Report
) -> None:
    shards = Shards(folder, shapes, report.advance)
    try:
        streams = _plant_ends(plant, dict(shapes), shards, seed)
        planting = Planting(plant, seed, streams, shards)
        layers = [planting.layer(layer) for layer in range(plant.widths.layers)]
        shards.close()
    except BaseException:
        shards.abandon()
        raise
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    _save_factors(folder / FACTORS, layers)
    facts = {"version": VERSION, "seed": seed, "targets": _targets(), "layers": _rows(layers)}
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _plant_ends(
    plant: Plant, shapes: dict[str, tuple[int, ...]], shards: Shards, seed: int
) -> torch.Tensor:
    """Embeddings, last norm, head. Returns the calibration's streams as they enter layer 0."""
    widths = plant.widths
    ids = token_ids(seed, "calibration", widths.vocabulary, STREAMS, STREAM_TOKENS)
    streams = torch.empty(*ids.shape, widths.hidden)
    for rows, block in noise_blocks(seed, plant.embedding, widths.vocabulary, widths.hidden):
        plant.mark(block)
        shards.write(plant.embedding, block)
        mine = (ids >= rows.start) & (ids < rows.stop)
        streams[mine] = block[ids[mine] - rows.start]
    if (positions := plant.positions()) is not None:
        shards.write(*positions)
    # Random signs, or the token with the largest logit of a tied head would be the last one again.
    turned = signs(seed, plant.final_norm, widths.hidden) * (LOGIT_STD / widths.hidden**0.5)
    for name, values in zip(
        _final_norm(plant, shapes), (turned, torch.zeros(widths.hidden)), strict=False
    ):
        shards.write(name, values)
    if plant.head is not None:
        for _, block in noise_blocks(seed, plant.head, widths.vocabulary, widths.hidden):
            shards.write(plant.head, block)
    return plant.embed(streams)


def _targets() -> dict[str, Any]:
    return {
        "signal": plant_layer.SIGNAL,
        "rate_spread": plant_layer.RATE_SPREAD,
        "slow_share": plant_layer.SLOW_SHARE,
        "lengths": plant_layer.LENGTHS,
        "ffn_share": plant_layer.FFN_SHARE,
    }


def _rows(layers: Sequence[LayerPlant]) -> list[dict[str, Any]]:
    return [
        {
            "fire_rate": layer.fire_rate,
            "shift": layer.shift,
            "attention_share": layer.attention_share,
            "reuse": layer.reuse,
            "ahead": layer.ahead,
            "active": layer.curves["same"].active,
            "silent": layer.curves["same"].silent,
        }
        for layer in layers
    ]


def _save_factors(path: Path, layers: Sequence[LayerPlant]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(layers):
        own = {"p": layer.p.half(), "a": layer.a.half(), "bias": layer.bias}
        for kind, curve in layer.curves.items():
            own |= _counts(kind, curve)
        tensors |= {f"layers.{number}.{name}": values for name, values in own.items()}
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors lets only its owner read it


def _counts(kind: str, curve: Curve) -> dict[str, torch.Tensor]:
    return {
        f"{kind}.named": torch.from_numpy(curve.named),
        f"{kind}.hits": torch.from_numpy(curve.hits),
    }
