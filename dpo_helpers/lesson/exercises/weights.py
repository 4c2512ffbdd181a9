"""Exercises of notebook 4, second part: how hard a pair is pushed, and a loss that doubts its labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .core import Exercise, Mistake

# 4.3


def _weight(h: Tensor, beta: float) -> Tensor:
    return beta * torch.sigmoid(-beta * h)


def _margins() -> list[tuple[Tensor, float]]:
    return [
        (torch.tensor([-4.0, -1.0, 0.0, 2.0]), 0.5),
        (torch.tensor([-1.0, 3.0]), 2.0),
        (torch.tensor([-2000.0, 2000.0]), 0.5),
    ]


# 4.4


def _smoothed(h: Tensor, beta: float, epsilon: float) -> Tensor:
    return -(1 - epsilon) * logsigmoid(beta * h) - epsilon * logsigmoid(-beta * h)


def _first_term(h: Tensor, beta: float, epsilon: float) -> Tensor:
    return -(1 - epsilon) * logsigmoid(beta * h)


def _mixed(h: Tensor, beta: float, epsilon: float) -> Tensor:
    right = torch.sigmoid(beta * h)
    return -((1 - epsilon) * right + epsilon * (1 - right)).log()


def _subtracted(h: Tensor, beta: float, epsilon: float) -> Tensor:
    return _first_term(h, beta, epsilon) + epsilon * logsigmoid(-beta * h)


def _log_of_sigmoid(h: Tensor, beta: float, epsilon: float) -> Tensor:
    return -(1 - epsilon) * torch.sigmoid(beta * h).log() - epsilon * torch.sigmoid(-beta * h).log()


def _log_of_one_minus(h: Tensor, beta: float, epsilon: float) -> Tensor:
    return _first_term(h, beta, epsilon) - epsilon * (1 - torch.sigmoid(beta * h)).log()


def _log_of_both(h: Tensor, beta: float, epsilon: float) -> Tensor:
    right = torch.sigmoid(beta * h)
    return -(1 - epsilon) * right.log() - epsilon * (1 - right).log()


def _smoothings() -> list[tuple[Tensor, float, float]]:
    return [
        (torch.tensor([-2.0, 0.0, 6.0]), 0.5, 0.1),
        (torch.tensor([1.0]), 2.0, 0.3),
        (torch.tensor([-2000.0, 2000.0]), 0.5, 0.2),
    ]


EXERCISES = (
    Exercise(
        "4.3", "How hard a pair is pushed", 1, 5, _weight,
        (
            Mistake("The sign inside σ is wrong",
                    "σ(+βh) pushes hardest where the pair is already right; the derivative of −log σ(z) is −σ(−z)",
                    lambda h, beta: beta * torch.sigmoid(beta * h)),
            Mistake("The factor β in front is missing",
                    "the chain rule gives it: the derivative of βh with respect to h is β",
                    lambda h, beta: torch.sigmoid(-beta * h), (lambda h, beta: torch.sigmoid(-h),)),
            Mistake("β inside σ is missing",
                    "σ takes the reward margin, which is β times the log-ratio margin h",
                    lambda h, beta: beta * torch.sigmoid(-h)),
            Mistake("β divides somewhere",
                    "it multiplies twice: once inside σ, and once from the chain rule",
                    lambda h, beta: torch.sigmoid(-beta * h) / beta,
                    (lambda h, beta: beta * torch.sigmoid(-h / beta), lambda h, beta: torch.sigmoid(-h / beta) / beta,
                     lambda h, beta: torch.sigmoid(-h / beta))),
            Mistake("There is a β too many",
                    "one inside σ, and one from the chain rule",
                    lambda h, beta: beta**2 * torch.sigmoid(-beta * h),
                    (lambda h, beta: beta * torch.sigmoid(-(beta**2) * h),)),
            Mistake("σ is squared",
                    "the derivative of −log σ(z) is −σ(−z): the logarithm has cancelled the other factor",
                    lambda h, beta: beta * torch.sigmoid(-beta * h) ** 2),
            Mistake("That is the derivative of σ, not of log σ",
                    "σ(z)·σ(−z) fades on both sides; with the logarithm a very wrong pair keeps its full weight β",
                    lambda h, beta: beta * torch.sigmoid(-beta * h) * torch.sigmoid(beta * h),
                    (lambda h, beta: torch.sigmoid(-beta * h) * torch.sigmoid(beta * h),)),
            Mistake("That is the slope of the loss, not its size",
                    "the slope is −β·σ(−βh); the weight is how hard it pushes, a positive number",
                    lambda h, beta: -beta * torch.sigmoid(-beta * h)),
            Mistake("That is the loss",
                    "asked for is its slope: differentiate −log σ(βh) with respect to h",
                    lambda h, beta: -logsigmoid(beta * h), (lambda h, beta: -beta * logsigmoid(beta * h),)),
            Mistake("The gradient is that of a mean or a sum",
                    "each pair has its own weight, which does not depend on how many others are in the batch",
                    lambda h, beta: _weight(h, beta) / len(h),
                    (lambda h, beta: _weight(h, beta).mean(), lambda h, beta: _weight(h, beta).sum())),
            Mistake("h itself is a factor",
                    "that is the derivative with respect to β; asked for is that with respect to h",
                    lambda h, beta: h * torch.sigmoid(-beta * h),
                    (lambda h, beta: -h * torch.sigmoid(-beta * h),
                     lambda h, beta: beta * h * torch.sigmoid(-beta * h))),
            Mistake("The 1 + is missing",
                    "σ(−z) = 1/(1 + e^z), which never goes above 1",
                    lambda h, beta: beta * (-beta * h).exp(), (lambda h, beta: (-beta * h).exp(),)),
            Mistake("That is the reward margin",
                    "the weight is how hard it pushes: β·σ of minus that margin",
                    lambda h, beta: beta * h, (lambda h, beta: -beta * h, lambda h, beta: 1 / torch.sigmoid(beta * h))),
            Mistake("The exponential overflows",
                    "e^(−βh) is ∞ for a very wrong pair, and ∞/∞ is no number; torch.sigmoid knows how to avoid it",
                    lambda h, beta: beta * (-beta * h).exp() / (1 + (-beta * h).exp())),
        ),
        cases=_margins,
    ),
    Exercise(
        "4.4", "A loss that doubts its labels", 2, 5, _smoothed,
        (
            Mistake("ε and 1 − ε are swapped",
                    "ε is the share of wrong labels, so the label as it stands gets the larger weight, 1 − ε",
                    lambda h, beta, epsilon: _smoothed(h, beta, 1 - epsilon)),
            Mistake("The second term is missing",
                    "with probability ε the other response was better; its loss −log σ(−βh) belongs to the mean",
                    _first_term),
            Mistake("The first term has its full weight",
                    "the weights 1 − ε and ε sum to 1",
                    lambda h, beta, epsilon: -logsigmoid(beta * h) - epsilon * logsigmoid(-beta * h)),
            Mistake("The weights are both ½, or both 1",
                    "1 − ε for the label as it stands, ε for the other one",
                    lambda h, beta, epsilon: -logsigmoid(beta * h) - logsigmoid(-beta * h),
                    (lambda h, beta, epsilon: _smoothed(h, beta, 0.5),
                     lambda h, beta, epsilon: _smoothed(h, beta, epsilon / 2))),
            Mistake("Both terms are of the label as it stands",
                    "the flipped pair has the margin −βh",
                    lambda h, beta, epsilon: -(1 - 2 * epsilon) * logsigmoid(beta * h)),
            Mistake("1 − log σ is not the loss of the flipped pair",
                    "its loss is −log σ(−βh) = −log(1 − σ(βh)): the 1 belongs inside the logarithm",
                    lambda h, beta, epsilon: _first_term(h, beta, epsilon) - epsilon * (1 - logsigmoid(beta * h)),
                    (lambda h, beta, epsilon: _first_term(h, beta, epsilon) + epsilon * (1 + logsigmoid(beta * h)),)),
            Mistake("The logarithms are missing",
                    "each loss is −log σ; −σ alone stops pushing where a pair is very wrong",
                    lambda h, beta, epsilon: (2 * epsilon - 1) * torch.sigmoid(beta * h) - epsilon,
                    (lambda h, beta, epsilon: epsilon - (2 * epsilon - 1) * torch.sigmoid(beta * h),)),
            Mistake("The mean is inside the logarithm",
                    "the result is a mean of two losses; you took the loss of a mean probability, which is another",
                    _mixed),
            Mistake("The mean is inside σ",
                    "the result is a mean of two losses; you took the loss of a mean margin, which is another",
                    lambda h, beta, epsilon: -logsigmoid((1 - 2 * epsilon) * beta * h),
                    (lambda h, beta, epsilon: -logsigmoid((1 - epsilon) * beta * h),)),
            Mistake("That is the robust loss",
                    "its second term is subtracted and all is divided by 1 − 2ε (Chowdhury et al.); cDPO adds it",
                    lambda h, beta, epsilon: _subtracted(h, beta, epsilon) / (1 - 2 * epsilon)),
            Mistake("The second term is subtracted",
                    "both terms are losses, minus a logarithm, and both are added",
                    _subtracted),
            Mistake("ε has no effect",
                    "this is the plain loss; weigh it by 1 − ε and add ε times the loss of the flipped label",
                    lambda h, beta, epsilon: -logsigmoid(beta * h)),
            Mistake("β is missing",
                    "both terms take the reward margin βh, not the log-ratio margin h",
                    lambda h, beta, epsilon: _smoothed(h, 1.0, epsilon),
                    (lambda h, beta, epsilon: _first_term(h, beta, epsilon) - epsilon * logsigmoid(-h),
                     lambda h, beta, epsilon: beta * _smoothed(h, 1.0, epsilon))),
            Mistake("The minus is missing",
                    "both terms are minus a logarithm, so the loss is positive",
                    lambda h, beta, epsilon: -_smoothed(h, beta, epsilon)),
            Mistake("The sigmoid is taken first and its logarithm after",
                    "σ becomes 0 in 32 bits, and its logarithm −∞; use logsigmoid(βh) and logsigmoid(−βh)",
                    _log_of_sigmoid, (_log_of_one_minus, _log_of_both)),
            Mistake("It is averaged over the batch",
                    "the result is a loss per pair, [B]",
                    lambda h, beta, epsilon: _smoothed(h, beta, epsilon).mean(),
                    (lambda h, beta, epsilon: _smoothed(h, beta, epsilon).sum(),)),
        ),
        cases=_smoothings,
    ),
)  # fmt: skip
