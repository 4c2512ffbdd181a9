"""Exercises 5.2 and 5.3: the KL, and its estimate k3."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .core import Exercise, Mistake

# 5.2


def _kl(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    log_p, log_q = policy_logits.log_softmax(dim=-1), reference_logits.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _of_logps(change: Callable[[Tensor, Tensor], Tensor], dim: int = -1) -> Callable[[Tensor, Tensor], Tensor]:
    """What is made of both log-probabilities, [T, V] each."""
    return lambda policy, reference: change(policy.log_softmax(dim=dim), reference.log_softmax(dim=dim))


def _log_ratio(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    return policy_logits.log_softmax(dim=-1) - reference_logits.log_softmax(dim=-1)


def _likeliest_only(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p - log_q).gather(-1, log_p.argmax(dim=-1, keepdim=True)).squeeze(-1)


def _zero_times_infinity(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    p, q = policy_logits.softmax(dim=-1), reference_logits.softmax(dim=-1)
    return (p * (p / q).log()).sum(dim=-1)


def _logits() -> list[tuple[Tensor, Tensor]]:
    """Two positions; one; and two where one model or the other finds a token all but impossible."""
    return [
        (torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]]), torch.tensor([[0.5, 1.0, 0.0], [2.0, 0.0, 1.5]])),
        (torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.5]])),
        (torch.tensor([[300.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0], [0.0, 300.0, 0.0]])),
    ]


# 5.3


def _k3(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    log_ratio = policy_logps - reference_logps
    return ((-log_ratio).exp() - 1 + log_ratio).sum()


def _of_ratio(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """What is made of the tokens' log-ratios, [T]."""
    return lambda policy, reference: change(policy - reference)


def _sampled() -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.tensor([-0.5, -2.0, -0.1]), torch.tensor([-1.5, -1.0, -0.6])),
        (torch.tensor([-1.0, -0.25]), torch.tensor([-0.5, -2.25])),
    ]


