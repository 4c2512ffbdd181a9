"""Log-probability of a response under a causal language model: the plain version that the lesson derives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .tokens import PairBatch


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log p(token t | tokens before t), for t = 1 … T-1.

    logits: [N, T, V], any float dtype; ids: [N, T]. Returns [N, T-1] in float32 (float64 stays float64).
    The logits at position t predict the token at t + 1, so both are shifted by one against each other.
    The log-softmax runs in float32 whatever the precision of the model: in 16 bits it loses the small ones.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    log_p = logits[:, :-1].log_softmax(dim=-1)  # [N, T-1, V]
    return log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)


def response_logprobs(logits: Tensor, ids: Tensor, response_mask: Tensor) -> Tensor:
    """log p(response | prompt) of each row: the sum over response tokens, end-of-text included. Returns [N].

    logits: [N, T, V]; ids: [N, T]; response_mask: [N, T] bool, True on response tokens.
    Sum, not mean: the mean would divide beta by the length (Rafailov et al. 2023, eq. 7 has the sum).
    """
    return (token_logprobs(logits, ids) * response_mask[:, 1:]).sum(dim=-1)


def batch_logprobs(model: Any, ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    """log p(response | prompt) of each row under `model`, [N]: one forward pass and `response_logprobs`.

    ids, attention_mask, response_mask: [N, T]. The logits of positions before every response are never used,
    so transformers is asked for the last ones only; with long prompts and a large vocabulary that saves most
    of the memory.
    """
    first = int(response_mask.any(dim=0).nonzero()[0]) - 1  # predicts the earliest response token of the batch
    kept = {"logits_to_keep": ids.shape[1] - first, "use_cache": False}
    logits = model(input_ids=ids, attention_mask=attention_mask, **kept).logits  # [N, T - first, V]
    return response_logprobs(logits, ids[:, first:], response_mask[:, first:])


def pair_logprobs(model: Any, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """(log p(chosen | prompt), log p(rejected | prompt)) of a batch under `model`, each [B].

    model: a causal language model of transformers.
    """
    sums = batch_logprobs(model, batch.ids, batch.attention_mask, batch.response_mask)  # [2B]
    chosen, rejected = sums.chunk(2)
    return chosen, rejected


CHUNK_BYTES = 2**26  # of logits that exist at a time


def head_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log p of each target under logits = hidden · weightᵀ, without keeping the logits. Returns [M], float32.

    hidden: [M, d]; weight: [V, d], the output head; targets: [M]. float64 stays float64, and nothing is less than
    float32: GPT-2's logits lie far below 0, where 16 bits are coarse (`models.Float32Head`). With a frozen head the
    gradient has a closed form, ∂log p/∂hidden = weight[target] - softmax(logits) · weight, which is computed in the
    forward pass, chunk by chunk, while the logits are at hand. With one that trains, autograd does it.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        with torch.autocast(hidden.device.type, enabled=False):
            logits = hidden.to(weight.dtype) @ weight.T  # [M, V]
        return -cross_entropy(logits, targets, reduction="none")
    logps: Tensor = _HeadLogprobs.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return logps


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        weight = weight.to(dtype)
        logps = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(1, CHUNK_BYTES // (4 * len(weight)))
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in (slice(start, start + rows) for start in range(0, len(hidden), rows)):
                logits = hidden[chunk].to(dtype) @ weight.T  # [rows, V]
                target = targets[chunk]
                largest = logits.amax(dim=-1, keepdim=True)
                of_target = logits.gather(-1, target[:, None])
                unnormed = logits.sub_(largest).exp_()  # softmax, but for the division by its sum
                total = unnormed.sum(dim=-1, keepdim=True)
                logps[chunk] = (of_target - largest - total.log()).squeeze(-1)
                if gradient is not None:
                    gradient[chunk] = weight[target] - (unnormed @ weight) / total
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (upstream[:, None] * gradient).to(gradient.dtype), None, None
