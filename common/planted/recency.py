"""Attention by distance alone: heads that look at the latest tokens, whatever these are. Pure.

A head whose query and key hold only positions scores two tokens by their distance t:

    score(t) = sum over j of gains[j] × cos(frequencies[j] × t)

With gains of a Lorentzian, κ / (w² + κ²) on frequencies in geometric steps, the score falls from
PEAK nearly as PEAK × exp(-κt): by 1 / length per token at first, since κ = 1 / (PEAK × length).
After softmax the weights fall as exp(-t / length), and what is far away shares about exp(-PEAK)
a token.
"""

from __future__ import annotations

import torch

PEAK = 12.0


def gains(frequencies: torch.Tensor, length: float) -> torch.Tensor:
    """Gains [j] of a head that looks back `length` tokens, for frequencies [j] in rad per token."""
    kappa = 1.0 / (PEAK * length)
    found = frequencies * kappa / (frequencies**2 + kappa**2)
    return found * (PEAK / found.sum())


def weights(frequencies: torch.Tensor, length: float, loudness: torch.Tensor) -> torch.Tensor:
    """Attention weights [..., tokens, tokens] of such a head, over each token and those before it.

    `loudness` [..., tokens] is how loud each token's position is, around 1: a norm makes it so, and
    a score is a product of two of them.
    """
    tokens = loudness.shape[-1]
    cosines = torch.cos(frequencies.double()[:, None] * torch.arange(tokens))
    scores = (gains(frequencies.double(), length) @ cosines).float()
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)
    heard = scores[back.clamp_min(0)] * loudness[..., :, None] * loudness[..., None, :]
    return torch.where(back >= 0, heard, -torch.inf).softmax(dim=-1)


def power(latest: torch.Tensor) -> float:
    """The variance of a token's sum, by its weights [tokens], of values of variance 1."""
    return float(latest.square().sum())


def reuse(latest: torch.Tensor, lags: int) -> float:
    """How alike such sums are, `lag` tokens apart: the correlation's mean over 1 to `lags`."""
    near = latest.flip(0)  # by distance
    products = [float(near[:-lag] @ near[lag:]) for lag in range(1, lags + 1)]
    return sum(products) / lags / power(latest)
