"""Low-rank predictors in closed form: from second moments to factors of every rank. Pure, torch.

Both predictors are one problem. The FFN input y of a layer is known (same layer: f = y) or is to be
guessed from features f (look-ahead); the pre-activations are z = W y + b. Ridge regression gives
the best linear guess of y from f; of all B A (f - mean) of rank r, the one nearest to W times that
guess in the mean square is the projection on the r leading directions of W L, where L Lᵀ is the
guess's covariance (reduced-rank regression; with f = y it is the activation-aware truncated SVD).
Those directions nest: one eigendecomposition serves every rank.

Each neuron's score is divided by the standard deviation of its own error, so that one threshold
for a layer means the same doubt for each of its neurons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

RIDGE = 1e-4  # of the features' mean variance, added to each
ERROR_FLOOR = 1e-2  # smallest error of a neuron's score, of the layer's mean pre-activation spread

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Moments:
    """Means and covariances over tokens, float32: of features f [d_f] and FFN inputs y [d]."""

    mean_f: torch.Tensor
    mean_y: torch.Tensor
    cov_f: torch.Tensor  # [d_f, d_f]
    cov_fy: torch.Tensor  # [d_f, d]
    cov_y: torch.Tensor  # [d, d]

    @property
    def finite(self) -> bool:
        """Whether all that was summed is: a number that is not shows in its own variance."""
        variances = (self.cov_f.diagonal(), self.cov_y.diagonal())
        return all(bool(variance.isfinite().all()) for variance in variances)


@dataclass(frozen=True)
class Factors:
    """A predictor: score = (f @ a.T) @ b.T + bias, for features f [tokens, d_f]. float32."""

    a: torch.Tensor  # [r, d_f]
    b: torch.Tensor  # [neurons, r]
    bias: torch.Tensor  # [neurons]

    def scores(self, f: torch.Tensor) -> torch.Tensor:
        """[tokens, neurons]: above the threshold, a neuron is named."""
        return torch.addmm(self.bias, f @ self.a.T, self.b.T)

    def rounded(self) -> Factors:
        """As the file holds them: a and b of equal norm, in float16."""
        scale = (self.b.norm() / self.a.norm()).sqrt()
        return Factors((self.a * scale).half().float(), (self.b / scale).half().float(), self.bias)


def moments(blocks: Iterable[Pair]) -> Moments:
    """Moments of pairs (f [tokens, d_f], y [tokens, d]); `ValueError` if there is no token."""
    count = 0
    sums: tuple[torch.Tensor, ...] = ()
    for f, y in blocks:
        if not sums:
            d_f, d = f.shape[1], y.shape[1]
            shapes = [(d_f,), (d,), (d_f, d_f), (d_f, d), (d, d)]
            sums = tuple(torch.zeros(shape) for shape in shapes)
        sums[0].add_(f.sum(0))
        sums[1].add_(y.sum(0))
        sums[2].addmm_(f.T, f)
        sums[3].addmm_(f.T, y)
        sums[4].addmm_(y.T, y)
        count += len(f)
    if not sums:
        raise ValueError("no tokens")
    mean_f, mean_y, ff, fy, yy = (s.div_(count) for s in sums)
    ff.addr_(mean_f, mean_f, alpha=-1)
    fy.addr_(mean_f, mean_y, alpha=-1)
    yy.addr_(mean_y, mean_y, alpha=-1)
    return Moments(mean_f, mean_y, ff, fy, yy)


class ClosedForm:
    """Factors of any rank for a layer whose first FFN matrix is `weight` [neurons, d], its bias
    `bias` [neurons], and whose neurons fire above `threshold`. Overwrites the moments' cov_f."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, threshold: float, m: Moments, ahead: bool
    ):
        self._mean_f = m.mean_f
        self._center = weight @ m.mean_y + bias - threshold
        guess, cov, unseen = None, m.cov_y, None
        if ahead:
            guess, cov = _ridge(m)
            unseen = ((weight @ (m.cov_y - cov)) * weight).sum(1).clamp_min_(0)
        root = _root(cov)
        seen = weight @ root  # W L, [neurons, d]
        vectors = torch.linalg.eigh(seen.T @ seen).eigenvectors.flip(1)
        self._b = seen @ vectors  # of every rank: the first r columns are rank r's
        # a = vectorsᵀ L⁻¹ (guess of y): [d, d_f]
        self._a = torch.linalg.solve_triangular(root, vectors.T, upper=False, left=False)
        if guess is not None:
            self._a = self._a @ guess.T
        self._spread = self._b.square().sum(1)
        self._unseen = torch.zeros_like(self._center) if unseen is None else unseen

    def factors(self, rank: int) -> Factors:
        """The predictor of `rank`, 1 to d."""
        a, b = self._a[:rank], self._b[:, :rank]
        variance = (self._spread - b.square().sum(1)).clamp_min_(0) + self._unseen
        error = variance.sqrt().clamp_min(ERROR_FLOOR * float(self._spread.mean().sqrt()))
        bias = self._center - b @ (a @ self._mean_f)
        return Factors(a, b / error[:, None], bias / error)


def _ridge(m: Moments) -> Pair:
    """[d_f, d], by which y - mean_y is guessed from f - mean_f, and the guess's covariance."""
    penalty = RIDGE * float(m.cov_f.diagonal().mean())
    m.cov_f.diagonal().add_(penalty)
    guess = torch.cholesky_solve(m.cov_fy, torch.linalg.cholesky(m.cov_f))
    # guessᵀ cov_f guess, by the normal equations and without a product of that size.
    cov = guess.T @ m.cov_fy - penalty * (guess.T @ guess)
    return guess, (cov + cov.T) / 2


def _root(cov: torch.Tensor) -> torch.Tensor:
    """Lower L with L Lᵀ = cov, nearly: a guess's covariance may be singular."""
    jittered = cov.clone()
    jitter = 1e-6 * float(cov.diagonal().mean())
    for _ in range(6):
        root, failed = torch.linalg.cholesky_ex(jittered)
        if not failed:
            return root
        jittered.diagonal().add_(jitter)
        jitter *= 10
    raise ValueError("the covariance of the FFN's inputs is not positive")
