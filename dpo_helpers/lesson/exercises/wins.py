"""Exercise 7.2: win rates."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from .core import Exercise, Mistake


def _points(first: Tensor, second: Tensor) -> Tensor:
    return (first > second).double() + 0.5 * (first == second).double()  # [n]


def _mean_and_error(points: Tensor) -> tuple[float, float]:
    return points.double().mean().item(), points.double().std().item() / sqrt(len(points))


def _win_rate(first: Tensor, second: Tensor) -> tuple[float, float]:
    return _mean_and_error(_points(first, second))


def _error(change: Callable[[float, int, float], float]) -> Callable[[Tensor, Tensor], tuple[float, float]]:
    """Another standard error, made of the right one, n, and the win rate."""

    def wrong(first: Tensor, second: Tensor) -> tuple[float, float]:
        rate, error = _win_rate(first, second)
        return rate, change(error, len(first), rate)

    return wrong


def _everyone(first: Tensor, second: Tensor) -> tuple[float, float]:
    return _mean_and_error(_points(first[:, None], second[None]).flatten())


def _interval(first: Tensor, second: Tensor, factor: float = 2.0) -> tuple[float, float]:
    rate, error = _win_rate(first, second)
    return rate - factor * error, rate + factor * error


def _answers() -> list[tuple[Tensor, Tensor]]:
    first = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, -1.0])
    return [
        (first, torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0, -1.0])),
        (first[:3], torch.tensor([0.0, 2.0, 2.0])),
        (torch.tensor([0.501, 2.0, -3.0, 0.0]), torch.tensor([0.5, 2.001, -4.0, 0.0])),
    ]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        "7.2", "Win rate with its standard error", 2, 8, _win_rate,
        (
            Mistake("Ties count as lost",
                    "a tie is half a win, or the two models' win rates would not add up to 1",
                    lambda first, second: _mean_and_error(first > second)),
            Mistake("Ties count as won",
                    "a tie is half a win, or both models could win more than half",
                    lambda first, second: _mean_and_error(first >= second)),
            Mistake("Ties are left out",
                    "a model that changes nothing would then be judged by the few prompts where it does",
                    lambda first, second: _mean_and_error((first > second)[first != second])),
            Mistake("What nearly ties is counted as tied",
                    "a tie is two equal rewards; a small difference is still a win",
                    lambda first, second: _mean_and_error(_points((first * 100).round(), (second * 100).round())),
                    (lambda first, second: _mean_and_error(_points(first.round(), second.round())),)),
            Mistake("Lost is −1",
                    "a win rate is a share: 1 for a win, ½ for a tie, 0 for a loss",
                    lambda first, second: _mean_and_error((first - second).sign()),
                    (lambda first, second: _mean_and_error(_points(first, second) - (first < second).double()),)),
            Mistake("That is a number of wins",
                    "the rate is their share: divide by the number of prompts",
                    lambda first, second: (_points(first, second).sum().item(), _win_rate(first, second)[1])),
            Mistake("Every answer against every other one",
                    "compare the two answers to the same prompt: what makes a prompt hard then cancels",
                    _everyone),
            Mistake("That is the difference of the rewards",
                    "a win rate asks only who is better, not by how much",
                    lambda first, second: _mean_and_error(first - second)),
            Mistake("That is the other model's win rate",
                    "asked for is how often the first one wins",
                    lambda first, second: _win_rate(second, first)),
            Mistake("The order is another one",
                    "the win rate first, then its standard error",
                    lambda first, second: _win_rate(first, second)[::-1]),
            Mistake("The standard deviation divides by n",
                    "of a sample it divides by n − 1, as torch's std does, for its mean was taken from the sample too",
                    _error(lambda error, n, rate: error * sqrt((n - 1) / n))),
            Mistake("That is the standard deviation",
                    "of single prompts; the mean of n of them scatters √n times less",
                    _error(lambda error, n, rate: error * sqrt(n)),
                    (_error(lambda error, n, rate: error * sqrt(n - 1)),)),
            Mistake("You divided by n, not by √n",
                    "variances divide by n, so standard deviations divide by √n",
                    _error(lambda error, n, rate: error / sqrt(n)),
                    (_error(lambda error, n, rate: error / sqrt(n) * sqrt((n - 1) / n)),)),
            Mistake("You divided by √(n − 1)",
                    "std has its n − 1 already; its mean over n prompts scatters √n times less",
                    _error(lambda error, n, rate: error * sqrt(n / (n - 1))),
                    (_error(lambda error, n, rate: error * sqrt(n) / (n - 1)),)),
            Mistake("That is a variance",
                    "its root is the standard error, in the unit of a share",
                    _error(lambda error, n, rate: error**2),
                    (_error(lambda error, n, rate: error**2 * n), _error(lambda error, n, rate: error**2 * sqrt(n)))),
            Mistake("Those are two standard errors",
                    "that is half the width of a 95 % interval; asked for is one",
                    _error(lambda error, n, rate: 2 * error), (_error(lambda error, n, rate: 1.96 * error),)),
            Mistake("That is an interval",
                    "asked for are its middle and one standard error, half of half its width",
                    _interval, (lambda first, second: _interval(first, second, 1.0),
                                lambda first, second: _interval(first, second, 1.96))),
            Mistake("The formula for wins and losses only",
                    "√(p(1 − p)/n) takes every prompt for won or lost; ties at ½ scatter less, so use the points' own "
                    "standard deviation",
                    _error(lambda error, n, rate: sqrt(rate * (1 - rate) / n)),
                    (_error(lambda error, n, rate: sqrt(rate * (1 - rate))),
                     _error(lambda error, n, rate: sqrt(rate * (1 - rate) / (n - 1))))),
            Mistake("Two numbers are asked for",
                    "return the win rate and its standard error",
                    lambda first, second: _win_rate(first, second)[0],
                    (lambda first, second: _win_rate(first, second)[1],)),
        ),
        cases=_answers,
    ),
)  # fmt: skip
