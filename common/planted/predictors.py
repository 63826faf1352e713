"""The planted predictors of a store: written as `inflash fit` writes fitted ones.

The factors come from planted.safetensors, the thresholds from the curves that calibration left
there, chosen for all layers together as a fit does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.errors import UserError
from common.learn.closed_form import Factors
from common.learn.curve import Curve
from common.learn.fitted import Layer, publish
from common.learn.layer import Fit
from common.lowrank import Kind
from common.planted.checkpoint import Planted
from common.store.store import Store

RECALLS: dict[Kind, float] = {"same": 0.95, "ahead": 0.97}

Ids = npt.NDArray[np.integer[Any]]


def plant_predictors(
    checkpoint_folder: Path, store: Store, orders: Sequence[Ids] | None = None
) -> None:
    """Writes the predictors of `store`, which was converted from the planted checkpoint.

    `orders`: for each layer the checkpoint's neuron that lies at each place of the store, [neurons]
    each; None: they lie as in the checkpoint. `UserError` if the two do not belong together.
    """
    planted = Planted.open(checkpoint_folder)
    if planted.layers != store.geometry.layers:
        raise UserError(
            f"{store.path} has {store.geometry.layers} layers, {checkpoint_folder} has"
            f" {planted.layers}: name the checkpoint that the store was converted from"
        )
    layers = [
        _layer(planted, number, store, None if orders is None else orders[number])
        for number in range(planted.layers)
    ]
    publish(store, layers, RECALLS, {"planted": planted.facts["targets"]})


def _layer(planted: Planted, number: int, store: Store, order: Ids | None) -> Layer:
    tensors, row = planted.factors(number), planted.facts["layers"][number]
    a, bias, p = tensors["a"].float(), tensors["bias"], tensors["p"].float()
    if (len(a), p.shape[1]) != (store.geometry.neurons, store.geometry.hidden):
        raise UserError(
            f"layer {number} of {planted.folder} is not that of {store.path}: name the checkpoint"
            " that the store was converted from"
        )
    if order is not None:
        a, bias = a[order], bias[order]
    kinds: dict[Kind, torch.Tensor] = {
        "same": p,
        "ahead": torch.cat([weight * p for weight in row["ahead"]], dim=1),
    }
    return {
        kind: Fit(
            kind, len(p), False, Factors(down, a, bias).rounded(),
            Curve(
                tensors[f"{kind}.named"].numpy(), tensors[f"{kind}.hits"].numpy(),
                row["active"], row["silent"],
            ),
        )
        for kind, down in kinds.items()
    }  # fmt: skip
