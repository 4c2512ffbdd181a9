"""A judge of two answers whose faults are known: what they do to a win rate, and which of them can be taken out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..uncertainty import Interval

RIDGE = 1e-3  # keeps the fit finite where length alone tells all wins from all losses
NEWTON_STEPS = 25


@dataclass(frozen=True)
class Answers:
    """One model's answers to n prompts. rewards: what each is worth, [n]; tokens: how long it is, [n]."""

    rewards: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Judge:
    """Reads two answers to a prompt, one after the other, and says which is better.

    noise: scale of the logistic noise in its opinion, in units of reward: 0 is none, with 1 it prefers as
    Bradley-Terry says, like those who labelled the embedded world's pairs. first: what the answer that it reads first
    gains by that, per_token: what an answer gains by each of its tokens; both in units of reward.
    """

    noise: float = 0.0
    first: float = 0.0
    per_token: float = 0.0
    seed: int = 0

    def points(self, read_first: Answers, read_second: Answers, reading: int = 0) -> Tensor:
        """Of the answer read first, per prompt: 1 if it is preferred, 1/2 in a tie, else 0; [n] float64.

        reading: the noise is a function of (seed, reading), so another reading of the same answers is another opinion.
        """
        longer = read_first.tokens - read_second.tokens
        gap = read_first.rewards - read_second.rewards + self.first + self.per_token * longer  # [n]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + reading)
        uniform = torch.rand(len(gap), generator=generator, dtype=torch.float64)
        if self.noise > 0:
            gap = gap + self.noise * uniform.logit()
        return (gap > 0).double() + (gap == 0).double() / 2


def at_equal_length(
    points: Tensor, longer: Tensor, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The win rate that is left where both answers are equally long, with its bootstrap interval over prompts.

    points: of one model, [n], each 0 to 1; longer: by how many tokens its answers are the longer ones, [n].
    A logistic regression P(win) = σ(a + b·tanh(longer/s)), s the standard deviation, gives σ(a): length-controlled
    AlpacaEval (Dubois et al. 2024, arXiv 2404.04475, section 3) without its term for how hard a prompt is.
    """
    spread = longer.double().std()
    x = (longer / spread).double().tanh() if spread > 0 else torch.zeros_like(points)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(points), (resamples, len(points)), generator=generator)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = logistic_fit(points[drawn], x[drawn])[:, 0].sigmoid().quantile(tails).tolist()
    return Interval(logistic_fit(points, x)[0].sigmoid().item(), low, high, level)


def logistic_fit(points: Tensor, x: Tensor) -> Tensor:
    """(a, b) of P(win) = σ(a + b·x) by Newton's method, [..., 2]; points, x: [..., n] float64, each row by itself."""
    inputs = torch.stack([torch.ones_like(x), x], dim=-1)  # [..., n, 2]
    fitted = torch.zeros(*x.shape[:-1], 2, 1, dtype=torch.float64)
    ridge = RIDGE * torch.eye(2, dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        p = (inputs @ fitted).sigmoid()  # [..., n, 1]
        gradient = inputs.mT @ (points[..., None] - p) - ridge @ fitted
        curvature = inputs.mT @ (p * (1 - p) * inputs) + ridge
        fitted = fitted + torch.linalg.solve(curvature, gradient)
    return fitted.squeeze(-1)
