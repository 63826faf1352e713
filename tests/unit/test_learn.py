"""The mathematics of fitting, on data whose answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from common.learn.closed_form import ClosedForm, moments
from common.learn.curve import GRID, LAYER_RECALL_MIN, Curve, choose_thresholds, curve_of
from common.learn.refine import balanced_loss, refine

HIDDEN, NEURONS, TOKENS = 24, 60, 3000


def made(seed: int, rank: int = HIDDEN) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated inputs [TOKENS, HIDDEN], rows of rank `rank` [NEURONS, HIDDEN], biases."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    scales = torch.logspace(0, -2, HIDDEN)
    y = normal(TOKENS, HIDDEN) * scales @ torch.linalg.qr(normal(HIDDEN, HIDDEN)).Q + 0.3
    return y, normal(NEURONS, rank) @ normal(rank, HIDDEN) / HIDDEN, normal(NEURONS) * 0.1 - 0.2


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_full_rank_of_the_same_layer_is_exact(threshold: float) -> None:
    y, weight, bias = made(1)
    form = ClosedForm(weight, bias, threshold, moments([(y, y)]), ahead=False)
    z = y @ weight.T + bias - threshold
    scores = form.factors(HIDDEN).scores(y)
    clear = z.abs() > 1e-3 * z.std()
    assert ((scores > 0) == (z > 0))[clear].all()


def test_rows_of_low_rank_need_no_more() -> None:
    y, weight, bias = made(2, rank=5)
    form = ClosedForm(weight, bias, 0.0, moments([(y, y)]), ahead=False)
    z = y @ weight.T + bias
    clear = z.abs() > 1e-2 * z.std()
    assert ((form.factors(5).scores(y) > 0) == (z > 0))[clear].all()
    assert ((form.factors(2).scores(y) > 0) != (z > 0))[clear].any()


def test_activations_decide_what_a_small_rank_keeps() -> None:
    """At every rank nearer to the true pre-activations than the truncated SVD of the weights."""
    y, weight, bias = made(3)
    form = ClosedForm(weight, bias, 0.0, moments([(y, y)]), ahead=False)
    z = y @ weight.T + bias
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    center = y.mean(0)
    for rank in (2, 4, 8):
        ours = form.factors(rank)
        scale = z.std(0) / ours.scores(y).std(0)
        plain = (y - center) @ (u[:, :rank] * s[:rank] @ v[:rank]).T + weight @ center + bias
        best = ours.scores(y) * scale
        best = best + (z - best).mean(0)
        assert ((best - z) ** 2).mean() < ((plain - z) ** 2).mean()


def test_look_ahead_finds_what_is_linear_in_its_features() -> None:
    y, weight, bias = made(4)
    random = torch.Generator().manual_seed(5)
    f = torch.cat([y @ torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=random)).Q,
                   torch.randn(TOKENS, HIDDEN, generator=random)], 1)  # fmt: skip
    form = ClosedForm(weight, bias, 0.0, moments([(f, y)]), ahead=True)
    fires = y @ weight.T + bias > 0
    named = form.factors(HIDDEN).scores(f) > 0
    assert (named == fires).float().mean() > 0.99


def test_moments_do_not_depend_on_the_blocks() -> None:
    y, _, _ = made(6)
    whole = moments([(y, y)])
    parts = moments((b, b) for b in y.split(700))
    for name in ("mean_f", "cov_f", "cov_fy", "cov_y"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))
    torch.testing.assert_close(whole.cov_y, torch.cov(y.T, correction=0), atol=1e-5, rtol=1e-4)


def test_no_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        moments([])


def test_refinement_lowers_the_balanced_loss() -> None:
    y, weight, bias = made(7)
    fires = y @ weight.T + bias > 0
    start = ClosedForm(weight, bias, 0.0, moments([(y, y)]), ahead=False).factors(6)
    after = refine(start, TOKENS, lambda numbers: (y[numbers], fires[numbers]), 20, seed=1)
    before, found = (float(balanced_loss(f.scores(y), fires)) for f in (start, after))
    assert found < 0.97 * before
    again = refine(start, TOKENS, lambda numbers: (y[numbers], fires[numbers]), 20, seed=1)
    assert torch.equal(after.b, again.b), "the same seed gives the same factors"


def curve(seed: int, shift: float) -> tuple[Curve, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    fired = random.random((200, 30)) < 0.1
    scores = (random.normal(size=fired.shape) + shift * fired - 1).astype(np.float32)
    return curve_of(scores, fired), scores, fired


def test_a_curve_counts_what_is_above_each_threshold() -> None:
    found, scores, fired = curve(1, 2.0)
    scores[0, :3] = (-99.0, 99.0, GRID[700])  # beyond the grid, and on it
    found = curve_of(scores, fired)
    for place in range(0, len(GRID), 50):
        above = scores > GRID[place]
        assert found.named[place] == above.sum()
        assert found.hits[place] == (above & fired).sum()
    assert (found.active, found.silent) == (fired.sum(), (~fired).sum())
    place = found.at_recall(0.95)
    assert found.recall(place) >= 0.95 > found.recall(place + 1)


def test_thresholds_name_as_few_as_any_that_find_as_much() -> None:
    curves = [curve(seed, shift)[0] for seed, shift in ((1, 4.0), (2, 1.5), (3, 2.5))]
    active = sum(c.active for c in curves)
    for recall in (0.92, 0.97):
        places = choose_thresholds(curves, recall)
        hits = sum(int(c.hits[p]) for c, p in zip(curves, places, strict=True))
        named = sum(int(c.named[p]) for c, p in zip(curves, places, strict=True))
        assert hits >= recall * active
        some = [range(c.at_recall(0.999), c.at_recall(LAYER_RECALL_MIN), 12) for c in curves]
        for other in itertools.product(*some):
            if sum(int(c.hits[p]) for c, p in zip(curves, other, strict=True)) >= hits:
                assert named <= sum(int(c.named[p]) for c, p in zip(curves, other, strict=True))


def test_no_layer_is_given_up() -> None:
    curves = [curve(1, 6.0)[0], curve(2, 0.0)[0]]  # one is easy, one is noise
    places = choose_thresholds(curves, 0.93)
    assert curves[1].recall(places[1]) >= LAYER_RECALL_MIN
