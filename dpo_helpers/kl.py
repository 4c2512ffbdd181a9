"""KL divergence between two language models, from their logits on sampled responses."""

from __future__ import annotations

import torch
from torch import Tensor

from .logprobs import token_logprobs


def exact_token_kl(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(policy ‖ reference) of the next token, exactly, over the full vocabulary. [N, T, V] each -> [N, T].

    In float32 (float64 stays float64). Never negative but for rounding, which is clamped at 0.
    """
    dtype = torch.float64 if policy_logits.dtype == torch.float64 else torch.float32
    p = policy_logits.to(dtype).log_softmax(dim=-1)
    q = reference_logits.to(dtype).log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1).clamp_min(0.0)


def sequence_kl(
    policy_logits: Tensor, reference_logits: Tensor, ids: Tensor, response_mask: Tensor
) -> dict[str, Tensor]:
    """Three estimates of the sequence-level KL(policy ‖ reference), in nats, one a row, each [N].

    The rows must be sampled from the policy at temperature 1. Logits [N, T, V]; ids, response_mask [N, T].
    "kl": the exact next-token KL of every sampled prefix, summed over the response's tokens: unbiased, and
    of smaller variance than the others, since only the prefix is random (Rao-Blackwell; chain rule of KL).
    "k1": log p - log q of the sampled response: unbiased, and can be negative.
    "k3": sum over tokens of (q/p - 1) - log(q/p): never negative (Schulman 2020, "Approximating KL divergence").
    """
    mask = response_mask[:, 1:]
    exact = exact_token_kl(policy_logits[:, :-1], reference_logits[:, :-1])  # [N, T-1]
    log_ratio = token_logprobs(policy_logits, ids) - token_logprobs(reference_logits, ids)
    k3 = (-log_ratio).expm1() + log_ratio
    return {name: (value * mask).sum(dim=-1) for name, value in (("kl", exact), ("k1", log_ratio), ("k3", k3))}
