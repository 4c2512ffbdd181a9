"""The fast path: frozen blocks once, one row a pair, the head only where a response token is predicted.

A plain step (`logprobs.pair_logprobs`) runs two rows a pair through the whole model. Three things in that are waste:

- Blocks 0 … k-1 and the embeddings are frozen, so their output is the same at every step, for every β, for policy and
  reference. `FrozenTrunk` computes it once and keeps it.
- Both rows start with the same prompt. Here a pair is one row, prompt + chosen + rejected, whose mask keeps the
  responses from seeing each other, and whose positions start again after the prompt.
- Logits of the prompt are never used. Here the head sees the positions that predict a response token, and no others.

The numbers are those of the plain step up to rounding (`tests/test_engine.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .device import Compute
from .models import blocks
from .tokens import EncodedPair, by_length

SUPPORTED = ("gpt2", "llama")  # model types whose logits are head(last hidden state) and nothing more


@dataclass(frozen=True)
class PackedBatch:
    """B pairs, one row each: prompt + chosen + rejected, padded on the right.

    ids, positions: [B, T] int64; visible: [B, 1, T, T] bool, whether query i sees key j.
    row, source, target: [R] int64, one entry a response token: the row it stands in, the position that predicts it
    (for both first tokens the prompt's last one), and its id. side: [R] int64, its place in the 2B log-probabilities,
    all chosen, then all rejected.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    row: Tensor
    source: Tensor
    target: Tensor
    side: Tensor


def pack(pairs: Sequence[EncodedPair], pad_id: int) -> PackedBatch:
    """Pack pairs into one batch, a row each."""
    rows = [pair.prompt + pair.chosen + pair.rejected for pair in pairs]
    length = max(map(len, rows))
    ids = torch.full((len(pairs), length), pad_id)
    positions = torch.zeros_like(ids)
    segment = torch.full_like(ids, 3)  # 0 prompt, 1 chosen, 2 rejected, 3 padding
    row, source, target, side = [], [], [], []
    for i, pair in enumerate(pairs):
        p, c, r = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        ids[i, : p + c + r] = torch.tensor(rows[i])
        positions[i, : p + c + r] = torch.tensor([*range(p + c), *range(p, p + r)])
        segment[i, : p + c + r] = torch.tensor([0] * p + [1] * c + [2] * r)
        row += [i] * (c + r)
        source += [*range(p - 1, p + c - 1), *[p - 1, *range(p + c, p + c + r - 1)][:r]]
        target += pair.chosen + pair.rejected
        side += [i] * c + [len(pairs) + i] * r
    query, key = segment[:, :, None], segment[:, None, :]  # [B, T, 1], [B, 1, T]
    visible = torch.ones(length, length, dtype=torch.bool).tril() & ((key == 0) | (key == query))
    return PackedBatch(ids, positions, visible[:, None], *(torch.tensor(x) for x in (row, source, target, side)))


class _Replay(nn.Module):
    """Stands in for the frozen blocks: returns their output, which was stored, whatever comes in."""

    def __init__(self, stored: Tensor):
        super().__init__()
        self.stored = stored  # [B, T, d]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The stored output."""
        return self.stored


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


def _hidden(model: Any, batch: PackedBatch, modules: Sequence[nn.Module], device: torch.device) -> Tensor:
    """Last hidden state [B, T, d] of a packed batch, through these blocks. The mask is added to attention scores."""
    smallest = torch.finfo(torch.float32).min
    mask = torch.zeros(batch.visible.shape).masked_fill(~batch.visible, smallest)
    inputs = {"input_ids": batch.ids, "position_ids": batch.positions, "attention_mask": mask}
    with _with_blocks(model, modules):
        out = model.base_model(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False)
    hidden: Tensor = out.last_hidden_state
    return hidden


class FrozenTrunk:
    """The output of the first `first_blocks` blocks for every pair, [P + C + R, d]: made once, used at each step."""

    def __init__(self, model: Any, first_blocks: int, pairs: Sequence[EncodedPair], compute: Compute, *, pad_id: int):
        """Run the trunk of `model` over all pairs, without gradient; keeps 4·d bytes a token, on the CPU."""
        self.first_blocks, self.pairs, self.pad_id = first_blocks, pairs, pad_id
        self._ends = torch.tensor([_tokens(pair) for pair in pairs]).cumsum(0).tolist()
        self._starts = [0, *self._ends[:-1]]
        self._stored = torch.empty(self._ends[-1], model.config.hidden_size)
        trunk = list(blocks(model))[:first_blocks]
        caught: list[Tensor] = []
        hook = trunk[-1].register_forward_hook(lambda module, args, output: caught.append(output))
        order = by_length(pairs)
        for start in tqdm(range(0, len(order), 16), desc="frozen blocks", unit="batch"):
            at = order[start : start + 16]
            with torch.no_grad(), compute.autocast():
                _hidden(model, pack([pairs[i] for i in at], pad_id), trunk, compute.device)
            for row, i in zip(caught.pop(), at, strict=True):
                self._stored[self._starts[i] : self._ends[i]] = row[: _tokens(pairs[i])].float().cpu()
        hook.remove()

    @staticmethod
    def bytes_needed(pairs: Sequence[EncodedPair], hidden_size: int) -> int:
        """Memory that the stored outputs of these pairs take."""
        return 4 * hidden_size * sum(map(_tokens, pairs))

    def pair_logprobs(self, model: Any, at: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(log p(chosen | prompt), log p(rejected | prompt)) of the trunk's pairs at these positions, each [B].

        As `logprobs.pair_logprobs`, which is the plain version; model: one that differs from the trunk's in blocks
        from `first_blocks` on and in what comes after them, and nowhere else.
        """
        chosen, rejected = self._logprobs(model, [self.pairs[i] for i in at], at).chunk(2)
        return chosen, rejected

    def chosen_logprobs(self, model: Any, at: Sequence[int]) -> Tensor:
        """log p(chosen | prompt) alone, [B], for SFT: the rejected responses are not run."""
        return self._logprobs(model, [replace(self.pairs[i], rejected=[]) for i in at], at)[: len(at)]

    def _logprobs(self, model: Any, pairs: Sequence[EncodedPair], at: Sequence[int]) -> Tensor:
        batch = pack(pairs, self.pad_id)
        stored = torch.zeros(*batch.ids.shape, self._stored.shape[1])
        for row, (pair, i) in enumerate(zip(pairs, at, strict=True)):
            start, length = self._starts[i], _tokens(pair)
            stored[row, :length] = self._stored[start : start + length]
        device = model.get_output_embeddings().weight.device
        rest = list(blocks(model))[self.first_blocks :]
        hidden = _hidden(model, batch, [_Replay(stored.to(device)), *rest], device)
        logits = model.get_output_embeddings()(hidden[batch.row, batch.source])  # [R, V]
        logps = -cross_entropy(logits.float(), batch.target.to(device), reduction="none")  # [R]
        return torch.zeros(2 * len(at), device=device).index_add(0, batch.side.to(device), logps)


def _tokens(pair: EncodedPair) -> int:
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
