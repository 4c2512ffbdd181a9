"""Exercise 5.1: right, tied and wrong pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .core import Exercise, Mistake

Shares = tuple[float, float, float]


def _share(which: Tensor) -> float:
    return which.float().mean().item()


def _of_masks(right: Tensor, tied: Tensor, wrong: Tensor) -> Shares:
    return _share(right), _share(tied), _share(wrong)


def _shares(chosen: Tensor, rejected: Tensor) -> Shares:
    return _of_masks(chosen > rejected, chosen == rejected, chosen < rejected)


def _counts(chosen: Tensor, rejected: Tensor) -> Shares:
    right, tied, wrong = _shares(chosen, rejected)
    return right * len(chosen), tied * len(chosen), wrong * len(chosen)


def _halves(chosen: Tensor, rejected: Tensor, lost: float) -> Shares:
    right, tied, wrong = _shares(chosen, rejected)
    return right + tied / 2, tied, wrong + lost * tied


def _without_ties(chosen: Tensor, rejected: Tensor) -> Shares:
    apart = chosen != rejected
    return _share((chosen > rejected)[apart]), _share(~apart), _share((chosen < rejected)[apart])


def _chosen_above_0(chosen: Tensor, rejected: Tensor) -> Shares:
    ties = chosen == rejected
    return _of_masks((chosen > 0) & ~ties, ties, (chosen <= 0) & ~ties)


def _nearly(tied: Callable[[Tensor, Tensor], Tensor], *, apart: bool = True) -> Callable[[Tensor, Tensor], Shares]:
    """Ties are what `tied` finds; `apart`: what ties is neither right nor wrong."""

    def shares(chosen: Tensor, rejected: Tensor) -> Shares:
        ties = tied(chosen, rejected)
        rest = ~ties if apart else torch.ones_like(ties)
        return _of_masks((chosen > rejected) & rest, ties, (chosen < rejected) & rest)

    return shares


def _within(tolerance: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda chosen, rejected: (chosen - rejected).abs() <= tolerance


_NEARLY = tuple(
    _nearly(tied, apart=apart)
    for apart in (True, False)
    for tied in (_within(1e-2), _within(1e-3), _within(1e-7), torch.isclose, lambda a, b: a.round() == b.round(),
                 lambda a, b: (a - b).round() == 0)
)  # fmt: skip


def _rewards() -> list[tuple[Tensor, Tensor]]:
    """Negative rewards, and ties; ties at 0; and pairs that nearly tie."""
    return [
        (torch.tensor([0.5, -1.0, -0.25, 0.0, 2.0]), torch.tensor([0.25, -2.0, 0.75, 0.0, -1.0])),
        (torch.tensor([0.0, 1.5, 0.0, -0.5]), torch.tensor([0.0, 2.0, 0.0, -3.0])),
        (torch.tensor([0.250001, 0.25, 1.0, 1e-9, -0.004]), torch.tensor([0.25, 0.25, 1.005, 2e-9, -0.001])),
    ]


EXERCISES = (
    Exercise(
        "5.1", "Right, tied, wrong", 1, 5, _shares,
        (
            Mistake("Those are numbers of pairs",
                    "a share is a number divided by how many there are: the three sum to 1",
                    _counts),
            Mistake("Those are percentages",
                    "a share is between 0 and 1; the three sum to 1",
                    lambda chosen, rejected: tuple(100 * share for share in _shares(chosen, rejected))),
            Mistake("The order is another one",
                    "right first, then tied, then wrong",
                    lambda chosen, rejected: tuple(_shares(chosen, rejected)[i] for i in (0, 2, 1)),
                    tuple(lambda chosen, rejected, order=order: tuple(_shares(chosen, rejected)[i] for i in order)
                          for order in ((1, 0, 2), (1, 2, 0), (2, 0, 1)))),
            Mistake("Ties are counted as wrong",
                    "before training all pairs tie, and no model is always wrong; then the shares sum to more than 1",
                    lambda chosen, rejected: _of_masks(chosen > rejected, chosen == rejected, chosen <= rejected),
                    (lambda chosen, rejected: _of_masks(chosen > rejected, chosen != chosen, chosen <= rejected),)),
            Mistake("Ties are counted as right",
                    "a margin of 0 prefers neither side: only a margin above 0 is right",
                    lambda chosen, rejected: _of_masks(chosen >= rejected, chosen == rejected, chosen < rejected),
                    (lambda chosen, rejected: _of_masks(chosen >= rejected, chosen != chosen, chosen < rejected),)),
            Mistake("Ties count half",
                    "that is for a win rate; here ties have a share of their own",
                    lambda chosen, rejected: _halves(chosen, rejected, 0.5),
                    (lambda chosen, rejected: _halves(chosen, rejected, 0.0),)),
            Mistake("What nearly ties is counted as tied",
                    "a tie is a margin of exactly 0, as before the first update; a small margin is still a preference",
                    _NEARLY[0], _NEARLY[1:]),
            Mistake("You divided by the pairs that do not tie",
                    "all three are shares of all pairs, so that they sum to 1", _without_ties),
            Mistake("You asked whether the chosen reward is above 0",
                    "right means that chosen beats rejected: both rewards may be negative, and a chosen reward above 0 "
                    "may be the smaller one",
                    _chosen_above_0,
                    (lambda chosen, rejected: _of_masks(chosen > 0, chosen == 0, chosen < 0),
                     lambda chosen, rejected: _of_masks(chosen > 0, chosen == rejected, chosen < 0),
                     lambda chosen, rejected: _of_masks((chosen > 0) & (rejected < 0), chosen == rejected,
                                                        (chosen < 0) & (rejected > 0)))),
            Mistake("Right and wrong are swapped",
                    "right is where the chosen response has the higher reward",
                    lambda chosen, rejected: _shares(rejected, chosen)),
            Mistake("Three numbers are asked for",
                    "return the shares of right, tied and wrong pairs, in this order",
                    lambda chosen, rejected: _shares(chosen, rejected)[0],
                    (lambda chosen, rejected: _shares(chosen, rejected)[:2],
                     lambda chosen, rejected: (chosen > rejected, chosen == rejected, chosen < rejected))),
        ),
        cases=_rewards,
    ),
)  # fmt: skip
