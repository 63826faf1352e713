"""Refines a predictor's factors with the paper's loss: logistic, firing neurons weighted up. torch.

The closed form matches pre-activations; what counts is on which side of the threshold they lie.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.learn.closed_form import Factors

BATCH_TOKENS = 512
RATE = 2e-3  # Adam's, for factors of equal norm; falls linearly to 0
BALANCE_MAX = 16.0  # a firing neuron weighs as many silent ones as there are for it, at most this
SLOPE = 1.7  # a score is in standard deviations; the logistic curve is nearest to their law at this

Blocks = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Features float32 [batch, d_f] and fired bool [batch, neurons], of tokens by their numbers."""


def refine(
    start: Factors,
    tokens: int,
    read: Blocks,
    passes: float,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> Factors:
    """Factors after `passes` over `tokens` tokens that `read` gives; `tick` after each batch."""
    # Factors of equal norm: one learning rate then fits both.
    scale = (start.b.norm() / start.a.norm()).sqrt()
    parameters = [start.a * scale, start.b / scale, start.bias.clone()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    steps = max(1, int(passes * tokens / BATCH_TOKENS))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, steps)
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(tokens, generator=random)
    for step in range(steps):
        first = step * BATCH_TOKENS % max(tokens - BATCH_TOKENS, 1)
        f, fired = read(order[first : first + BATCH_TOKENS])
        loss = balanced_loss(Factors(*parameters).scores(f), fired)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tick()
    a, b, bias = (p.detach() for p in parameters)
    return Factors(a / scale, b * scale, bias)


def balanced_loss(scores: torch.Tensor, fired: torch.Tensor) -> torch.Tensor:
    """Logistic loss per firing neuron, firing and silent ones weighing alike (paper, section 3.1)
    up to BALANCE_MAX. `scores` and `fired` are [tokens, neurons]."""
    firing = fired.sum().clamp_min(1)
    balance = ((fired.numel() - firing) / firing).clamp(1.0, BALANCE_MAX)
    total = F.binary_cross_entropy_with_logits(
        SLOPE * scores, fired.to(scores.dtype), pos_weight=balance, reduction="sum"
    )
    return total / (firing * balance)
