"""An activation as torch computes it. Apart from `activation.py`, which needs no torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.model.activation import Activation

Act = Callable[[torch.Tensor], torch.Tensor]


def make_act(activation: Activation) -> Act:
    """The activation as a function of float32 pre-activations; 0 where a neuron does not fire.

    It may overwrite them: a block's are megabytes.
    """
    if activation.name == "relu2":
        return lambda z: F.relu_(z).square_()
    if activation.name == "fatrelu":
        return lambda z: F.threshold(z, activation.threshold, 0.0, inplace=True)
    return F.relu_
