"""From text to tensors: token ids of pairs, truncation, padding, masks, and the order of the batches.

Prompt and response are tokenised separately and joined, so no token spans the boundary. Exactly one
end-of-text token follows a response that was not truncated, and it is supervised. GPT-2 pads with the same
id, so masks go by position and never by id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import DataError
from .hh import Pair


class TokenizerLike(Protocol):
    """What the course needs of a tokenizer: text to ids and back, and the id that ends a text."""

    eos_token_id: int

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""


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


def encode_text(tokenizer: TokenizerLike, text: str) -> list[int]:
    """Token ids of a text as it stands: nothing is added before or after it.

    The tokenizer must be one of `models.load_tokenizer`, for which "<|endoftext|>" in a text is thirteen characters.
    """
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_pair(tokenizer: TokenizerLike, pair: Pair, *, max_length: int, max_prompt_length: int) -> EncodedPair:
    """Tokenise a pair and truncate it where prompt + longer response exceeds `max_length` tokens.

    Truncation keeps the last `max_prompt_length` prompt tokens, then cuts each response to what is left.
    """
    prompt, *sides = (encode_text(tokenizer, text) for text in (pair.prompt, pair.chosen, pair.rejected))
    prompt_cut, cuts = 0, [0, 0]
    sides = [[*side, tokenizer.eos_token_id] for side in sides]
    if len(prompt) + max(map(len, sides)) > max_length:
        prompt_cut = max(0, len(prompt) - max_prompt_length)
        prompt = prompt[prompt_cut:]
        room = max_length - len(prompt)
        cuts = [max(0, len(side) - room) for side in sides]
        sides = [side[:room] for side in sides]
    return EncodedPair(prompt, sides[0], sides[1], pair.index, prompt_cut, cuts[0], cuts[1])


def encode_pairs(
    tokenizer: Any, pairs: Iterable[Pair], *, max_length: int, max_prompt_length: int, chunk: int = 256
) -> Iterator[EncodedPair]:
    """`encode_pair` of each pair, as they come, `chunk` at a time, which a tokenizer of transformers does faster."""
    lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    stream = iter(pairs)
    while part := list(islice(stream, chunk)):
        texts = [text for pair in part for text in (pair.prompt, pair.chosen, pair.rejected)]
        known = _Known(dict(zip(texts, _encode_batch(tokenizer, texts), strict=True)), tokenizer.eos_token_id)
        yield from (encode_pair(known, pair, **lengths) for pair in part)


def _encode_batch(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if getattr(tokenizer, "is_fast", False):  # no offsets, no masks: only ids are wanted
        tokenizer.backend_tokenizer.encode_special_tokens = True  # as `models.load_tokenizer` asks of each call
        return [found.ids for found in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return [encode_text(tokenizer, text) for text in texts]


@dataclass
class _Known:
    """A tokenizer of texts whose ids were found before."""

    ids: dict[str, list[int]]
    eos_token_id: int

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return self.ids[text]

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError


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
    return sorted(
        range(len(pairs)), key=lambda i: len(pairs[i].prompt) + max(len(pairs[i].chosen), len(pairs[i].rejected))
    )


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
