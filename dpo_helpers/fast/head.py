"""The output head of the fast path: log-probabilities and their gradient in one go, without keeping the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

CHUNK_BYTES = 2**26  # of logits that exist at a time


def head_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log p of each target under logits = hidden · weightᵀ, without keeping the logits. Returns [M], float32.

    hidden: [M, d]; weight: [V, d], the output head; targets: [M]. float64 stays float64, and nothing is less than
    float32: GPT-2's logits lie far below 0, where 16 bits are coarse (`run.loading.Float32Head`). With a frozen head
    the gradient has a closed form, ∂log p/∂hidden = weight[target] - softmax(logits) · weight, which is computed in the
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
