"""Fitted layers on disk: one part per layer while fitting, then the predictors and their report.

    STORE/fit/layer-LLL.safetensors   a fitted layer: factors and curves. Parts that other machines
                                      made are copied here
    STORE/predictors.safetensors      what the predictor service reads: see common/lowrank.py
    STORE/predictors.json             the report; written last, it names the file's digest

A part carries a fingerprint of store, text and options: a part of another fit is no part of this
one. Files are written beside their place and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import save_file

from common.errors import UserError
from common.learn.closed_form import Factors
from common.learn.curve import GRID, Curve, choose_thresholds
from common.learn.layer import Fit
from common.lowrank import CACHE_SHARES, PREDICTORS, REPORT, Kind, read_metadata, tensor_name
from common.store.partial import sync_folder
from common.store.store import Store

FOLDER = "fit"
KINDS: tuple[Kind, ...] = ("same", "ahead")

Layer = Mapping[Kind, Fit]


def part_path(store: Store, layer: int) -> Path:
    return store.path / FOLDER / f"layer-{layer:03}.safetensors"


def save_part(store: Store, layer: int, fits: Layer, fingerprint: str) -> None:
    """Writes a fitted layer."""
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {}
    for kind, fit in fits.items():
        tensors |= _tensors(layer, kind, fit.factors)
        tensors[f"{kind}.named"] = torch.from_numpy(fit.curve.named)
        tensors[f"{kind}.hits"] = torch.from_numpy(fit.curve.hits)
        curve = fit.curve
        facts[kind] = {
            "rank": fit.rank,
            "refined": fit.refined,
            "active": curve.active,
            "silent": curve.silent,
            "misses": fit.misses,
        }
    path = part_path(store, layer)
    path.parent.mkdir(exist_ok=True)
    _publish(path, tensors, {"fingerprint": fingerprint, "fits": json.dumps(facts)})


def load_part(store: Store, layer: int, fingerprint: str) -> Layer | None:
    """A fitted layer, or None if there is no part of this fit."""
    path = part_path(store, layer)
    try:
        tensors = load_file(path)
        metadata = read_metadata(path)
    except (OSError, SafetensorError, ValueError):
        return None
    if metadata.get("fingerprint") != fingerprint:
        return None
    fits: dict[Kind, Fit] = {}
    for kind, facts in json.loads(metadata["fits"]).items():
        curve = Curve(
            tensors[f"{kind}.named"], tensors[f"{kind}.hits"], facts["active"], facts["silent"]
        )
        a, b, bias = (
            torch.from_numpy(tensors[tensor_name(layer, kind, field)]).float()
            for field in ("a", "b", "bias")
        )
        misses = tuple(facts.get("misses", ()))
        fits[kind] = Fit(kind, facts["rank"], facts["refined"], Factors(a, b, bias), curve, misses)
    return fits


def publish(
    store: Store, layers: Sequence[Layer], recalls: Mapping[Kind, float], facts: dict[str, Any]
) -> dict[str, Any]:
    """Chooses the thresholds of all layers, writes predictors and report; returns the report.

    `recalls`: of all layers together, on held-out text. `facts` go into the report as they are.
    """
    tensors: dict[str, torch.Tensor] = {}
    rows: list[dict[str, Any]] = [{"layer": layer} for layer in range(len(layers))]
    for kind in KINDS:
        curves = [fits[kind].curve for fits in layers]
        places = choose_thresholds(curves, recalls[kind])
        for layer, place in enumerate(places):
            fit = layers[layer][kind]
            factors = Factors(fit.factors.a, fit.factors.b, fit.factors.bias - GRID[place])
            tensors |= _tensors(layer, kind, factors)
            tokens = (fit.curve.active + fit.curve.silent) / store.geometry.neurons
            rows[layer]["active"] = fit.curve.active / tokens / store.geometry.neurons
            rows[layer][kind] = _row(fit, place)
            if fit.misses:
                rows[layer]["misses"] = list(fit.misses)
    path = store.path / PREDICTORS
    _publish(path, tensors, {"store": store.id})
    report = facts | {
        "store": store.id,
        "sha256": _digest(path),
        "bytes": path.stat().st_size,
        "cache_shares": list(CACHE_SHARES),
        "totals": {kind: _total(rows, [fits[kind].curve for fits in layers], kind)
                   for kind in KINDS},
        "layers": rows,
    }  # fmt: skip
    _write(store.path / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    return report


def _row(fit: Fit, place: int) -> dict[str, Any]:
    return {
        "rank": fit.rank,
        "refined": fit.refined,
        "threshold": round(float(GRID[place]), 6),
        "recall": fit.curve.recall(place),
        "false_negatives": 1.0 - fit.curve.recall(place),
        "false_positives": fit.curve.false_positives(place),
        "named_per_active": fit.curve.named_per_active(place),
    }


def _total(rows: list[dict[str, Any]], curves: Sequence[Curve], kind: Kind) -> dict[str, float]:
    """All layers together: sums of neurons, not means of shares."""
    active = sum(curve.active for curve in curves)
    pairs = [(row[kind], curve.active) for row, curve in zip(rows, curves, strict=True)]
    return {
        key: sum(row[key] * count for row, count in pairs) / max(active, 1)
        for key in ("recall", "named_per_active")
    }


def _tensors(layer: int, kind: Kind, factors: Factors) -> dict[str, torch.Tensor]:
    return {
        tensor_name(layer, kind, "a"): factors.a.half().contiguous(),
        tensor_name(layer, kind, "b"): factors.b.half().contiguous(),
        tensor_name(layer, kind, "bias"): factors.bias.float().contiguous(),
    }


def _publish(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    partial = path.with_suffix(".tmp")
    try:
        save_file(tensors, partial, metadata)
    except SafetensorError as error:  # no OSError: it has the system's words, and no number
        raise UserError(
            f"{path} cannot be written: {error}; see that the drive has room and may be written,"
            " and run the same command again"
        ) from None
    partial.chmod(0o644)  # safetensors lets only its owner read it
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(store: Store, text_digest: str, options: Mapping[str, Any]) -> str:
    """16 hex digits that are the same for the same store, text and options only."""
    content = json.dumps({"store": store.id, "text": text_digest, **options}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
