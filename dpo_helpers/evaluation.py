"""Measure a model: rewards and accuracy on held-out pairs, KL to the reference on its own samples.

Every mean comes with its standard error, so a difference can be told from noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .device import Compute
from .generation import Response, distinct_n, repeated_share
from .kl import sequence_kl
from .logprobs import pair_logprobs
from .losses import dpo_loss
from .tokens import EncodedPair, collate, encode_text


@dataclass(frozen=True)
class PairScores:
    """log p(response | prompt) of n pairs under one model: chosen [n], rejected [n], float32, on the CPU."""

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model: `metrics` by name (`_se`: standard error), and the sampled responses."""

    name: str
    beta: float
    metrics: dict[str, float]
    responses: list[Response]


@torch.no_grad()
def score_pairs(
    model: Any, pairs: Sequence[EncodedPair], compute: Compute, *, pad_id: int, batch_size: int = 16, name: str = ""
) -> PairScores:
    """Log-probabilities of all pairs, in their order. Pairs of like length share a batch, to pad little."""
    by_length = sorted(
        range(len(pairs)), key=lambda i: len(pairs[i].prompt) + max(len(pairs[i].chosen), len(pairs[i].rejected))
    )
    chosen, rejected = torch.empty(len(pairs)), torch.empty(len(pairs))
    bar = tqdm(range(0, len(pairs), batch_size), desc=name or "scoring", unit="batch", disable=None if name else True)
    for start in bar:
        at = by_length[start : start + batch_size]
        batch = collate([pairs[i] for i in at], pad_id).to(compute.device)
        with compute.autocast():
            of_chosen, of_rejected = pair_logprobs(model, batch)
        chosen[at], rejected[at] = of_chosen.float().cpu(), of_rejected.float().cpu()
    return PairScores(chosen, rejected)


def mean_and_error(values: Tensor | Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean (nan for fewer than two values)."""
    x = torch.as_tensor(values, dtype=torch.float64)
    error = x.std().item() / math.sqrt(len(x)) if len(x) > 1 else float("nan")
    return x.mean().item(), error


def preference_metrics(policy: PairScores, reference: PairScores, beta: float) -> dict[str, float]:
    """Metrics of a policy on pairs (DESIGN's words): DPO loss, rewards, margins, accuracy, chosen log-ratio.

    reward_accuracy is the share of pairs with margin > 0 and ties the share with margin exactly 0;
    keys ending in _se are standard errors over pairs. chosen_logratio is the mean log-ratio on the data's
    chosen responses, which is not a KL divergence: it is no expectation over the policy and can be negative.
    """
    losses, chosen, rejected = dpo_loss(policy.chosen, policy.rejected, reference.chosen, reference.rejected, beta=beta)
    margins = chosen - rejected
    values = {
        "loss": losses,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "reward_margin": margins,
        "reward_accuracy": (margins > 0).float(),
        "chosen_logratio": chosen / beta,
    }
    metrics = {"ties": (margins == 0).float().mean().item()}
    for key, value in values.items():
        metrics[key], metrics[f"{key}_se"] = mean_and_error(value)
    return metrics


@torch.no_grad()
def measure_kl(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    responses: Sequence[Response],
    compute: Compute,
    *,
    max_prompt_length: int,
    batch_size: int = 16,
) -> dict[str, float]:
    """KL(policy ‖ reference) in nats a response, on responses sampled from the policy at temperature 1.

    Returns kl (exact next-token KL of each sampled prefix, summed over tokens), k1 and k3, each with its
    standard error over prompts (`_se`); see `kl.sequence_kl`. A response cut at max_new_tokens counts up to
    the cut: the KL of responses of at most that length.
    """
    rows = [
        EncodedPair(encode_text(tokenizer, r.prompt)[-max_prompt_length:], r.ids, r.ids, index=i)
        for i, r in enumerate(responses)
    ]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].chosen))
    estimates: dict[str, list[Tensor]] = {"kl": [], "k1": [], "k3": []}
    for start in range(0, len(rows), batch_size):
        at = by_length[start : start + batch_size]
        pair_batch = collate([rows[i] for i in at], tokenizer.eos_token_id).to(compute.device)
        size = len(at)  # chosen and rejected hold the same response here: the first half is enough
        ids, mask = pair_batch.ids[:size], pair_batch.attention_mask[:size]
        with compute.autocast():
            policy_logits = policy(input_ids=ids, attention_mask=mask).logits
            reference_logits = reference(input_ids=ids, attention_mask=mask).logits
        for key, value in sequence_kl(policy_logits, reference_logits, ids, pair_batch.response_mask[:size]).items():
            estimates[key].append(value.cpu())
    result: dict[str, float] = {}
    for key, values in estimates.items():
        result[key], result[f"{key}_se"] = mean_and_error(torch.cat(values))
    return result


def text_measures(responses: Sequence[Response]) -> dict[str, float]:
    """Length in tokens, share that ended by itself, repeated 3-gram share (each with _se), distinct-2."""
    texts = [response.text for response in responses]
    measures = {"distinct_2": distinct_n(texts, 2)}
    for key, values in {
        "length": [float(len(r.ids)) for r in responses],
        "ended": [float(r.ended) for r in responses],
        "repeated_3grams": [repeated_share(text) for text in texts],
    }.items():
        measures[key], measures[f"{key}_se"] = mean_and_error(values)
    return measures
