"""Sample responses, so that a response depends on its prompt, its seed and the model, not on its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import DynamicCache

from .tokens import encode_prompts, padded


@dataclass(frozen=True)
class Response:
    """A sampled response: its token ids (end-of-text included where it ended), text, and whether it ended."""

    prompt: str
    ids: list[int]
    text: str
    ended: bool


def draw(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """One token per row, [N] int64, by inverse transform: the first at which the cumulative probability passes u.

    logits: [N, V]; uniforms: [N] float64 in [0, 1), fixed beforehand, so that a row's sample does not depend on those
    beside it, and two models with the same u differ only where their distributions do. Temperature 0: the likeliest.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = (logits.float() / temperature).softmax(dim=-1)
    at = torch.device("cpu") if p.device.type == "mps" else p.device  # mps has no float64
    cumulative = p.to(at).cumsum(dim=-1, dtype=torch.float64)  # [N, V]
    u = uniforms.to(at)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, u, right=True).clamp_max(p.shape[-1] - 1).squeeze(-1).to(p.device)


def row_uniforms(index: int, steps: int, seed: int) -> Tensor:
    """The random numbers of the index-th prompt, [steps] float64 in [0, 1): a function of (seed, index)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) * 2 + 1)
    return torch.rand(steps, generator=generator, dtype=torch.float64)


@torch.no_grad()
def sample_batches(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, seed: int = 0, temperature: float = 1.0,
    max_prompt_length: int = 128, batch_size: int = 80, name: str = "sampling", seen: list[Tensor] | None = None,
) -> Iterator[dict[int, Response]]:  # fmt: skip
    """One response to each prompt, at `temperature` (1: the model's own distribution; 0: the likeliest token).

    Yields the responses to a batch of prompts of like length, by the prompts' positions. Longer prompts than
    `max_prompt_length` tokens keep their last ones. Defaults of generation that come with a model (bans, penalties, …)
    are not asked for. seen: as in `continued`.
    """
    eos, encoded = tokenizer.eos_token_id, encode_prompts(tokenizer, prompts, max_prompt_length)
    by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    for start in tqdm(range(0, len(prompts), batch_size), desc=name, unit="batch"):
        at, responses = by_length[start : start + batch_size], dict[int, Response]()
        uniforms = torch.stack([row_uniforms(i, max_new_tokens, seed) for i in at]).to(model.device)
        drawn = continued(model, [encoded[i] for i in at], uniforms, eos, temperature, seen)
        for i, row in zip(at, drawn.tolist(), strict=True):
            ended, row = eos in row, row[: [*row, eos].index(eos) + 1]
            responses[i] = Response(prompts[i], row, tokenizer.decode(row[:-1] if ended else row), ended)
        yield responses


def sample(model: Any, tokenizer: Any, prompts: Sequence[str], **how: Any) -> list[Response]:
    """One response to each prompt, in the prompts' order; how: as in `sample_batches`."""
    found = {i: r for batch in sample_batches(model, tokenizer, prompts, **how) for i, r in batch.items()}
    return [found[i] for i in range(len(prompts))]


def continued(
    model: Any, prompts: Sequence[list[int]], uniforms: Tensor, eos: int, temperature: float, seen: Any = None
) -> Tensor:
    """What the model draws after each of N prompts, [N, steps]; eos fills up what ended. uniforms: [N, steps].

    The keys and values of what was read are kept. A prompt that comes several times is run once, and a row that ended
    leaves the batch. seen: a list that gets the logits of each step, [N, V]; 0 for rows that had ended.
    """
    different = list(dict.fromkeys(map(tuple, prompts)))
    ids, mask = (each.to(uniforms.device) for each in padded(different, side="left"))  # U prompts: [U, T]
    kept = torch.tensor([different.index(tuple(p)) for p in prompts], device=uniforms.device)  # rows that go on, [n]
    row = torch.arange(len(prompts), device=uniforms.device)  # which of the N they are, [n]
    drawn = torch.full(uniforms.shape, eos, device=uniforms.device)
    run = {"past_key_values": DynamicCache(config=model.config), "use_cache": True, "logits_to_keep": 1}
    for step in range(uniforms.shape[1]):
        positions = (mask.cumsum(dim=-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **run).logits[kept, -1]  # [n, V]
        if seen is not None:
            seen.append(logits.new_zeros(len(drawn), logits.shape[-1]).index_copy_(0, row, logits))
        drawn[row, step] = token = draw(logits, uniforms[row, step], temperature)  # [n]
        goes_on = token != eos
        kept, row, token = kept[goes_on], row[goes_on], token[goes_on]
        if not len(row):
            break
        if step == 0 or len(row) < len(mask):
            run["past_key_values"].reorder_cache(kept)
            mask = mask[kept]
        ids, mask, kept = token[:, None], pad(mask, (0, 1), value=1), torch.arange(len(row), device=row.device)
    return drawn
