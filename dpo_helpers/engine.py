"""The frozen trunk, run once: blocks 0 … k-1 give policy and reference the same output, at every step, for every β.

A plain training step runs the whole model forward, although its first k blocks and its embeddings are frozen
and so return for each pair what they returned an epoch ago, or in the run with another β. Here that output is
kept, and a step starts at block k. The numbers are those of the plain step, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .device import Compute
from .models import blocks
from .tokens import EncodedPair, PairBatch, by_length, collate


class _Replay(nn.Module):
    """Stands in for the frozen blocks: returns their output, which was stored, whatever comes in."""

    def __init__(self, stored: Tensor):
        super().__init__()
        self.stored = stored  # [2B, T, d], chosen rows first

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The stored rows; the first half where only the chosen rows run, as in SFT."""
        return self.stored[: hidden_states.shape[0]]


@contextmanager
def _with_blocks(model: Any, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let the model run through these blocks instead of its own."""
    own = blocks(model)
    path = next(name for name, module in model.named_modules() if module is own)
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, name, nn.ModuleList(modules))
    try:
        yield
    finally:
        setattr(owner, name, own)


class FrozenTrunk:
    """The first `first_blocks` blocks' output for every pair: computed once, replayed in training steps."""

    def __init__(self, model: Any, first_blocks: int, pairs: Sequence[EncodedPair], compute: Compute, *, pad_id: int):
        """Run the trunk of `model` over all pairs, without gradient; keeps 4·d bytes a token, on the CPU."""
        self.first_blocks = first_blocks
        lengths = [len(pair.prompt) + len(side) for pair in pairs for side in (pair.chosen, pair.rejected)]
        self._ends = torch.tensor(lengths).cumsum(0).tolist()
        self._starts = [0, *self._ends[:-1]]
        self._stored = torch.empty(sum(lengths), model.config.hidden_size)
        caught: list[Tensor] = []
        trunk = list(blocks(model))[:first_blocks]
        hook = trunk[-1].register_forward_hook(lambda module, args, output: caught.append(output))
        order = by_length(pairs)
        with _with_blocks(model, trunk), torch.no_grad(), compute.autocast():
            for start in tqdm(range(0, len(order), 16), desc="frozen blocks", unit="batch"):
                at = order[start : start + 16]
                batch = collate([pairs[i] for i in at], pad_id).to(compute.device)
                model.base_model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
                for row, index in zip(caught.pop(), self._rows(at), strict=True):
                    begin, end = self._starts[index], self._ends[index]
                    self._stored[begin:end] = row[: end - begin].float().cpu()
        hook.remove()

    @staticmethod
    def bytes_needed(pairs: Sequence[EncodedPair], hidden_size: int) -> int:
        """Memory that the stored outputs of these pairs take."""
        return 4 * hidden_size * sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)

    @staticmethod
    def _rows(at: Sequence[int]) -> list[int]:
        """Rows of these pairs in a PairBatch's order (all chosen, then all rejected); stored pair by pair."""
        return [2 * i for i in at] + [2 * i + 1 for i in at]

    def wrap(self, objective: Any) -> Any:
        """The same objective, starting at block `first_blocks`. Its pairs must be those of this trunk, by position."""

        def replayed(model: Any, batch: PairBatch, pairs: Sequence[int]) -> Any:
            stored = torch.zeros(*batch.ids.shape, self._stored.shape[1])
            for row, index in enumerate(self._rows(pairs)):
                begin, end = self._starts[index], self._ends[index]
                stored[row, : end - begin] = self._stored[begin:end]
            rest = list(blocks(model))[self.first_blocks :]
            with _with_blocks(model, [_Replay(stored.to(batch.ids.device)), *rest]):
                return objective(model, batch, pairs)

        return replayed
