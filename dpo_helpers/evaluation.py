"""Measure a model: rewards on held-out pairs, KL to the reference on its own samples; means with standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .device import Compute
from .errors import TrainingError
from .generation import Response
from .logprobs import PairScores, Scorer, log_softmax
from .tokens import EncodedPair, by_length
from .training import DPOObjective
from .uncertainty import mean_and_error


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model: `metrics` by name (`_se`: standard error), responses that it sampled, and the
    estimates of `sequence_kl` for each of them, [n] each.
    """

    name: str
    beta: float
    metrics: dict[str, float]
    responses: list[Response]
    kls: dict[str, Tensor]


@torch.no_grad()
def score_pairs(
    model: Any, pairs: Sequence[EncodedPair], scorer: Scorer, compute: Compute, *, batch_size: int = 16, name: str = ""
) -> PairScores:
    """Log-probabilities of all pairs, in their order. Pairs of like length share a batch, to pad little.

    scorer: of these pairs (it may know more, behind them). name: of the progress bar; without one there is none.
    Raises TrainingError, naming rows, where a log-probability is not finite.
    """
    order, starts = by_length(pairs), range(0, len(pairs), batch_size)
    chosen, rejected = torch.empty(len(pairs)), torch.empty(len(pairs))
    for start in tqdm(starts, desc=name, unit="batch") if name else starts:
        at = order[start : start + batch_size]
        with compute.autocast():
            of_chosen, of_rejected = scorer(model, at)
        chosen[at], rejected[at] = of_chosen.float().cpu(), of_rejected.float().cpu()
    wrong = ~(chosen.isfinite() & rejected.isfinite())
    if wrong.any():
        rows = ", ".join(str(pairs[i].index) for i in wrong.nonzero().flatten().tolist()[:10])
        raise TrainingError(
            f"{name or 'scoring'}: {int(wrong.sum())} of {len(pairs)} pairs have log-probabilities that are not finite "
            f"(rows {rows}): the model's weights are not finite, or use --precision fp32"
        )
    lengths = (torch.tensor([len(getattr(pair, side)) for pair in pairs]) for side in ("chosen", "rejected"))
    return PairScores(chosen, rejected, *lengths)


def pair_values(
    policy: PairScores, reference: PairScores, beta: float, loss_type: str = "sigmoid", label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """Per pair, [n] each: loss, chosen and rejected reward, reward margin, whether it is right, chosen log-ratio."""
    objective = DPOObjective(reference, beta, loss_type, label_smoothing)
    losses, metrics = objective(range(len(policy.chosen)), policy.chosen, policy.rejected)
    return {"loss": losses, **metrics, "chosen_logratio": metrics["chosen_reward"] / beta}


def preference_metrics(
    policy: PairScores, reference: PairScores, beta: float, loss_type: str = "sigmoid", label_smoothing: float = 0.0
) -> dict[str, float]:
    """Means of `pair_values` over the pairs, each with its standard error (`_se`), and the share of ties.

    reward_accuracy is the share of pairs with margin > 0, ties that with margin exactly 0. chosen_logratio is of the
    data's chosen responses, so it is no KL divergence: no expectation over the policy, and it can be negative.
    """
    values = pair_values(policy, reference, beta, loss_type, label_smoothing)
    metrics = {"ties": (values["reward_margin"] == 0).float().mean().item()}
    for key, value in values.items():
        metrics[key], metrics[f"{key}_se"] = mean_and_error(value)
    return metrics


def exact_token_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(policy ‖ reference) of the next token, exactly: log-probabilities of the whole vocabulary, [..., V] -> [...].

    Never negative but for rounding, which is clamped at 0.
    """
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min(0.0)


def sequence_kl(
    policy_logits: Tensor, reference_logits: Tensor, ids: Tensor, response_mask: Tensor
) -> dict[str, Tensor]:
    """Three estimates of the sequence-level KL(policy ‖ reference), in nats, one per row, each [N].

    Rows are samples of the policy at temperature 1. Logits [N, T, V], or without the last; ids, response_mask [N, T].
    "kl": the exact next-token KL of every sampled prefix, summed over the response's tokens: unbiased, and
    of smaller variance than the others, since only the prefix is random (Rao-Blackwell; chain rule of KL).
    "k1": log p - log q of the sampled response: unbiased, and can be negative.
    "k3": sum over tokens of (q/p - 1) - log(q/p): never negative (Schulman 2020, "Approximating KL divergence").
    """
    mask = response_mask[:, 1:]
    log_p, log_q = (log_softmax(x[:, : mask.shape[1]][mask]) for x in (policy_logits, reference_logits))  # [M, V] each
    log_ratio = (log_p - log_q).gather(-1, ids[:, 1:][mask][:, None]).squeeze(-1)  # [M]
    each = {"kl": exact_token_kl(log_p, log_q), "k1": log_ratio, "k3": (-log_ratio).expm1() + log_ratio}
    nothing = torch.zeros(mask.shape, dtype=log_ratio.dtype, device=mask.device)
    return {name: nothing.masked_scatter(mask, values).sum(dim=-1) for name, values in each.items()}
