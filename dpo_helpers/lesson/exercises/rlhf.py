"""Exercises of notebook c: the score of a padded row, the price in a reward, the baseline, the policy gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...run.rlhf import leave_one_out
from .core import Exercise, Mistake


def _last(scores: Tensor, attention_mask: Tensor) -> Tensor:
    return scores[torch.arange(len(scores)), attention_mask.sum(dim=1) - 1]


def _shifted(by: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda scores, mask: scores[torch.arange(len(scores)), mask.sum(dim=1) + by]


def _rows() -> list[tuple[Tensor, Tensor]]:
    scores = torch.tensor([[0.5, 2.0, -1.0, 0.75, -0.25], [1.5, 3.5, -2.0, 3.0, 0.1], [0.7, 1.1, -0.4, 0.9, 2.5]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    return [(scores, mask), (scores[1:, :4].clone(), mask[1:, :4].clone())]


def _samples() -> list[tuple[Tensor, ...]]:
    """Rewards, or scores, of 2 prompts × 4 samples and 3 × 2."""
    first = torch.tensor([[1.0, 2.0, 6.0, 0.5], [-1.0, 4.0, 0.25, 3.0]])
    return [(first,), (torch.tensor([[1.0, 3.0], [0.5, -2.5], [2.0, 0.0]]),)]


def _priced_cases() -> list[tuple[Any, ...]]:
    logps = torch.tensor([[-3.0, -2.0, -4.5, -2.5], [-1.0, -2.5, -3.5, -0.5]])
    moved = torch.tensor([[0.8, -0.4, 1.5, 0.3], [-0.6, 1.2, 0.1, 0.9]])
    (scores,), (others,) = _samples()
    return [
        (scores, logps, logps - moved, 0.5),
        (others, logps[:, :2].repeat(2, 1)[:3].clone(), (logps - 2 * moved)[:, 1:3].repeat(2, 1)[:3].clone(), 2.0),
    ]


def _watch_reward(function: Callable[..., Any], scores: Tensor, logps: Tensor, reference: Tensor, beta: float) -> Any:
    rewards = function(scores, logps.requires_grad_(), reference, beta)
    if not isinstance(rewards, Tensor):
        return {"the rewards": rewards}
    return {"the rewards": rewards.detach(), "whether a gradient flows": rewards.requires_grad}


def _watch_gradient(function: Callable[..., Any], scores: Tensor, logps: Tensor, reference: Tensor, beta: float) -> Any:
    losses = function(logps.requires_grad_(), reference, scores, beta)
    if not isinstance(losses, Tensor) or not losses.requires_grad:
        return {"the losses, which have no gradient": losses}
    (gradient,) = torch.autograd.grad(losses.sum(), logps, allow_unused=True)
    return {"the shape of the losses": list(losses.shape), "the gradient with respect to logps": gradient}


def _priced(of_ratio: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The score minus β times something made of the log-ratio, without gradient."""
    return lambda scores, logps, reference, beta: scores - beta * of_ratio((logps - reference).detach())


def _loss(
    advantage: Callable[[Tensor], Tensor] = leave_one_out,
    *,
    sign: float = 1.0,
    detached: bool = True,
    weight: Callable[[Tensor], Tensor] = lambda logps: logps,
    mean: Callable[[Tensor], Tensor] = lambda gain: gain.mean(dim=1),
    price: float = 1.0,
) -> Callable[..., Tensor]:
    """A solution of c.4 in which something may be wrong."""

    def losses(logps: Tensor, reference: Tensor, scores: Tensor, beta: float) -> Tensor:
        advantages = advantage(scores - price * beta * (logps - reference))
        return -sign * mean((advantages.detach() if detached else advantages) * weight(logps))

    return losses


def _kl_as_a_term(logps: Tensor, reference: Tensor, scores: Tensor, beta: float) -> Tensor:
    return (-leave_one_out(scores) * logps + beta * (logps - reference)).mean(dim=1)


