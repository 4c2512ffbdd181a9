"""Exercises of notebook 4: from preferences to the DPO loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .core import Exercise, Mistake


def _optimum(pi_ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    return (pi_ref.log() + reward / beta).softmax(dim=0)


def _worlds() -> list[tuple[Tensor, Tensor, float]]:
    return [
        (torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([1.0, 0.0, -1.0, 2.0]), 0.5),
        (torch.tensor([0.2, 0.8]), torch.tensor([3.0, -1.0]), 2.0),
    ]


def _dpo(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    return -logsigmoid(beta * _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected))


def _margin(policy_chosen: Tensor, policy_rejected: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """The log-ratio margin h of each pair, [B]."""
    return (policy_chosen - chosen) - (policy_rejected - rejected)


def _pairs() -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    policy = torch.tensor([-10.0, -9.0, -12.0]), torch.tensor([-11.0, -13.0, -8.0])
    reference = torch.tensor([-10.0, -10.0, -10.0]), torch.tensor([-11.0, -11.5, -11.0])
    return [(*policy, *reference, 0.5), (*policy, *reference, 0.1)]


def _weight(h: Tensor, beta: float) -> Tensor:
    return beta * torch.sigmoid(-beta * h)


def _margins() -> list[tuple[Tensor, float]]:
    return [(torch.tensor([-4.0, -1.0, 0.0, 2.0]), 0.5), (torch.tensor([-1.0, 3.0]), 2.0)]


def _smoothed(h: Tensor, beta: float, epsilon: float) -> Tensor:
    return -(1 - epsilon) * logsigmoid(beta * h) - epsilon * logsigmoid(-beta * h)


def _mixed(h: Tensor, beta: float, epsilon: float) -> Tensor:
    right = torch.sigmoid(beta * h)
    return -((1 - epsilon) * right + epsilon * (1 - right)).log()


def _robust(h: Tensor, beta: float, epsilon: float) -> Tensor:
    return (-(1 - epsilon) * logsigmoid(beta * h) + epsilon * logsigmoid(-beta * h)) / (1 - 2 * epsilon)


def _smoothings() -> list[tuple[Tensor, float, float]]:
    return [(torch.tensor([-2.0, 0.0, 6.0]), 0.5, 0.1), (torch.tensor([1.0]), 2.0, 0.3)]


EXERCISES = (
    Exercise(
        "4.1", "The best policy in closed form", 1, 5, _optimum,
        (
            Mistake("You multiplied the reward by β",
                    "β is the price of distance: the dearer it is, the less the reward may move; divide by it",
                    lambda pi_ref, reward, beta: (pi_ref.log() + reward * beta).softmax(dim=0)),
            Mistake("β is missing",
                    "the exponent is r/β; with β = 1 you would not see the difference",
                    lambda pi_ref, reward, beta: (pi_ref.log() + reward).softmax(dim=0)),
            Mistake("It does not sum to 1",
                    "π_ref·exp(r/β) are weights, not probabilities yet; divide by their sum, Z",
                    lambda pi_ref, reward, beta: pi_ref * (reward / beta).exp()),
            Mistake("The reference is left out",
                    "softmax(r/β) is the optimum for a uniform reference; each weight also has the factor π_ref",
                    lambda pi_ref, reward, beta: (reward / beta).softmax(dim=0)),
            Mistake("A probability is added to a logit",
                    "inside a softmax the reference enters as log π_ref; the product is in the exponential",
                    lambda pi_ref, reward, beta: (pi_ref + reward / beta).softmax(dim=0)),
            Mistake("The worst response is the likeliest",
                    "the reward stands in the exponent with a plus: a higher one makes a response likelier",
                    lambda pi_ref, reward, beta: (pi_ref.log() - reward / beta).softmax(dim=0)),
        ),
        cases=_worlds,
    ),
    Exercise(
        "4.2", "The DPO loss of four log-probabilities", 2, 8, _dpo,
        (
            Mistake("β is forgotten",
                    "the implicit reward is β times the log-ratio; without β the loss is that of β = 1",
                    lambda *pair: -logsigmoid(_margin(*pair[:4]))),
            Mistake("β stands outside the logarithm",
                    "it multiplies the margin inside σ; outside it only scales the loss, as a learning rate would",
                    lambda *pair: -pair[4] * logsigmoid(_margin(*pair[:4]))),
            Mistake("The sides are swapped",
                    "this loss is small where the rejected response has the higher implicit reward",
                    lambda *pair: -logsigmoid(-pair[4] * _margin(*pair[:4]))),
            Mistake("The reference is missing",
                    "the reward is a log-ratio: subtract the reference's log-probability on both sides",
                    lambda *pair: -logsigmoid(pair[4] * (pair[0] - pair[1]))),
            Mistake("The sign of the reference is wrong",
                    "log(π_θ/π_ref) = log π_θ − log π_ref on both sides; your reference's margin is added, "
                    "not subtracted",
                    lambda *pair: -logsigmoid(pair[4] * (pair[0] - pair[1] + pair[2] - pair[3]))),
            Mistake("It is averaged over the batch",
                    "the result is a loss a pair, [B]; the training loop takes the mean",
                    lambda *pair: _dpo(*pair).mean()),
            Mistake("The minus is missing",
                    "log σ is negative and grows as the policy gets better; what training lowers is minus that",
                    lambda *pair: -_dpo(*pair)),
            Mistake("The logarithm is missing",
                    "maximum likelihood adds up log-probabilities; −σ alone stops pushing where a pair is very wrong",
                    lambda *pair: -torch.sigmoid(pair[4] * _margin(*pair[:4]))),
        ),
        cases=_pairs,
    ),
    Exercise(
        "4.3", "How hard a pair is pushed", 2, 5, _weight,
        (
            Mistake("The sign inside σ is wrong",
                    "σ(+βh) pushes hardest where the pair is already right; the derivative of −log σ(z) is −σ(−z)",
                    lambda h, beta: beta * torch.sigmoid(beta * h)),
            Mistake("The factor β in front is missing",
                    "the chain rule gives it: the derivative of βh with respect to h is β",
                    lambda h, beta: torch.sigmoid(-beta * h)),
            Mistake("β inside σ is missing",
                    "σ takes the reward margin, which is β times the log-ratio margin h",
                    lambda h, beta: beta * torch.sigmoid(-h)),
            Mistake("σ is squared",
                    "the derivative of −log σ(z) is −σ(−z): the logarithm has cancelled the other factor",
                    lambda h, beta: beta * torch.sigmoid(-beta * h) ** 2),
            Mistake("That is the derivative of σ, not of log σ",
                    "σ(z)·σ(−z) fades on both sides; with the logarithm a very wrong pair keeps its full weight β",
                    lambda h, beta: beta * torch.sigmoid(-beta * h) * torch.sigmoid(beta * h)),
            Mistake("That is the slope of the loss, not its size",
                    "the slope is −β·σ(−βh); the weight is how hard it pushes, a positive number",
                    lambda h, beta: -beta * torch.sigmoid(-beta * h)),
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
                    lambda h, beta, epsilon: -(1 - epsilon) * logsigmoid(beta * h)),
            Mistake("The mean is inside the logarithm",
                    "the result is a mean of two losses; you took the loss of a mean probability, which is another",
                    _mixed),
            Mistake("That is the robust loss",
                    "its second term is subtracted and all is divided by 1 − 2ε (Chowdhury et al.); cDPO adds it",
                    _robust),
            Mistake("ε has no effect",
                    "this is the plain loss; weigh it by 1 − ε and add ε times the loss of the flipped label",
                    lambda h, beta, epsilon: -logsigmoid(beta * h)),
            Mistake("β is missing",
                    "both terms take the reward margin βh, not the log-ratio margin h",
                    lambda h, beta, epsilon: _smoothed(h, 1.0, epsilon)),
        ),
        cases=_smoothings,
    ),
)  # fmt: skip
