"""The fast path: the numbers of the plain step (`logprobs.PlainScorer`) for a fraction of its work.

A plain step runs two padded rows per pair through the whole model and scores every position. Here

- the frozen blocks run once: their output never changes, for no epoch, no β, and it is the same for policy and
  reference, so it is computed when a pair is first met and kept (`store`);
- a prompt is run once for its two responses, and nothing is padded outside attention (`flat`);
- after the last block's attention only the positions that predict a response token go on;
- the head, which is frozen, gives log-probabilities and their gradient in one go (`head.head_logprobs`).

All of it is exact: it differs from the plain step by rounding only (`tests/test_engine.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import TrainingError
from ..logprobs import BOTH
from ..models import blocks, frozen_part
from ..tokens import EncodedPair, by_length
from .architectures import Architecture, architecture
from .flat import FlatBatch, flatten, tokens_of
from .head import head_logprobs
from .store import TrunkStore, room

BUDGET = 4e9  # bytes kept of the frozen blocks' output
GROUP = 8  # pairs that meet the frozen blocks together


class FastScorer:
    """A `logprobs.Scorer` for models that share their first `first_blocks` blocks and embeddings."""

    def __init__(
        self,
        model: Any,
        pairs: Sequence[EncodedPair],
        first_blocks: int,
        *,
        budget: float = BUDGET,
        file: Path | None = None,
    ):
        """model: any of them, on the device to use; budget: bytes kept of the frozen blocks' output.

        file: where they are kept for another process with the same frozen blocks, pairs and budget (`TrunkStore`).
        """
        self.pairs, self.first_blocks, self.device = pairs, first_blocks, model.device
        width = model.config.hidden_size
        rows = int(room(budget, model.device) / (width * model.dtype.itemsize)) if first_blocks else 0
        self.groups = self._groups(rows)
        sizes = {i: tokens_of(pairs[i]) for i in self.groups}
        self.store = TrunkStore(sizes, width, model.device, dtype=model.dtype, file=file)

    def _groups(self, rows: int) -> dict[int, list[int]]:
        """Of each pair that is kept, the pairs of like length that are computed with it, whichever of them comes first.

        A matrix product rounds a row by what else is in the matrix. With fixed groups a pair's kept output does not
        depend on what ran before, so that a resumed training goes on bit for bit. Where there is room for too few rows,
        the longest pairs have precedence; the others are computed with those of their batch each time.
        """
        order = by_length(self.pairs)[::-1]
        groups = [order[start : start + GROUP] for start in range(0, len(order), GROUP)]
        kept: dict[int, list[int]] = {}
        for group in groups:
            tokens = sum(tokens_of(self.pairs[i]) for i in group)
            if tokens <= rows:
                rows -= tokens
                kept |= dict.fromkeys(group, group)
        return kept

    def __call__(self, model: Any, at: Sequence[int], sides: Sequence[str] = BOTH) -> tuple[Tensor, ...]:
        """As `Scorer`: of each side [B], float32. For the chosen side alone the rejected responses are not run."""
        sums = self._logprobs(model, at, chosen_only="rejected" not in sides)
        return tuple(sums.view(-1, len(at))[BOTH.index(side)] for side in sides)

    def _logprobs(self, model: Any, at: Sequence[int], *, chosen_only: bool) -> Tensor:
        """[2B], all chosen, then all rejected."""
        parts, stack = architecture(model), list(blocks(model))
        self._require_frozen(model)
        batch = flatten([self.pairs[i] for i in at], chosen_only=chosen_only).to(self.device)
        x = self._trunk(parts, stack[: self.first_blocks], at, batch, chosen_only)  # [N, d]
        # [M, d]: after the last attention nothing but the scored positions is read
        x = run_blocks(parts, stack[self.first_blocks :], x, batch, only=batch.scored)
        logps = head_logprobs(parts.norm(x), model.get_output_embeddings().weight, batch.targets)  # [M]
        if logps.is_cuda:  # there index_add adds in any order, and the same weights would not score the same twice
            mine = batch.side == torch.arange(2 * len(at), device=logps.device)[:, None]  # [2B, M]
            return torch.where(mine, logps, 0.0).sum(dim=-1)
        return logps.new_zeros(2 * len(at)).index_add(0, batch.side, logps)

    def _require_frozen(self, model: Any) -> None:
        if model.training:
            raise TrainingError("the fast path needs dropout off, since it runs the frozen blocks once: model.eval()")
        if not torch.is_grad_enabled():
            return
        if any(parameter.requires_grad for parameter in frozen_part(model, self.first_blocks).parameters()):
            raise TrainingError(
                f"the fast path runs the embeddings and the first {self.first_blocks} blocks without gradient, but "
                "they are not all frozen: models.freeze"
            )

    @torch.no_grad()
    def _trunk(
        self, parts: Architecture, frozen: Sequence[Any], at: Sequence[int], batch: FlatBatch, chosen_only: bool
    ) -> Tensor:
        """Output of the frozen blocks for a batch, [N, d]: from the store, or computed and kept if there is room."""
        if not frozen:
            return parts.embed(batch.ids, batch.positions)
        missing = [i for i in dict.fromkeys(at) if not self.store.has(i)]
        for i in missing:
            if self.store.keeps(i) and not self.store.has(i):
                for j, rows in self._run_frozen(parts, frozen, self.groups[i]).items():
                    self.store.put(j, rows)
        fresh = self._run_frozen(parts, frozen, [i for i in missing if not self.store.keeps(i)])
        lengths = [tokens_of(p) - (len(p.rejected) - 1) * chosen_only for p in (self.pairs[i] for i in at)]
        found = [fresh[i][:n] if i in fresh else self.store.get(i, n) for i, n in zip(at, lengths, strict=True)]
        x = torch.cat(found)
        self.store.release()
        return x

    def _run_frozen(self, parts: Architecture, frozen: Sequence[Any], at: Sequence[int]) -> dict[int, Tensor]:
        """Output of the frozen blocks for these pairs, computed together: [tokens of the pair, d] each."""
        if not at:
            return {}
        pairs = [self.pairs[i] for i in at]
        batch = flatten(pairs).to(self.device)
        x = run_blocks(parts, frozen, parts.embed(batch.ids, batch.positions), batch)
        return dict(zip(at, torch.split(x, list(map(tokens_of, pairs))), strict=True))


def run_blocks(
    parts: Architecture, stack: Sequence[Any], x: Tensor, batch: FlatBatch, only: Tensor | None = None
) -> Tensor:
    """Transformer blocks over tokens without padding, [N, d] -> [N, d]; only: these positions [M] go on after the last
    attention, [M, d].
    """
    turns = parts.turns(x, batch.positions)
    for block in stack:
        mixed = _attention(parts, parts.qkv(block, x, turns), batch, parts.scale(block))
        if only is not None and block is stack[-1]:
            x, mixed = x.index_select(0, only), mixed.index_select(0, only)
        x = x + parts.output(block, mixed)
        x = x + parts.mlp(block, x)
    return x if stack or only is None else x.index_select(0, only)


def _attention(parts: Architecture, qkv: Tensor, batch: FlatBatch, scale: float) -> Tensor:
    """Causal attention within each row of a batch. qkv: [N, heads + 2·kv_heads, d_h] -> [N, heads·d_h]."""
    outputs = []
    sizes = [rows.numel() for rows in batch.groups]
    everything = qkv.index_select(0, torch.cat([rows.flatten() for rows in batch.groups]))
    for rows, part in zip(batch.groups, torch.split(everything, sizes), strict=True):
        in_rows = part.view(*rows.shape, *part.shape[1:]).transpose(1, 2)  # [n, heads + 2·kv_heads, S, d_h]
        q, k, v = torch.split(in_rows, [parts.heads, parts.kv_heads, parts.kv_heads], dim=1)
        shares = parts.heads != parts.kv_heads
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shares)
        outputs.append(mixed.transpose(1, 2).flatten(2).flatten(0, 1))  # [n·S, heads·d_h]
    return torch.cat(outputs).index_select(0, batch.back)