def _with_price(price: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """A solution of c.4 with another price in the reward."""
    return lambda logps, reference, scores, beta: (
        -leave_one_out(scores - price(logps, reference, beta)).detach() * logps
    ).mean(dim=1)


def _with_itself(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean(dim=1, keepdim=True)


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        "c.1", "The score of a padded row", 1, 5, _last,
        (
            Mistake("The reward is read on padding",
                    "the last column is padding in shorter rows; the mask says how many tokens a row has",
                    lambda scores, mask: scores[:, -1], (lambda scores, mask: (scores * mask)[:, -1],)),
            Mistake("That is the first place of the padding",
                    "a row of n tokens has its last one at place n − 1, since places count from 0",
                    _shifted(0), (lambda scores, mask: scores[torch.arange(len(scores)), mask.argmin(dim=1)],)),
            Mistake("That is the last token but one",
                    "the last token is end-of-text, and it is where the score is read: only there the whole response "
                    "is known",
                    _shifted(-2)),
            Mistake("The scores of all tokens are averaged",
                    "a row has one score, that of its last token",
                    lambda scores, mask: (scores * mask).sum(dim=1) / mask.sum(dim=1),
                    (lambda scores, mask: scores.mean(dim=1),)),
            Mistake("The scores of all tokens are added up",
                    "a long row would get more for its length alone: one score counts, that of the last token",
                    lambda scores, mask: (scores * mask).sum(dim=1), (lambda scores, mask: scores.sum(dim=1),)),
            Mistake("That is the score of the first token",
                    "the first token knows nothing of the response; the last one has read it all",
                    lambda scores, mask: scores[:, 0]),
            Mistake("That is the highest score of the row",
                    "the score is read at one place, the last token, whatever stands elsewhere",
                    lambda scores, mask: scores.max(dim=1).values,
                    (lambda scores, mask: scores.masked_fill(mask == 0, -torch.inf).max(dim=1).values,)),
            Mistake("That is the place, not the score there",
                    "scores[row, place] is the score", lambda scores, mask: mask.sum(dim=1) - 1,
                    (lambda scores, mask: mask.sum(dim=1),)),
        ),
        cases=_rows,
    ),
    Exercise(
        "c.2", "The reward with the price of KL in it", 1, 5,
        lambda scores, logps, reference, beta: scores - beta * (logps - reference).detach(),
        (
            Mistake("The KL has the wrong sign",
                    "being far from the reference costs: a log-ratio above 0 must lower the reward",
                    _priced(lambda r: -r),
                    (lambda scores, logps, reference, beta: scores + beta * (logps - reference),)),
            Mistake("A gradient flows through the log-ratio",
                    "a reward is a number that judges a sample: .detach() keeps the gradient out of it",
                    lambda scores, logps, reference, beta: scores - beta * (logps - reference)),
            Mistake("The KL has the wrong direction",
                    "weights π_ref/π_θ make a mean over samples of the reference; ours come from the policy, whose "
                    "KL is the plain mean of the log-ratio",
                    _priced(lambda r: -(-r).exp() * r), (_priced(lambda r: (-r).exp() * r),)),
            Mistake("The price is the same for all samples of a prompt",
                    "the mean log-ratio of a prompt cancels against the baseline; each sample pays for itself",
                    _priced(lambda r: r.mean(dim=1, keepdim=True).expand_as(r)),
                    (_priced(lambda r: r.mean().expand_as(r)),)),
            Mistake("The reference is missing",
                    "the price is for the distance from π_ref: log π_θ − log π_ref",
                    lambda scores, logps, reference, beta: scores - beta * logps.detach(),
                    (lambda scores, logps, reference, beta: scores + beta * logps.detach(),)),
            Mistake("β is in the wrong place",
                    "β is the price of a nat: it multiplies the log-ratio alone",
                    lambda scores, logps, reference, beta: beta * scores - (logps - reference).detach(),
                    (lambda scores, logps, reference, beta: beta * (scores - (logps - reference).detach()),
                     lambda scores, logps, reference, beta: scores - (logps - reference).detach() / beta,
                     lambda scores, logps, reference, beta: scores - (beta * logps - reference).detach())),
            Mistake("β is forgotten",
                    "each nat costs β",
                    lambda scores, logps, reference, beta: scores - (logps - reference).detach()),
            Mistake("There is no price",
                    "without it the policy goes wherever the reward model likes it", _priced(torch.zeros_like)),
            Mistake("That is a ratio of probabilities",
                    "the KL is the mean of the logarithm of the ratio: subtract the log-probabilities, and leave it so",
                    _priced(lambda r: r.exp()), (_priced(lambda r: r.exp() - 1),)),
            Mistake("A sample that is nearer to the reference pays too",
                    "the log-ratio of one sample may be negative; only its mean is a KL. Its size or square has "
                    "another mean",
                    _priced(lambda r: r.abs()), (_priced(lambda r: r**2), _priced(lambda r: r**2 / 2),
                                                 _priced(lambda r: r.relu()))),
            Mistake("That is k3",
                    "its mean is the KL too, but its gradient, taken as a reward, is not: the price in the objective "
                    "is the log-ratio",
                    _priced(lambda r: (-r).exp() - 1 + r)),
        ),
        cases=_priced_cases, observe=_watch_reward,
    ),
    Exercise(
        "c.3", "The baseline that leaves one out", 1, 6, leave_one_out,
        (
            Mistake("The baseline includes the sample itself",
                    "then a good sample raises what it is compared with, and the gradient gets too small: take "
                    "the mean of the other k − 1",
                    _with_itself),
            Mistake("The mean is over all prompts",
                    "an easy prompt would make all its samples look good: compare with samples of the same prompt",
                    lambda rewards: rewards - rewards.mean(),
                    (lambda rewards: rewards - rewards.mean(dim=0),
                     lambda rewards: rewards - (rewards.sum() - rewards) / (rewards.numel() - 1))),
            Mistake("The sum still holds the sample itself",
                    "take its own reward out of the sum before you divide by k − 1",
                    lambda rewards: rewards - rewards.sum(dim=1, keepdim=True) / (rewards.shape[1] - 1)),
            Mistake("You divided by k",
                    "the other samples are k − 1",
                    lambda rewards: rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / rewards.shape[1]),
            Mistake("You divided by the number of prompts",
                    "the samples of a prompt lie along the second dimension: k is shape[1]",
                    lambda rewards: rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / len(rewards),
                    (lambda rewards: rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / (len(rewards) - 1),)),
            Mistake("The baseline is the sum of the others",
                    "it is their mean: divide by k − 1",
                    lambda rewards: rewards - (rewards.sum(dim=1, keepdim=True) - rewards)),
            Mistake("That is the baseline",
                    "the advantage is the reward minus it",
                    lambda rewards: (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1),
                    (lambda rewards: rewards.mean(dim=1, keepdim=True).expand_as(rewards),)),
            Mistake("The advantages are divided by their spread",
                    "that is GRPO's way; RLOO leaves them as they are, so that the gradient stays unbiased",
                    lambda rewards: _with_itself(rewards) / rewards.std(dim=1, keepdim=True),
                    (lambda rewards: leave_one_out(rewards) / rewards.std(dim=1, keepdim=True),
                     lambda rewards: (rewards - rewards.mean()) / rewards.std())),
            Mistake("There is no baseline",
                    "subtract the mean reward of the other samples of the same prompt", lambda rewards: rewards),
        ),
        cases=_samples,
    ),
    Exercise(
        "c.4", "The loss whose gradient is the policy gradient", 3, 10, _loss(),
        (
            Mistake("The advantage is not detached",
                    "it depends on logps through the price, and the product then has a second gradient: .detach()",
                    _loss(detached=False), (_loss(detached=False, mean=lambda gain: gain.sum(dim=1)),)),
            Mistake("The KL is a term of the loss",
                    "the log-ratio of a sample has a gradient whose mean is 0, so as a term of its own it costs "
                    "nothing: the price belongs into the reward",
                    _kl_as_a_term),
            Mistake("β is forgotten",
                    "each nat costs β", _with_price(lambda logps, reference, beta: logps - reference)),
            Mistake("The reference is missing",
                    "the price is for the distance from π_ref: log π_θ − log π_ref",
                    _with_price(lambda logps, reference, beta: beta * logps)),
            Mistake("You climb down",
                    "an optimizer minimises: the loss is minus the gain", _loss(sign=-1.0)),
            Mistake("The baseline includes the sample itself",
                    "leave_one_out takes the mean of the other samples", _loss(_with_itself)),
            Mistake("There is no baseline",
                    "the reward itself also has the right mean gradient, and far more noise: leave_one_out(rewards)",
                    _loss(lambda rewards: rewards)),
            Mistake("The price of KL is missing",
                    "the reward is the score minus β times the log-ratio", _loss(price=0.0)),
            Mistake("The KL has the wrong sign",
                    "being far from the reference costs: subtract it", _loss(price=-1.0)),
            Mistake("Samples are weighted with their probability",
                    "they were drawn with it already: log-probabilities, not probabilities", _loss(weight=torch.exp)),
            Mistake("The samples of a prompt are added up",
                    "the mean over the k samples is asked for: a sum makes the step k times as long",
                    _loss(mean=lambda gain: gain.sum(dim=1))),
            Mistake("One loss per prompt is asked for",
                    "average over the samples of a prompt and nothing else: the shape is [B]",
                    _loss(mean=lambda gain: gain.mean()),
                    (_loss(mean=lambda gain: gain), _loss(mean=lambda gain: gain.sum()),
                     _loss(mean=lambda gain: gain.mean(dim=0)))),
            Mistake("There is no gradient",
                    "only the advantage is detached; the log-probabilities keep theirs",
                    _loss(weight=torch.detach),
                    (_loss(weight=torch.detach, sign=-1.0), _loss(weight=torch.ones_like))),
            Mistake("The reward itself is made larger",
                    "a gradient must come through the log-probabilities of the samples, each weighted with its "
                    "advantage: the score of a sample does not depend on the weights",
                    _loss(weight=torch.ones_like, detached=False),
                    (_loss(lambda rewards: rewards, weight=torch.ones_like, detached=False),
                     _loss(weight=torch.detach, detached=False))),
        ),
        cases=_priced_cases, observe=_watch_gradient,
    ),
)  # fmt: skip
