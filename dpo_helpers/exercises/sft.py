"""Exercises of notebook 3: the SFT loss, RMSprop, the warm-up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .core import Exercise, Mistake

_ALPHA, _EPSILON = 0.99, 1e-8  # PyTorch's defaults for RMSprop


def _sft(token_logps: Tensor, response_mask: Tensor) -> Tensor:
    return -(token_logps * response_mask).sum(dim=-1) / response_mask.sum(dim=-1)


def _sft_sum(token_logps: Tensor, response_mask: Tensor) -> Tensor:
    return -(token_logps * response_mask).sum(dim=-1)


def _sft_sign(token_logps: Tensor, response_mask: Tensor) -> Tensor:
    return -_sft(token_logps, response_mask)


def _sft_over_batch(token_logps: Tensor, response_mask: Tensor) -> Tensor:
    return -token_logps[response_mask].mean()


def _sft_mean(token_logps: Tensor, response_mask: Tensor) -> Tensor:
    return _sft(token_logps, response_mask).mean()


def _sft_everywhere(token_logps: Tensor, response_mask: Tensor) -> Tensor:
    return -token_logps.mean(dim=-1)


def _sft_over_row(token_logps: Tensor, response_mask: Tensor) -> Tensor:
    return -(token_logps * response_mask).mean(dim=-1)


def _rows() -> list[tuple[Tensor, Tensor]]:
    """Two rows with prompt and padding, then one without padding: responses of 2, 3 and 1 tokens."""
    logps = torch.tensor([[-3.0, -0.5, -2.5, -9.0, -9.0], [-4.0, -2.0, -0.25, -0.75, -9.0]])
    mask = torch.tensor([[False, True, True, False, False], [False, True, True, True, False]])
    return [(logps, mask), (torch.tensor([[-2.0, -0.5]]), torch.tensor([[False, True]]))]


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _warmup_from_zero(step: int, warmup_steps: int) -> float:
    return min(1.0, step / warmup_steps)


def _warmup_one_behind(step: int, warmup_steps: int) -> float:
    return min(1.0, step / (warmup_steps + 1))


def _warmup_early(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps)


def _warmup_uncapped(step: int, warmup_steps: int) -> float:
    return (step + 1) / (warmup_steps + 1)


def _steps() -> list[tuple[int, int]]:
    return [(0, 4), (2, 4), (3, 4), (4, 4), (9, 4), (149, 150)]


def _rmsprop(
    gradients: Sequence[float],
    *,
    corrected: bool = False,
    root: bool = True,
    inside: bool = False,
    forgets: bool = False,
    share: float = 1 - _ALPHA,
    momentum: float = 0.0,
    sign: float = -1.0,
) -> list[float]:
    """The changes of a weight over the learning rate; the keywords are what people do to the formula."""
    v = velocity = 0.0
    changes = []
    for number, g in enumerate(gradients, start=1):
        v = (0.0 if forgets else (1 - share) * v) + share * g**2
        seen = v / (1 - (1 - share) ** number) if corrected else v
        scale = (seen + _EPSILON) ** 0.5 if inside else (seen**0.5 if root else seen) + _EPSILON
        velocity = momentum * velocity + g / scale
        changes.append(sign * velocity)
    return changes


def _histories() -> list[tuple[list[float]]]:
    return [([3.0, 3.0, -1.0],), ([1e-4, 2e-4],)]  # the small one shows where the epsilon is


EXERCISES = (
    Exercise(
        "3.1", "The SFT loss of each response", 1, 5, _sft,
        (
            Mistake("You summed and did not divide",
                    "a long response then weighs more than a short one; SFT here takes the mean over its tokens",
                    _sft_sum),
            Mistake("One mean over all tokens of the batch",
                    "that is one number for the batch; the result is one a response, [B], each with its own divisor",
                    _sft_over_batch),
            Mistake("One mean over the batch",
                    "the result is a value for each response, [B]; the training loop takes their mean",
                    _sft_mean),
            Mistake("You divided by the length of the row",
                    "prompt and padding then make the loss smaller; the divisor is the number of response tokens",
                    _sft_over_row),
            Mistake("Prompt and padding are counted",
                    "the model is not to learn the prompt, and padding is no text; the mask says what is response",
                    _sft_everywhere),
            Mistake("The sign is the other way round",
                    "log-probabilities are negative and training lowers the loss, so the loss is minus their mean",
                    _sft_sign),
        ),
        cases=_rows,
    ),
    Exercise(
        "3.2", "RMSprop's first updates", 2, 8, _rmsprop,
        (
            Mistake("You corrected v for its start at 0, as Adam does",
                    "PyTorch's RMSprop does not divide v by 1 - αⁿ; that is just why its first update is so long",
                    lambda gradients: _rmsprop(gradients, corrected=True)),
            Mistake("The square root is missing",
                    "v is a mean of squares; only its root has the unit of a gradient, so that the unit cancels",
                    lambda gradients: _rmsprop(gradients, root=False)),
            Mistake("ε is under the root",
                    "PyTorch adds it after the root: under it, 1e-8 acts like 1e-4, and small gradients hardly move",
                    lambda gradients: _rmsprop(gradients, inside=True)),
            Mistake("v is forgotten between updates",
                    "keep it: v ← α·v + (1 - α)·g²; without the first term every update is as long as the first",
                    lambda gradients: _rmsprop(gradients, forgets=True)),
            Mistake("α and 1 - α are swapped",
                    "0.99 of the old v is kept and 0.01 of the new g² is added, not the reverse",
                    lambda gradients: _rmsprop(gradients, share=_ALPHA)),
            Mistake("There is momentum in it",
                    "an update uses the gradient of now; PyTorch's RMSprop has no momentum unless it is asked for",
                    lambda gradients: _rmsprop(gradients, momentum=0.9)),
            Mistake("The sign is the other way round",
                    "descent goes against the gradient: a positive one makes the weight smaller",
                    lambda gradients: _rmsprop(gradients, sign=1.0)),
        ),
        cases=_histories,
    ),
    Exercise(
        "3.3", "The warm-up factor", 1, 5, _warmup,
        (
            Mistake("The first update has a rate of 0",
                    "updates count from 0, so step / warmup_steps throws the first batch away; count from 1",
                    _warmup_from_zero),
            Mistake("One update behind",
                    "the first update gets 0 and the full rate comes one too late; the counter starts at 0, so add 1",
                    _warmup_one_behind),
            Mistake("Full rate one update too early",
                    "(step + 1) / warmup_steps is 1 at the last warm-up update already; four warm-up updates leave "
                    "five equal steps to 1",
                    _warmup_early),
            Mistake("It goes on rising",
                    "after the warm-up the factor stays at 1, so take the smaller of 1 and the line",
                    _warmup_uncapped),
        ),
        cases=_steps,
    ),
)  # fmt: skip
