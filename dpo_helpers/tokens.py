"""From text to tensors: token ids of pairs, truncation, padding, masks, and the order of the batches.

Prompt and response are tokenised separately and joined, so no token spans the boundary. Exactly one
end-of-text token follows a response that was not truncated, and it is supervised. GPT-2 pads with the same
id, so masks go by position and never by id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .errors import DataError
from .hh import Pair


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair; `chosen` and `rejected` end with end-of-text unless they were cut.

    prompt_cut, chosen_cut, rejected_cut: how many tokens truncation removed. index: the pair's row.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    index: int = 0
    prompt_cut: int = 0
    chosen_cut: int = 0
    rejected_cut: int = 0

    @property
    def was_cut(self) -> bool:
        """Whether truncation removed anything."""
        return self.prompt_cut + self.chosen_cut + self.rejected_cut > 0


@dataclass(frozen=True)
class PairBatch:
    """B pairs as 2B right-padded rows: first the B chosen sequences, then the B rejected ones.

    ids: [2B, T] int64, prompt + response + padding
    attention_mask: [2B, T] int64, 1 on real tokens
    response_mask: [2B, T] bool, True on response tokens (end-of-text included)
    rows: the B pairs' row numbers, for messages
    """

    ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    rows: tuple[int, ...]

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on a device."""
        return PairBatch(self.ids.to(device), self.attention_mask.to(device), self.response_mask.to(device), self.rows)


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as it is: nothing is added or cut, and "<|endoftext|>" in it is thirteen characters.

    tokenizer: one of transformers, as `run.loading.load_tokenizer` gives it.
    """
    if getattr(tokenizer, "is_fast", False):  # no offsets, no masks: only ids are wanted
        tokenizer.backend_tokenizer.encode_special_tokens = True
        return [found.ids for found in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one text, as in `encode_texts`."""
    return encode_texts(tokenizer, [text])[0]


def encode_pair(tokenizer: Any, pair: Pair, *, max_length: int, max_prompt_length: int) -> EncodedPair:
    """Tokenise one pair, as `encode_pairs` does."""
    return next(encode_pairs(tokenizer, [pair], max_length=max_length, max_prompt_length=max_prompt_length))


def encode_pairs(
    tokenizer: Any, pairs: Iterable[Pair], *, max_length: int, max_prompt_length: int, chunk: int = 256
) -> Iterator[EncodedPair]:
    """Tokenise pairs as they come, and truncate each whose prompt + longer response exceeds `max_length` tokens.

    Truncation keeps the last `max_prompt_length` prompt tokens, then cuts each response to what is left. chunk: pairs
    that meet the tokenizer together.
    """
    stream = iter(pairs)
    while part := list(islice(stream, chunk)):
        ids = iter(encode_texts(tokenizer, [text for p in part for text in (p.prompt, p.chosen, p.rejected)]))
        for pair, prompt, chosen, rejected in zip(part, ids, ids, ids, strict=False):
            prompt_cut, room = 0, max_length
            sides = [[*side, tokenizer.eos_token_id] for side in (chosen, rejected)]
            if len(prompt) + max(map(len, sides)) > max_length:
                prompt_cut = max(0, len(prompt) - max_prompt_length)
                room = max_length - (len(prompt) - prompt_cut)
            cuts = (max(0, len(side) - room) for side in sides)
            yield EncodedPair(prompt[prompt_cut:], sides[0][:room], sides[1][:room], pair.index, prompt_cut, *cuts)


def collate(pairs: Sequence[EncodedPair], pad_id: int) -> PairBatch:
    """Pad pairs into one PairBatch, to the longest sequence among them. Raises DataError on no pairs."""
    if not pairs:
        raise DataError("a batch needs at least one pair")
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    in_response = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        attention[i, :end] = 1
        in_response[i, len(prompt) : end] = True
    return PairBatch(ids, attention, in_response, tuple(p.index for p in pairs))


def by_length(pairs: Sequence[EncodedPair]) -> list[int]:
    """Positions of the pairs, shortest first (prompt + longer response): neighbours pad little in one batch."""
    longer = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    return sorted(range(len(pairs)), key=longer.__getitem__)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n pairs in an epoch: a permutation that depends on (seed, epoch) and nothing else."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def batch_order(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch, positions of the pairs) of every update; the last batch of an epoch may be smaller."""
    for epoch in range(epochs):
        order = epoch_order(n, seed, epoch)
        for start in range(0, n, batch_size):
            yield epoch, order[start : start + batch_size]
