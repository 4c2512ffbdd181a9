"""Exercises of notebook 3: the SFT loss, RMSprop, the warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .core import Exercise, Mistake

# 3.1


def _sft(token_logps: Tensor, response_mask: Tensor) -> Tensor:
    return -(token_logps * response_mask).sum(dim=-1) / response_mask.sum(dim=-1)


def _shifted_again(token_logps: Tensor, response_mask: Tensor) -> Tensor:
    return -(token_logps[:, :-1] * response_mask[:, 1:]).sum(dim=-1) / response_mask[:, 1:].sum(dim=-1)


def _rows() -> list[tuple[Tensor, Tensor]]:
    """Two rows with prompt and padding, then one without padding: responses of 2, 3 and 1 tokens."""
    logps = torch.tensor([[-3.0, -0.5, -2.5, -9.0, -9.0], [-4.0, -2.0, -0.25, -0.75, -9.0]])
    mask = torch.tensor([[False, True, True, False, False], [False, True, True, True, False]])
    return [(logps, mask), (torch.tensor([[-2.0, -0.5]]), torch.tensor([[False, True]]))]


# 3.2

_ALPHA, _EPSILON = 0.99, 1e-8  # PyTorch's defaults for RMSprop


def _rmsprop(
    gradients: Sequence[float],
    *,
    corrected: bool = False,
    root: bool = True,
    inside: bool = False,
    forgets: bool = False,
    keeps: float = _ALPHA,
    adds: float = 1 - _ALPHA,
    starts_full: bool = False,
    squared: bool = True,
    above: int = 1,
    old: bool = False,
    epsilon: float = _EPSILON,
    momentum: float = 0.0,
) -> list[float]:
    """The changes of a weight over the learning rate; the keywords are what people do to the formula."""
    v = velocity = 0.0
    changes = []
    for number, g in enumerate(gradients, start=1):
        before = v
        added = g**2 if squared else g
        v = added if starts_full and number == 1 else (0.0 if forgets else keeps * v) + adds * added
        seen = before if old else v / (1 - keeps**number) if corrected else v
        scale = (seen + epsilon) ** 0.5 if inside else (seen**0.5 if root else seen) + epsilon
        velocity = momentum * velocity + g**above / scale
        changes.append(-velocity)
    return changes


def _slip(**how: Any) -> Callable[[Sequence[float]], list[float]]:
    return lambda gradients: _rmsprop(gradients, **how)


def _positions(gradients: Sequence[float]) -> list[float]:
    changes = _rmsprop(gradients)
    return [sum(changes[: i + 1]) for i in range(len(changes))]


def _histories() -> list[tuple[list[float]]]:
    return [([3.0, 3.0, -1.0],), ([1e-4, 2e-4],), ([1.0, 0.0, -2.0, 0.5],)]  # the small one shows where the epsilon is


# 3.3


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _steps() -> list[tuple[int, int]]:
    return [(0, 4), (2, 4), (3, 4), (4, 4), (5, 4), (9, 4), (149, 150), (0, 0)]


EXERCISES = (
    Exercise(
        "3.1", "The SFT loss of each response", 1, 5, _sft,
        (
            Mistake("You summed and did not divide",
                    "a long response then weighs more than a short one; SFT here takes the mean over its tokens",
                    lambda logps, mask: -(logps * mask).sum(dim=-1)),
            Mistake("One mean over all tokens of the batch",
                    "that is one number for the batch; the result is one per response, [B], each with its own divisor",
                    lambda logps, mask: -logps[mask].mean(), (lambda logps, mask: -(logps * mask).mean(),)),
            Mistake("One mean over the batch",
                    "the result is a value for each response, [B]; the training loop takes their mean",
                    lambda logps, mask: _sft(logps, mask).mean()),
            Mistake("You divided by the length of the row",
                    "prompt and padding then make the loss smaller; the divisor is the number of response tokens",
                    lambda logps, mask: -(logps * mask).mean(dim=-1)),
            Mistake("You divided by the tokens of the whole batch",
                    "each response is divided by the number of its own tokens: sum the mask over the last dimension",
                    lambda logps, mask: -(logps * mask).sum(dim=-1) / mask.sum()),
            Mistake("You divided by the number of responses",
                    "each response is divided by the number of its own tokens; the mean over responses comes later",
                    lambda logps, mask: -(logps * mask).sum(dim=-1) / len(mask),
                    (lambda logps, mask: -(logps * mask).sum() / len(mask),)),
            Mistake("Prompt and padding are counted",
                    "the model is not to learn the prompt, and padding is no text; the mask says what is response",
                    lambda logps, mask: -logps.mean(dim=-1),
                    (lambda logps, mask: -logps.sum(dim=-1), lambda logps, mask: -logps.mean(),
                     lambda logps, mask: -logps.sum(dim=-1) / mask.sum(dim=-1))),
            Mistake("What is not response is counted",
                    "True marks the response, which is what the model is to learn",
                    lambda logps, mask: _sft(logps, ~mask)),
            Mistake("You did not sum",
                    "the result is one value per response, [B]",
                    lambda logps, mask: -logps * mask, (lambda logps, mask: -logps[mask],)),
            Mistake("You summed over the responses",
                    "rows are different texts; sum over the tokens of each, the last dimension",
                    lambda logps, mask: -(logps * mask).sum(dim=0),
                    (lambda logps, mask: -(logps * mask).sum(dim=0) / mask.sum(dim=0),)),
            Mistake("You shifted again",
                    "token_logps and response_mask fit each other as they are: both have a place for each token",
                    _shifted_again,
                    (lambda logps, mask: -(logps[:, 1:] * mask[:, :-1]).sum(dim=-1) / mask[:, :-1].sum(dim=-1),
                     lambda logps, mask: -(logps[:, :-1] * mask[:, 1:]).sum(dim=-1) / mask.sum(dim=-1),
                     lambda logps, mask: -(logps[:, 1:] * mask[:, :-1]).sum(dim=-1) / mask.sum(dim=-1))),
            Mistake("The sign is the other way round",
                    "log-probabilities are negative and training lowers the loss, so the loss is minus their mean",
                    lambda logps, mask: -_sft(logps, mask)),
        ),
        cases=_rows,
    ),
    Exercise(
        "3.2", "RMSprop's first updates", 2, 8, _rmsprop,
        (
            Mistake("You corrected v for its start at 0, as Adam does",
                    "PyTorch's RMSprop does not divide v by 1 − αⁿ; that is just why its first update is so long",
                    _slip(corrected=True)),
            Mistake("The square root is missing",
                    "v is a mean of squares; only its root has the unit of a gradient, so that the unit cancels",
                    _slip(root=False)),
            Mistake("ε is under the root",
                    "PyTorch adds it after the root: under it, 1e-8 acts like 1e-4, and small gradients hardly move",
                    _slip(inside=True)),
            Mistake("ε is missing",
                    "it keeps the division from 0/0, and makes the step of a very small gradient shorter",
                    _slip(epsilon=0.0)),
            Mistake("v is forgotten between updates",
                    "keep it: v ← α·v + (1 − α)·g²; without the first term every update is as long as the first",
                    _slip(forgets=True), (lambda gradients: [_rmsprop([g])[0] for g in gradients],)),
            Mistake("α and 1 − α are swapped",
                    "0.99 of the old v is kept and 0.01 of the new g² is added, not the reverse",
                    _slip(keeps=1 - _ALPHA, adds=_ALPHA)),
            Mistake("The new g² is added whole",
                    "v is a mean of squares, so the old v is weighed with α and the new square with 1 − α",
                    _slip(keeps=1.0, adds=1.0), (_slip(adds=1.0), _slip(keeps=1.0))),
            Mistake("α is 0.9",
                    "that is the default of other libraries; PyTorch's RMSprop has α = 0.99",
                    _slip(keeps=0.9, adds=0.1), (_slip(keeps=0.999, adds=0.001),)),
            Mistake("v starts at the first g²",
                    "it starts at 0, so the first v is 0.01·g²; that is what makes the first update ten times too long",
                    _slip(starts_full=True)),
            Mistake("The update uses the v of before",
                    "the new g² goes into v first, and the step divides by the new v",
                    _slip(old=True)),
            Mistake("There is momentum in it",
                    "an update uses the gradient of now; PyTorch's RMSprop has no momentum unless it is asked for",
                    _slip(momentum=0.9)),
            Mistake("g is not squared in v",
                    "v is a mean of squares: signs must not cancel in it, and its root has the unit of a gradient",
                    _slip(squared=False)),
            Mistake("The numerator is squared",
                    "g² is for v alone; the numerator is g itself",
                    _slip(above=2)),
            Mistake("Those are places, not changes",
                    "each entry is how far one update moves the weight, not where the weight is after it",
                    _positions),
            Mistake("Only the last change is returned",
                    "the result is a list with one change for each gradient",
                    lambda gradients: _rmsprop(gradients)[-1], (lambda gradients: _rmsprop(gradients)[0],)),
            Mistake("The sign is the other way round",
                    "descent goes against the gradient: a positive one makes the weight smaller",
                    lambda gradients: [-change for change in _rmsprop(gradients)]),
            Mistake("The direction of the gradient is lost",
                    "g² is for v alone; the numerator is g with its sign",
                    lambda gradients: [-abs(change) for change in _rmsprop(gradients)],
                    (lambda gradients: [change * abs(g) for change, g in zip(_rmsprop(gradients), gradients,
                                                                            strict=True)],)),
        ),
        cases=_histories,
    ),
    Exercise(
        "3.3", "The warm-up factor", 1, 5, _warmup,
        (
            Mistake("The first update has a rate of 0",
                    "updates count from 0, so step / warmup_steps throws the first batch away; count from 1",
                    lambda step, warmup: min(1.0, step / warmup),
                    (lambda step, warmup: min(1.0, step / max(1, warmup)),
                     lambda step, warmup: step / warmup if step < warmup else 1.0)),
            Mistake("One update behind",
                    "the first update gets 0 and the full rate comes one too late; the counter starts at 0, so add 1",
                    lambda step, warmup: min(1.0, step / (warmup + 1))),
            Mistake("Full rate one update too early",
                    "(step + 1) / warmup_steps is 1 at the last warm-up update already; four warm-up updates leave "
                    "five equal steps to 1",
                    lambda step, warmup: min(1.0, (step + 1) / warmup),
                    (lambda step, warmup: min(1.0, (step + 1) / max(1, warmup)),
                     lambda step, warmup: (step + 1) / warmup if step < warmup else 1.0,
                     lambda step, warmup: (step + 1) / (warmup + 1) if step < warmup - 1 else 1.0,
                     lambda step, warmup: min(1.0, (step + 2) / (warmup + 1)))),
            Mistake("Full rate one update too late",
                    "update warmup_steps, which is the first after the warm-up, has the full rate",
                    lambda step, warmup: min(1.0, (step + 1) / (warmup + 2))),
            Mistake("It goes on rising",
                    "after the warm-up the factor stays at 1, so take the smaller of 1 and the line",
                    lambda step, warmup: (step + 1) / (warmup + 1),
                    (lambda step, warmup: step / warmup, lambda step, warmup: (step + 1) / warmup,
                     lambda step, warmup: step / (warmup + 1))),
            Mistake("It is never below 1",
                    "the smaller one of 1 and the line is asked for: min, not max",
                    lambda step, warmup: max(1.0, (step + 1) / (warmup + 1))),
            Mistake("Whole numbers only",
                    "// drops what is behind the point; divide with /",
                    lambda step, warmup: min(1, (step + 1) // (warmup + 1))),
            Mistake("It falls",
                    "the rate starts small and rises to its full size",
                    lambda step, warmup: max(0.0, 1 - (step + 1) / (warmup + 1)),
                    (lambda step, warmup: 1 - min(1.0, (step + 1) / (warmup + 1)),
                     lambda step, warmup: 1 - (step + 1) / (warmup + 1),
                     lambda step, warmup: max(0.0, 1 - step / (warmup + 1)))),
            Mistake("It is always 1, or nearly so",
                    "mind the brackets: the sum step + 1 is divided by the sum warmup_steps + 1",
                    lambda step, warmup: 1.0, (lambda step, warmup: min(1.0, step + 1 / (warmup + 1)),)),
        ),
        cases=_steps,
    ),
)  # fmt: skip
