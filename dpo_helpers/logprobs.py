"""Log-probability of a response under a causal language model: the plain version that the lesson derives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from .tokens import EncodedPair, PairBatch, collate

BOTH = ("chosen", "rejected")


def log_softmax(logits: Tensor) -> Tensor:
    """log p of every token, [..., V], in float32 (float64 stays) whatever the model's precision: 16 bits lose some."""
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log p(token t | tokens before t), for t = 1 … T-1.

    logits: [N, T, V], any float dtype; ids: [N, T]. Returns [N, T-1], in the dtype of `log_softmax`.
    The logits at position t predict the token at t + 1, so both are shifted by one against each other.
    """
    return log_softmax(logits[:, :-1]).gather(-1, ids[:, 1:, None]).squeeze(-1)


def response_logprobs(logits: Tensor, ids: Tensor, response_mask: Tensor) -> Tensor:
    """log p(response | prompt) of each row: the sum over response tokens, end-of-text included. Returns [N].

    logits: [N, T, V]; ids: [N, T]; response_mask: [N, T] bool, True on response tokens.
    Sum, not mean: the mean would divide beta by the length (Rafailov et al. 2023, eq. 7 has the sum).
    """
    return (token_logprobs(logits, ids) * response_mask[:, 1:]).sum(dim=-1)


def batch_logprobs(model: Any, ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    """log p(response | prompt) of each row under `model`, [N]: one forward pass and `response_logprobs`.

    ids, attention_mask, response_mask: [N, T]. Logits before every response are never used and not asked for, which
    saves most of the memory where prompts are long and the vocabulary is large.
    """
    first = int(response_mask.any(dim=0).nonzero()[0]) - 1  # predicts the earliest response token of the batch
    kept = {"logits_to_keep": ids.shape[1] - first, "use_cache": False}
    logits = model(input_ids=ids, attention_mask=attention_mask, **kept).logits  # [N, T - first, V]
    return response_logprobs(logits, ids[:, first:], response_mask[:, first:])


def pair_logprobs(model: Any, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """(log p(chosen | prompt), log p(rejected | prompt)) of a batch under `model`, one of transformers; each [B]."""
    sums = batch_logprobs(model, batch.ids, batch.attention_mask, batch.response_mask)  # [2B]
    chosen, rejected = sums.chunk(2)
    return chosen, rejected


@dataclass(frozen=True)
class PairScores:
    """log p(response | prompt) of n pairs under one model, with the responses' lengths; all [n], on the CPU.

    chosen, rejected: float32, nats; chosen_tokens, rejected_tokens: int64, end-of-text included.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def __getitem__(self, at: Any) -> PairScores:
        """The scores of some of the pairs: a slice, indices or a mask."""
        return PairScores(self.chosen[at], self.rejected[at], self.chosen_tokens[at], self.rejected_tokens[at])

    def to(self, device: torch.device) -> PairScores:
        """The same scores on a device."""
        return PairScores(*(getattr(self, field.name).to(device) for field in fields(self)))


class Scorer(Protocol):
    """Where log-probabilities come from: `PlainScorer`, or `fast.engine.FastScorer`, which gives the same numbers."""

    def __call__(self, model: Any, at: Sequence[int], sides: Sequence[str] = BOTH) -> tuple[Tensor, ...]:
        """log p(response | prompt) under `model` of the pairs at these positions: for each side [B], float32."""


@dataclass(frozen=True)
class PlainScorer:
    """The plain path as a `Scorer`: the pairs at these positions are collated and run through the model."""

    pairs: Sequence[EncodedPair]
    pad_id: int

    def __call__(self, model: Any, at: Sequence[int], sides: Sequence[str] = BOTH) -> tuple[Tensor, ...]:
        """As `Scorer`; for the chosen side alone the rejected rows are not run."""
        batch = collate([self.pairs[i] for i in at], self.pad_id).to(model.device)
        rows = slice(0, 2 * len(at)) if "rejected" in sides else slice(0, len(at))  # the chosen ones come first
        sums = batch_logprobs(model, batch.ids[rows], batch.attention_mask[rows], batch.response_mask[rows])
        return tuple(sums.view(-1, len(at))[BOTH.index(side)] for side in sides)
