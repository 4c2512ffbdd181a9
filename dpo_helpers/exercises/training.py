"""Exercises of notebook 5: right, tied and wrong pairs, the KL and its estimate k3, and the packed pair."""

from __future__ import annotations

import torch
from torch import Tensor

from .core import Exercise, Mistake

# 5.1


Shares = tuple[float, float, float]


def _share(which: Tensor) -> float:
    return which.float().mean().item()


def _shares(chosen: Tensor, rejected: Tensor) -> Shares:
    return _share(chosen > rejected), _share(chosen == rejected), _share(chosen < rejected)


def _ties_wrong(chosen: Tensor, rejected: Tensor) -> Shares:
    return _share(chosen > rejected), _share(chosen == rejected), _share(chosen <= rejected)


def _ties_right(chosen: Tensor, rejected: Tensor) -> Shares:
    return _share(chosen >= rejected), _share(chosen == rejected), _share(chosen < rejected)


def _without_ties(chosen: Tensor, rejected: Tensor) -> Shares:
    apart = chosen != rejected
    return _share((chosen > rejected)[apart]), _share(~apart), _share((chosen < rejected)[apart])


def _chosen_above_0(chosen: Tensor, rejected: Tensor) -> Shares:
    ties = chosen == rejected
    return _share((chosen > 0) & ~ties), _share(ties), _share((chosen <= 0) & ~ties)


def _rewards() -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.tensor([0.5, -1.0, -0.25, 0.0, 2.0]), torch.tensor([0.25, -2.0, 0.75, 0.0, -1.0])),
        (torch.tensor([0.0, 1.5, 0.0, -0.5]), torch.tensor([0.0, 2.0, 0.0, -3.0])),
    ]


# 5.2


def _kl(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    log_p, log_q = policy_logits.log_softmax(dim=-1), reference_logits.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _kl_of_reference(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    return _kl(reference_logits, policy_logits)


def _kl_averaged(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    return _kl(policy_logits, reference_logits) / policy_logits.shape[-1]


def _likeliest_only(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    log_ratio = policy_logits.log_softmax(dim=-1) - reference_logits.log_softmax(dim=-1)
    return log_ratio.gather(-1, policy_logits.argmax(dim=-1, keepdim=True)).squeeze(-1)


def _softmax_over_places(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    log_p, log_q = policy_logits.log_softmax(dim=0), reference_logits.log_softmax(dim=0)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _raw_logits(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    return (policy_logits.softmax(dim=-1) * (policy_logits - reference_logits)).sum(dim=-1)


def _logits() -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]]), torch.tensor([[0.5, 1.0, 0.0], [2.0, 0.0, 1.5]])),
        (torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.5]])),
    ]


# 5.3


def _k3(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    log_ratio = policy_logps - reference_logps
    return ((-log_ratio).exp() - 1 + log_ratio).sum()


def _k1(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    return (policy_logps - reference_logps).sum()


def _k3_turned_round(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    return _k3(reference_logps, policy_logps)


def _k3_averaged(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    return _k3(policy_logps, reference_logps) / len(policy_logps)


def _k3_of_the_sum(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    log_ratio = _k1(policy_logps, reference_logps)
    return (-log_ratio).exp() - 1 + log_ratio


def _k2(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    return ((policy_logps - reference_logps) ** 2 / 2).sum()


def _sampled() -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.tensor([-0.5, -2.0, -0.1]), torch.tensor([-1.5, -1.0, -0.6])),
        (torch.tensor([-1.0, -0.25]), torch.tensor([-0.5, -2.25])),
    ]


# 5.4

EXERCISES = (
    Exercise(
        "5.1", "Right, tied, wrong", 1, 5, _shares,
        (
            Mistake("Ties are counted as wrong",
                    "before training all pairs tie, and no model is always wrong; then the shares sum to 2",
                    _ties_wrong),
            Mistake("Ties are counted as right",
                    "a margin of 0 prefers neither side: only a margin above 0 is right", _ties_right),
            Mistake("You divided by the pairs that do not tie",
                    "all three are shares of all pairs, so that they sum to 1", _without_ties),
            Mistake("You asked whether the chosen reward is above 0",
                    "right means that chosen beats rejected: both rewards may be negative, and a chosen reward above 0 "
                    "may be the smaller one", _chosen_above_0),
        ),
        cases=_rewards,
    ),
    Exercise(
        "5.2", "The KL of the next token", 2, 8, _kl,
        (
            Mistake("You computed KL(π_ref‖π_θ)",
                    "the expectation is over tokens of the policy, so its probabilities are the weights",
                    _kl_of_reference),
            Mistake("You averaged over the vocabulary",
                    "the probabilities are weights already and sum to 1: sum, or the KL shrinks with the vocabulary",
                    _kl_averaged),
            Mistake("That is the log-ratio of the likeliest token alone",
                    "the KL is the mean over all tokens, each with its probability under the policy", _likeliest_only),
            Mistake("The softmax runs over the positions",
                    "each position has a distribution over the vocabulary, the last dimension: dim=-1",
                    _softmax_over_places),
            Mistake("You subtracted logits, not log-probabilities",
                    "logits are log-probabilities up to a constant of each row and model: log_softmax takes it out",
                    _raw_logits),
        ),
        cases=_logits,
    ),
    Exercise(
        "5.3", "Estimate a KL from a sample", 2, 6, _k3,
        (
            Mistake("That is k1",
                    "the sum of log-ratios: the same mean, but it can be negative; k3 adds e^(-log-ratio) - 1 to each",
                    _k1),
            Mistake("The exponent has the wrong sign",
                    "e^(-log-ratio) is π_ref/π_θ, whose mean over tokens of the policy is 1, so what is added to k1 "
                    "has mean 0; the mean of e^(+log-ratio) is not 1", _k3_turned_round),
            Mistake("You averaged over the tokens",
                    "the KL of a response is the sum over its tokens; the mean would be a KL a token", _k3_averaged),
            Mistake("You put the sum of the response into the exponent",
                    "also unbiased, but e to the power of a long sum varies wildly: apply k3 to each token, then sum",
                    _k3_of_the_sum),
            Mistake("That is k2",
                    "half the squared log-ratio is close to the KL near the reference only: its mean is another one",
                    _k2),
        ),
        cases=_sampled,
    ),
    Exercise(
        "5.4", "The places of a packed pair", 1, 3, 64,
        (
            Mistake("The prompt is in it twice",
                    "both responses read the same prompt, whose tokens do not depend on what follows: run it once",
                    104),
            Mistake("The last tokens are in it",
                    "nothing is predicted from the last token of a response, so neither of the two is run", 66),
            Mistake("Those are two padded rows",
                    "the plain step pads both rows to the longer one; packed, nothing is padded", 116),
            Mistake("One last token is still in it", "each of the two responses goes without its last token", 65),
        ),
    ),
)  # fmt: skip
