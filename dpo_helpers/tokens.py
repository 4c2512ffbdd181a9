"""From text to tensors: token ids of pairs, truncation, padding, masks, and the order of the batches.

Prompt and response are tokenised so that no token spans the boundary. Exactly one end-of-text token follows a
response that was not truncated, and it is supervised. GPT-2 pads with the same id, so masks go by position, not by id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .errors import DataError
from .hh import Pair, as_messages

TODAY = "{% macro strftime_now(_) %}26 Jul 2024{% endmacro %}\n"  # before a template: ids do not change with the day


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


def encode_texts(tokenizer: Any, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """Token ids of each text as it is: nothing is added, padded or cut, and "<|endoftext|>" is thirteen characters.

    tokenizer: one of transformers, as `run.loading.load_tokenizer` gives it. special: "<|endoftext|>" is one token.
    """
    if getattr(tokenizer, "is_fast", False):  # no offsets, no masks: only ids are wanted
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # its file keeps both as they were in the last call before it was saved
        backend.no_padding()
        if getattr(backend.model, "dropout", None):  # of BPE merges, while another model was trained
            backend.model.dropout = None
        backend.encode_special_tokens = not special
        return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
    one = {"add_special_tokens": False, "split_special_tokens": not special}
    return [list(tokenizer.encode(text, **one)) for text in texts]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one text, as in `encode_texts`."""
    return encode_texts(tokenizer, [text])[0]


def encode_prompts(tokenizer: Any, prompts: Sequence[str], max_prompt_length: int) -> list[list[int]]:
    """Token ids of prompts: what the tokenizer begins a text with, then as many of the last ones as fit."""
    start = start_ids(tokenizer)
    ids_of = encode_texts(tokenizer, prompt_texts(tokenizer, prompts), special=has_template(tokenizer))
    return [_last(tokenizer, start, ids, max_prompt_length) for ids in ids_of]


def prompt_texts(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts in HH's text as the model reads them: as they are, or rendered by the tokenizer's chat template."""
    if not has_template(tokenizer):
        return list(prompts)
    how = {"chat_template": TODAY + tokenizer.get_chat_template(), "add_generation_prompt": True, "tokenize": False}
    return list(tokenizer.apply_chat_template([as_messages(prompt) for prompt in prompts], **how))


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template, which then decides what a prompt looks like."""
    return bool(getattr(tokenizer, "chat_template", None))


def start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: nothing for GPT-2, the beginning-of-text token for Llama and Gemma."""
    if has_template(tokenizer):
        return []  # the template writes it
    first, whole = encode_text(tokenizer, "a")[0], list(tokenizer.encode("a"))
    return whole[: whole.index(first)] if first in whole else []


def _last(tokenizer: Any, start: list[int], ids: list[int], count: int) -> list[int]:
    if ids[:1] == [getattr(tokenizer, "bos_token_id", None)] and ids.count(ids[0]) == 1:  # a chat template wrote it
        start, ids = ids[:1], ids[1:]
    return start + ids[max(0, len(ids) - max(0, count - len(start))) :]


def _joins(tokenizer: Any) -> bool:
    """Whether a response may be tokenised apart from its prompt: Llama 2's kind would put a space before it."""
    prompt, sides = "\n\nHuman: Hi\n\nAssistant:", (" I am.", "I am.")
    head, *ids = encode_texts(tokenizer, [prompt, *sides, *(prompt + side for side in sides)])
    return all(tokenizer.decode(head + ids[i]) == tokenizer.decode(ids[i + 2]) for i in (0, 1))


def encode_pair(tokenizer: Any, pair: Pair, *, max_length: int, max_prompt_length: int) -> EncodedPair:
    """Tokenise one pair, as `encode_pairs` does."""
    return next(encode_pairs(tokenizer, [pair], max_length=max_length, max_prompt_length=max_prompt_length))


def encode_pairs(
    tokenizer: Any, pairs: Iterable[Pair], *, max_length: int, max_prompt_length: int, chunk: int = 256
) -> Iterator[EncodedPair]:
    """Tokenise pairs as they come, and truncate each whose prompt + longer response exceeds `max_length` tokens.

    A prompt begins as the tokenizer says. Where a response by itself would gain a space, it is tokenised behind its
    prompt; DataError if a token then spans the border. Truncation keeps the start and the last of `max_prompt_length`
    prompt tokens, then cuts each response to what is left. chunk: pairs that meet the tokenizer together.
    With a chat template responses lose the blanks around them, and its special tokens must not be in the texts.
    """
    start, apart, is_chat, stream = start_ids(tokenizer), _joins(tokenizer), has_template(tokenizer), iter(pairs)
    while part := list(islice(stream, chunk)):
        texts = prompt_texts(tokenizer, [pair.prompt for pair in part])
        prompts = encode_texts(tokenizer, texts, special=is_chat)
        sides = [(text, side) for text, pair in zip(texts, part, strict=True) for side in (pair.chosen, pair.rejected)]
        whole = [("" if apart else text) + (side.strip() if is_chat else side) for text, side in sides]
        ids = iter(encode_texts(tokenizer, whole, special=is_chat and not apart))
        for pair, prompt, *both in zip(part, prompts, ids, ids, strict=False):
            shared = 0 if apart else len(prompt)
            if any(side[:shared] != prompt[:shared] for side in both):
                raise DataError(f"row {pair.index}: a token spans the border of prompt and response: leave the row out")
            both = [[*side[shared:], tokenizer.eos_token_id] for side in both]
            length, kept, room = len(start) + len(prompt), start + prompt, max_length
            if length + max(map(len, both)) > max_length:
                kept = _last(tokenizer, start, prompt, max_prompt_length)
                room = max_length - len(kept)
            cuts = (max(0, len(side) - room) for side in both)
            yield EncodedPair(kept, both[0][:room], both[1][:room], pair.index, length - len(kept), *cuts)


def padded(rows: Sequence[Sequence[int]], pad_id: int = 0, side: str = "right") -> tuple[Tensor, Tensor]:
    """(ids, attention mask) of N rows of token ids, padded on a side to the longest, [N, T] int64 each."""
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side), mask


def collate(pairs: Sequence[EncodedPair], pad_id: int) -> PairBatch:
    """Pad pairs into one PairBatch, to the longest sequence among them. Raises DataError on no pairs."""
    if not pairs:
        raise DataError("a batch needs at least one pair")
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    ids, attention = padded([prompt + response for prompt, response in rows], pad_id)
    in_response = attention.bool() & (torch.arange(ids.shape[1]) >= torch.tensor([[len(prompt)] for prompt, _ in rows]))
    return PairBatch(ids, attention, in_response, tuple(p.index for p in pairs))


def by_length(pairs: Sequence[EncodedPair]) -> list[int]:
    """Positions of the pairs, shortest first (prompt + longer response): neighbours pad little in one batch."""
    longer = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    return sorted(range(len(pairs)), key=longer.__getitem__)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n pairs in an epoch: a permutation that depends on (seed, epoch) and nothing else."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def batch_order(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch, positions of the pairs) of every update; the last batch of an epoch may be smaller."""
    for epoch in range(epochs):
        order = epoch_order(n, seed, epoch)
        for start in range(0, n, batch_size):
            yield epoch, order[start : start + batch_size]
