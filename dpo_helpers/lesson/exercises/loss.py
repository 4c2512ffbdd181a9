"""Exercises of notebook 4: from preferences to the DPO loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .core import Exercise, Mistake

# 4.1


def _optimum(pi_ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    return (pi_ref.log() + reward / beta).softmax(dim=0)


def _worlds() -> list[tuple[Tensor, Tensor, float]]:
    return [
        (torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([1.0, 0.0, -1.0, 2.0]), 0.5),
        (torch.tensor([0.2, 0.8]), torch.tensor([3.0, -1.0]), 2.0),
    ]


def _unit(weights: Tensor) -> Tensor:
    return weights / weights.sum()


# 4.2

Pair = tuple[Tensor, Tensor, Tensor, Tensor, float]


def _dpo(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    return -logsigmoid(beta * _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected))


def _margin(policy_chosen: Tensor, policy_rejected: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """The log-ratio margin h of each pair, [B]."""
    return (policy_chosen - chosen) - (policy_rejected - rejected)


def _of_margin(change: Callable[[Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """What is made of the log-ratio margin and β instead of the loss."""
    return lambda pc, pr, rc, rr, beta: change(_margin(pc, pr, rc, rr), beta)


def _with_margin(margin: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """The loss of another reward margin, made of policy's chosen and rejected, the reference's, and β."""
    return lambda *pair: -logsigmoid(margin(*pair))


def _pairs() -> list[Pair]:
    """Three pairs with two β; then one that the policy gets hopelessly wrong, and one that it gets as clearly right."""
    policy = torch.tensor([-10.0, -9.0, -12.0]), torch.tensor([-11.0, -13.0, -8.0])
    reference = torch.tensor([-10.0, -10.0, -10.0]), torch.tensor([-11.0, -11.5, -11.0])
    far = torch.tensor([-2100.0, -50.0]), torch.tensor([-50.0, -2100.0]), torch.tensor([-100.0, -60.0])
    return [(*policy, *reference, 0.5), (*policy, *reference, 0.1), (*far, torch.tensor([-60.0, -90.0]), 0.5)]


EXERCISES = (
    Exercise(
        "4.1", "The best policy in closed form", 1, 5, _optimum,
        (
            Mistake("You multiplied the reward by β",
                    "β is the price of distance: the dearer it is, the less the reward may move; divide by it",
                    lambda pi, r, beta: _unit(pi * (r * beta).exp()), (lambda pi, r, beta: pi * (r * beta).exp(),)),
            Mistake("β is missing",
                    "the exponent is r/β; with β = 1 you would not see the difference",
                    lambda pi, r, beta: _unit(pi * r.exp()), (lambda pi, r, beta: pi * r.exp(),)),
            Mistake("It does not sum to 1",
                    "π_ref·exp(r/β) are weights, not probabilities yet; divide by their sum, Z",
                    lambda pi, r, beta: pi * (r / beta).exp(),
                    (lambda pi, r, beta: pi.log() + r / beta,
                     lambda pi, r, beta: pi * (r / beta).exp() / (r / beta).exp().sum(),
                     lambda pi, r, beta: pi * (r / beta).exp() / len(pi),
                     lambda pi, r, beta: pi * (r / beta).exp() / pi.sum(),
                     lambda pi, r, beta: pi * (r / beta).exp() / (pi * (r / beta).exp()).mean(),
                     lambda pi, r, beta: pi * (r / beta).exp() / (pi * (r / beta).exp()).norm(),
                     lambda pi, r, beta: pi * (r / beta).exp() / (pi * (r / beta).exp()).max())),
            Mistake("Z is not the sum of the weights",
                    "Z sums what it divides, π_ref·exp(r/β), and not something else",
                    lambda pi, r, beta: pi * (r / beta).exp() / (pi * r.exp()).sum(),
                    (lambda pi, r, beta: pi * (r / beta).exp() / r.exp().sum(),
                     lambda pi, r, beta: pi * (r / beta).exp() / (pi * r / beta).sum(),
                     lambda pi, r, beta: pi * (r / beta).exp() / (pi * r / beta).sum().exp())),
            Mistake("The logarithm is not undone",
                    "log π_ref + r/β − log Z is log π*; take its exponential, or softmax where you took log_softmax",
                    lambda pi, r, beta: _optimum(pi, r, beta).log(), (lambda pi, r, beta: _unit(pi.log() + r / beta),)),
            Mistake("The reference is left out",
                    "softmax(r/β) is the optimum for a uniform reference; each weight also has the factor π_ref",
                    lambda pi, r, beta: (r / beta).softmax(dim=0), (lambda pi, r, beta: (r / beta).exp(),)),
            Mistake("A probability is added to a logit",
                    "inside a softmax the reference enters as log π_ref; the product is in the exponential",
                    lambda pi, r, beta: (pi + r / beta).softmax(dim=0)),
            Mistake("The softmax is taken of the weights",
                    "they are exponentials already: divide them by their sum, or take the softmax of their logarithms",
                    lambda pi, r, beta: (pi * (r / beta).exp()).softmax(dim=0),
                    (lambda pi, r, beta: (pi * r / beta).softmax(dim=0),
                     lambda pi, r, beta: (pi * (r / beta).softmax(dim=0)).softmax(dim=0))),
            Mistake("The exponential is missing",
                    "the weight of a response is π_ref·exp(r/β); with r/β itself it could be negative",
                    lambda pi, r, beta: _unit(pi * r / beta),
                    (lambda pi, r, beta: pi * r / beta, lambda pi, r, beta: pi + r / beta,
                     lambda pi, r, beta: _unit(pi + r / beta))),
            Mistake("The reference is divided by β too",
                    "only the reward is: log π_ref + r/β",
                    lambda pi, r, beta: ((pi.log() + r) / beta).softmax(dim=0),
                    (lambda pi, r, beta: (pi.log() / beta + r).softmax(dim=0),
                     lambda pi, r, beta: (pi.log() * beta + r).softmax(dim=0))),
            Mistake("β is outside of the exponential",
                    "a factor that is the same for all responses cancels in Z; β divides the reward, in the exponent",
                    lambda pi, r, beta: pi * r.exp() / beta,
                    (lambda pi, r, beta: _optimum(pi, r, beta) / beta, lambda pi, r, beta: _optimum(pi, r, beta) * beta,
                     lambda pi, r, beta: _unit(pi * r.exp()) / beta)),
            Mistake("The worst response is the likeliest",
                    "the reward stands in the exponent with a plus: a higher one makes a response likelier",
                    lambda pi, r, beta: (pi.log() - r / beta).softmax(dim=0)),
            Mistake("The reference is divided by",
                    "π_ref is a factor of each weight: what the reference finds unlikely stays unlikely",
                    lambda pi, r, beta: (r / beta - pi.log()).softmax(dim=0)),
            Mistake("All weight is on one response",
                    "that is the best policy without a price for distance; β keeps it near the reference",
                    lambda pi, r, beta: (r == r.max()).float(),
                    (lambda pi, r, beta: (_optimum(pi, r, beta) == _optimum(pi, r, beta).max()).float(),)),
        ),
        cases=_worlds,
    ),
    Exercise(
        "4.2", "The DPO loss of four log-probabilities", 2, 8, _dpo,
        (
            Mistake("β is forgotten",
                    "the implicit reward is β times the log-ratio; without β the loss is that of β = 1",
                    _of_margin(lambda h, beta: -logsigmoid(h))),
            Mistake("β stands outside the logarithm",
                    "it multiplies the margin inside σ; outside it only scales the loss, as a learning rate would",
                    _of_margin(lambda h, beta: -beta * logsigmoid(h)),
                    (_of_margin(lambda h, beta: -beta * logsigmoid(beta * h)),)),
            Mistake("You divided by β",
                    "it multiplies: a large β makes a large reward of a small log-ratio",
                    _of_margin(lambda h, beta: -logsigmoid(h / beta))),
            Mistake("β is on the policy only",
                    "β multiplies the whole log-ratio, log π_θ − log π_ref: mind the brackets",
                    _with_margin(lambda pc, pr, rc, rr, beta: beta * (pc - pr) - (rc - rr)),
                    (_with_margin(lambda pc, pr, rc, rr, beta: beta * pc - rc - (beta * pr - rr)),
                     _with_margin(lambda pc, pr, rc, rr, beta: (pc - pr) - beta * (rc - rr)))),
            Mistake("β is on one response only",
                    "both rewards have it, the chosen one's and the rejected one's: mind the brackets",
                    _with_margin(lambda pc, pr, rc, rr, beta: beta * (pc - rc) - (pr - rr)),
                    (_with_margin(lambda pc, pr, rc, rr, beta: (pc - rc) - beta * (pr - rr)),)),
            Mistake("The sides are swapped",
                    "this loss is small where the rejected response has the higher implicit reward",
                    _of_margin(lambda h, beta: -logsigmoid(-beta * h)),
                    (_of_margin(lambda h, beta: -(1 - torch.sigmoid(beta * h)).log()),)),
            Mistake("The reference is missing",
                    "the reward is a log-ratio: subtract the reference's log-probability on both sides",
                    _with_margin(lambda pc, pr, rc, rr, beta: beta * (pc - pr))),
            Mistake("The sign of the reference is wrong",
                    "log(π_θ/π_ref) = log π_θ − log π_ref on both sides; your reference's margin is added, "
                    "not subtracted",
                    _with_margin(lambda pc, pr, rc, rr, beta: beta * (pc - pr + rc - rr))),
            Mistake("The policy is subtracted from the reference on one side",
                    "both log-ratios are policy minus reference, and the rejected one's is subtracted: mind the "
                    "brackets",
                    _with_margin(lambda pc, pr, rc, rr, beta: beta * (pc - rc - pr - rr)),
                    (_with_margin(lambda pc, pr, rc, rr, beta: beta * (pc + rc - pr + rr)),)),
            Mistake("The two rewards are added",
                    "the loss looks at their difference: chosen minus rejected",
                    _with_margin(lambda pc, pr, rc, rr, beta: beta * ((pc - rc) + (pr - rr)))),
            Mistake("One response is missing",
                    "the loss compares two: the reward of the rejected response is subtracted from that of the chosen",
                    _with_margin(lambda pc, pr, rc, rr, beta: beta * (pc - rc)),
                    (_with_margin(lambda pc, pr, rc, rr, beta: -beta * (pr - rr)),
                     _with_margin(lambda pc, pr, rc, rr, beta: beta * (pr - rr)))),
            Mistake("Ratios take the place of log-ratios",
                    "the reward is β times the logarithm of π_θ/π_ref: the difference of log-probabilities as it is",
                    _with_margin(lambda pc, pr, rc, rr, beta: beta * ((pc - rc).exp() - (pr - rr).exp())),
                    (_with_margin(lambda pc, pr, rc, rr, beta: beta * (pc.exp() / rc.exp() - pr.exp() / rr.exp())),
                     _of_margin(lambda h, beta: -logsigmoid(beta * h.exp())))),
            Mistake("Log-probabilities are divided",
                    "the logarithm of a ratio is the difference of two logarithms",
                    _with_margin(lambda pc, pr, rc, rr, beta: beta * (pc / rc - pr / rr)),
                    (_with_margin(lambda pc, pr, rc, rr, beta: beta * ((pc / rc).log() - (pr / rr).log())),)),
            Mistake("It is averaged over the batch",
                    "the result is a loss per pair, [B]; the training loop takes the mean",
                    lambda *pair: _dpo(*pair).mean(), (lambda *pair: _dpo(*pair).sum(),)),
            Mistake("The minus is missing",
                    "log σ is negative and grows as the policy gets better; what training lowers is minus that",
                    lambda *pair: -_dpo(*pair)),
            Mistake("The logarithm is missing",
                    "maximum likelihood adds up log-probabilities; −σ alone stops pushing where a pair is very wrong",
                    _of_margin(lambda h, beta: -torch.sigmoid(beta * h))),
            Mistake("That is 1 − σ, not −log σ",
                    "1 − σ is how hard a pair is pushed, divided by β; it never goes above 1, and the loss of a very "
                    "wrong pair does",
                    _of_margin(lambda h, beta: torch.sigmoid(-beta * h))),
            Mistake("The sigmoid is taken first and its logarithm after",
                    "σ is 0 in 32 bits below about −100, and its logarithm −∞, just where the loss must push; use "
                    "logsigmoid",
                    _of_margin(lambda h, beta: -torch.sigmoid(beta * h).log()),
                    (_of_margin(lambda h, beta: -(1 - torch.sigmoid(-beta * h)).log()),
                     _of_margin(lambda h, beta: (1 + (-beta * h).exp()).log()),
                     _of_margin(lambda h, beta: -(1 / (1 + (-beta * h).exp())).log()),
                     _of_margin(lambda h, beta: -((beta * h).exp() / (1 + (beta * h).exp())).log()),
                     lambda pc, pr, rc, rr, beta: -((beta * (pc - rc)).exp() / (
                         (beta * (pc - rc)).exp() + (beta * (pr - rr)).exp())).log())),
            Mistake("That is the margin, not the loss",
                    "the loss is −log σ of it: it falls less and less as the margin grows",
                    _of_margin(lambda h, beta: beta * h),
                    (_of_margin(lambda h, beta: -beta * h), _of_margin(lambda h, beta: h),
                     _of_margin(lambda h, beta: -h))),
            Mistake("That is the loss of IPO, or a hinge",
                    "DPO's is −log σ(β·h)",
                    _of_margin(lambda h, beta: (h - 1 / (2 * beta)) ** 2),
                    (_of_margin(lambda h, beta: (1 - beta * h).relu()), _of_margin(lambda h, beta: (beta * h) ** 2))),
        ),
        cases=_pairs,
    ),
)  # fmt: skip