EXERCISES = (
    Exercise(
        "5.2", "The KL of the next token", 2, 8, _kl,
        (
            Mistake("You computed KL(π_ref‖π_θ)",
                    "the expectation is over tokens of the policy, so its probabilities are the weights",
                    lambda policy, reference: _kl(reference, policy)),
            Mistake("The weights are those of the reference",
                    "the expectation is over tokens of the policy: weigh with its probabilities",
                    _of_logps(lambda p, q: (q.exp() * (p - q)).sum(dim=-1))),
            Mistake("You averaged over the vocabulary",
                    "the probabilities are weights already and sum to 1: sum, or the KL shrinks with the vocabulary",
                    lambda policy, reference: _kl(policy, reference) / policy.shape[-1]),
            Mistake("The weights are missing",
                    "a likely token counts more than an unlikely one: multiply by the policy's probability "
                    "before you sum",
                    _of_logps(lambda p, q: (p - q).sum(dim=-1)), (_of_logps(lambda p, q: (p - q).mean(dim=-1)),)),
            Mistake("That is the log-ratio of the likeliest token alone",
                    "the KL is the mean over all tokens, each with its probability under the policy",
                    _of_logps(_likeliest_only), (_of_logps(lambda p, q: (p - q).max(dim=-1).values),)),
            Mistake("The softmax runs over the positions",
                    "each position has a distribution over the vocabulary, the last dimension: dim=-1",
                    _of_logps(lambda p, q: (p.exp() * (p - q)).sum(dim=-1), dim=0)),
            Mistake("You subtracted logits, not log-probabilities",
                    "logits are log-probabilities up to a constant of each row and model: log_softmax takes it out",
                    lambda policy, reference: (policy.softmax(dim=-1) * (policy - reference)).sum(dim=-1)),
            Mistake("The weights are no probabilities",
                    "log_softmax gives logarithms; their exponentials are the weights, and sum to 1",
                    _of_logps(lambda p, q: (p * (p - q)).sum(dim=-1)),
                    (lambda policy, reference: (policy * _log_ratio(policy, reference)).sum(dim=-1),
                     lambda policy, reference: (policy.exp() * _log_ratio(policy, reference)).sum(dim=-1))),
            Mistake("Log-probabilities are divided",
                    "the logarithm of a ratio is the difference of two logarithms",
                    _of_logps(lambda p, q: (p.exp() * (p / q)).sum(dim=-1)),
                    (_of_logps(lambda p, q: (p.exp() * (p / q).log()).sum(dim=-1)),)),
            Mistake("Probabilities are subtracted",
                    "the KL is a mean of log-ratios, so the difference is that of log-probabilities",
                    _of_logps(lambda p, q: (p.exp() * (p.exp() - q.exp())).sum(dim=-1)),
                    (_of_logps(lambda p, q: (p.exp() - q.exp()).abs().sum(dim=-1)),
                     _of_logps(lambda p, q: ((p.exp() - q.exp()) ** 2).sum(dim=-1)))),
            Mistake("That is a cross-entropy, or an entropy",
                    "their difference is the KL: each token counts log π_θ − log π_ref",
                    _of_logps(lambda p, q: -(p.exp() * q).sum(dim=-1)),
                    (_of_logps(lambda p, q: -(p.exp() * p).sum(dim=-1)),)),
            Mistake("Half of both directions",
                    "KL(π_θ‖π_ref) has the policy in front, and is not symmetric",
                    _of_logps(lambda p, q: ((p.exp() - q.exp()) * (p - q)).sum(dim=-1) / 2),
                    (_of_logps(lambda p, q: ((p.exp() - q.exp()) * (p - q)).sum(dim=-1)),)),
            Mistake("You did not sum over the vocabulary",
                    "the result is one value per position, [T]",
                    _of_logps(lambda p, q: p.exp() * (p - q)), (_of_logps(lambda p, q: p - q),)),
            Mistake("You summed or averaged over the positions",
                    "the result is one value per position, [T]: sum over the last dimension only",
                    _of_logps(lambda p, q: (p.exp() * (p - q)).sum()),
                    (lambda policy, reference: _kl(policy, reference).mean(),
                     _of_logps(lambda p, q: (p.exp() * (p - q)).mean()),
                     _of_logps(lambda p, q: (p.exp() * (p - q)).sum(dim=0)))),
            Mistake("The softmax is taken first and its logarithm after",
                    "a small probability becomes 0 in 32 bits, and 0·log 0 is no number; log_softmax keeps it",
                    _zero_times_infinity),
        ),
        cases=_logits,
    ),
    Exercise(
        "5.3", "Estimate a KL from a sample", 2, 6, _k3,
        (
            Mistake("That is k1",
                    "the sum of log-ratios: the same mean, but it can be negative; k3 adds e^(−log-ratio) − 1 to each",
                    _of_ratio(lambda r: r.sum()), (_of_ratio(lambda r: r), _of_ratio(lambda r: r.mean()))),
            Mistake("The 1 is forgotten",
                    "without − 1 each token adds 1 on average: where the models agree, k3 is 0",
                    _of_ratio(lambda r: ((-r).exp() + r).sum()),
                    (_of_ratio(lambda r: ((-r).exp() + 1 + r).sum()), _of_ratio(lambda r: ((-r).exp() + r).mean()))),
            Mistake("The 1 is subtracted once, not for each token",
                    "k3 is e^(−ℓ) − 1 + ℓ of each token, so T tokens subtract T",
                    _of_ratio(lambda r: (-r).exp().sum() - 1 + r.sum())),
            Mistake("The log-ratio is forgotten",
                    "e^(−ℓ) − 1 has the mean 0; the estimate is ℓ, and this only makes it scatter less",
                    _of_ratio(lambda r: ((-r).exp() - 1).sum()), (_of_ratio(lambda r: (-r).exp().sum()),)),
            Mistake("The exponent has the wrong sign",
                    "e^(−log-ratio) is π_ref/π_θ, whose mean over tokens of the policy is 1, so what is added to k1 "
                    "has mean 0; the mean of e^(+log-ratio) is not 1",
                    _of_ratio(lambda r: (r.exp() - 1 - r).sum()),
                    (_of_ratio(lambda r: (r.exp() - 1 + r).sum()), _of_ratio(lambda r: (r.exp() - 1 - r).mean()))),
            Mistake("The log-ratio has the wrong sign",
                    "it is added: k3 = e^(−ℓ) − 1 + ℓ, which is never negative",
                    _of_ratio(lambda r: ((-r).exp() - 1 - r).sum())),
            Mistake("You averaged over the tokens",
                    "the KL of a response is the sum over its tokens; the mean would be a KL per token",
                    _of_ratio(lambda r: ((-r).exp() - 1 + r).mean())),
            Mistake("You did not sum over the tokens",
                    "the KL of a response is the sum over its tokens: a single number",
                    _of_ratio(lambda r: (-r).exp() - 1 + r), (_of_ratio(lambda r: r.exp() - 1 - r),)),
            Mistake("You put the sum of the response into the exponent",
                    "also unbiased, but e to the power of a long sum varies wildly: apply k3 to each token, then sum",
                    _of_ratio(lambda r: (-r.sum()).exp() - 1 + r.sum()),
                    (_of_ratio(lambda r: (-r.mean()).exp() - 1 + r.mean()),)),
            Mistake("The exponential is missing",
                    "k3 = e^(−ℓ) − 1 + ℓ; with −ℓ in place of e^(−ℓ) everything cancels but the 1",
                    _of_ratio(lambda r: (-r - 1 + r).sum()), (_of_ratio(lambda r: (r - 1 - r.log()).sum()),)),
            Mistake("The ratio is taken of log-probabilities",
                    "π_ref/π_θ is e^(−ℓ), with ℓ the difference of the two log-probabilities",
                    lambda p, q: (q / p - 1 - (q / p).log()).sum(),
                    (lambda p, q: (q / p - 1 + p - q).sum(), lambda p, q: (q.exp() - p.exp() - 1 + p - q).sum())),
            Mistake("The policy's probabilities are weights too",
                    "the tokens were sampled from the policy, so likely ones come often already",
                    lambda p, q: (p.exp() * ((q - p).exp() - 1 + p - q)).sum(),
                    (lambda p, q: (p.exp() * (p - q)).sum(),)),
            Mistake("That is k2",
                    "half the squared log-ratio is close to the KL near the reference only: its mean is another one",
                    _of_ratio(lambda r: (r**2 / 2).sum()),
                    (_of_ratio(lambda r: (r**2).sum()), _of_ratio(lambda r: r.sum() ** 2 / 2))),
        ),
        cases=_sampled,
    ),
)  # fmt: skip
