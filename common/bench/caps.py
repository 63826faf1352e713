"""Which cap inflash can run under, by a shape alone: known before anything is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.bench.made import Shape
from common.cgroup import machine_bytes
from common.config import Settings, read_settings
from common.errors import SettingError, UserError
from common.limits import PREFILL_ROWS_MIN
from common.lowrank import AHEAD_PARTS
from common.plan import SLOTS_MIN, Needs, divide
from common.planted.layer import rank_of
from common.resident import resident_bytes, spare_embedding_bytes
from common.store.geometry import Geometry
from common.store.tensors import Tensor

CAP_SHARE = 2  # the default cap is half of the checkpoint
CACHE_SHARE = 20  # of the FFN a twentieth is cached: with less there is no cache to measure
_ITEM_BYTES = 2  # of a planted weight
_HEADER_BYTES = 256  # of a safetensors file, for each tensor: these count as resident, too


@dataclasses.dataclass(frozen=True)
class Asked:
    """A run of inflash under the cap: what for, a server's settings by name, its bundles."""

    what: str
    settings: Mapping[str, str]
    packed: str = ""


def default_cap(shape: Shape, runs: Iterable[Asked]) -> int:
    """Bytes of memory where none were asked for: half of the checkpoint, or what every one of
    `runs` can live with."""
    half = shape.checkpoint_bytes // CAP_SHARE
    return max([half, *(_least(shape, run) for run in runs)])


def check_cap(shape: Shape, cap_bytes: int, runs: Iterable[Asked]) -> None:
    """`UserError` if a server would refuse one of `runs`; it names the smallest budget that works.
    The cap is in their settings, as `memory`."""
    if cap_bytes > machine_bytes():
        raise UserError(
            f"--cap: {cap_bytes:,} bytes are more than this machine has, {machine_bytes():,}"
        )
    for run in runs:
        try:
            settings = settings_of(run)
            divide(settings, needs_of(shape, settings, run.packed))
        except SettingError as error:
            raise UserError(
                f"{run.what} cannot run under the cap of {cap_bytes:,} bytes: {error}"
            ) from None


def settings_of(run: Asked) -> Settings:
    """A server's settings before there is a store; `SettingError` names a bad key."""
    environ = {f"INFLASH_{key.upper()}": value for key, value in run.settings.items()}
    return read_settings(environ | {"INFLASH_STORE": "unmade"})


def needs_of(shape: Shape, settings: Settings, packed: str = "") -> Needs:
    """What a plan has to know of the shape's store, its bundles packed so, with planted predictors.
    No byte less than `common.plan.needs_of` finds once it is made, and hardly more."""
    geometry = dataclasses.replace(shape.geometry, packed=packed)
    tensors = {name: _tensor(name, size) for name, size in shape.resident.items()}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    packed_bytes = None
    if settings.resident != "float":
        packed_bytes = resident_bytes(tensors, settings.resident, geometry.compute_dtype)
    return Needs(
        geometry=geometry,
        config=shape.config.to_dict(),
        resident_bytes=sum(tensor.nbytes + _HEADER_BYTES for tensor in tensors.values()),
        predictors_bytes=_predictors_bytes(settings.predictor, geometry),
        tokenizer_bytes=0,
        named_shares=None,
        packed_bytes=packed_bytes,
        embedding_bytes=spare_embedding_bytes(sizes, settings.resident),
    )


def _tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Of an unwritten file."""
    return Tensor(name, Path(), 0, "float16", shape, _ITEM_BYTES * math.prod(shape))


def _predictors_bytes(predictor: str, geometry: Geometry) -> int:
    """Of planted predictors in memory: int8 rows with a scale each, and biases. With `exact` the
    first part of every bundle as float32."""
    if predictor in ("exact", "all"):
        exact = geometry.layers * geometry.neurons * geometry.hidden * 4
        return exact if predictor == "exact" else 0
    rank, hidden, neurons = rank_of(geometry.hidden), geometry.hidden, geometry.neurons
    each = [
        rank * (features + 4) + neurons * (rank + 4) + 4 * neurons
        for features in (hidden, AHEAD_PARTS * hidden)
    ]
    return geometry.layers * sum(each)


def _least(shape: Shape, run: Asked) -> int:
    """The least memory for a run that has a cache to speak of."""
    settings = settings_of(run)
    if settings.memory is not None:  # --set memory=...
        return settings.memory
    geometry = dataclasses.replace(shape.geometry, packed=run.packed)
    fewest = SLOTS_MIN * geometry.layers * geometry.stride_bytes
    without_budget = dataclasses.replace(
        settings,
        cache=settings.cache or f"{max(fewest, geometry.ffn_bytes // CACHE_SHARE)}",
        block=settings.block or PREFILL_ROWS_MIN,
    )
    return divide(without_budget, needs_of(shape, settings, run.packed)).memory_bytes
