"""Sample responses, so that a response depends on its prompt, its seed and the model, not on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import DynamicCache

from .device import Compute
from .tokens import encode_prompts


@dataclass(frozen=True)
class Response:
    """A sampled response: its token ids (end-of-text included where it ended), text, and whether it ended."""

    prompt: str
    ids: list[int]
    text: str
    ended: bool


def draw(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """One token per row by inverse transform: the first at which the cumulative probability passes u.

    logits: [N, V]; uniforms: [N] float64 in [0, 1), fixed beforehand, so that a row's sample does not depend on the
    rows beside it, and two models that see the same u differ only where their distributions do. Returns [N] int64.
    Temperature 0 takes the likeliest token.
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
def sample(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, compute: Compute, seed: int = 0,
    temperature: float = 1.0, max_prompt_length: int = 128, batch_size: int = 80, name: str = "sampling",
) -> list[Response]:  # fmt: skip
    """One response to each prompt, at `temperature` (1: the model's own distribution; 0: the likeliest token).

    Longer prompts than `max_prompt_length` tokens keep their last ones. Prompts of like length share a batch. A model's
    own defaults of generation (bans, penalties, forced tokens, …) are not asked for.
    """
    eos = tokenizer.eos_token_id
    encoded = encode_prompts(tokenizer, prompts, max_prompt_length)
    by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    responses: dict[int, Response] = {}
    for start in tqdm(range(0, len(prompts), batch_size), desc=name, unit="batch"):
        at = by_length[start : start + batch_size]
        uniforms = torch.stack([row_uniforms(i, max_new_tokens, seed) for i in at]).to(model.device)
        with compute.autocast():
            drawn = continued(model, [encoded[i] for i in at], uniforms, eos, temperature)
        for i, row in zip(at, drawn.tolist(), strict=True):
            ended = eos in row
            row = row[: row.index(eos) + 1] if ended else row
            responses[i] = Response(prompts[i], row, tokenizer.decode(row[:-1] if ended else row), ended)
    return [responses[i] for i in range(len(prompts))]


def continued(
    model: Any, prompts: Sequence[list[int]], uniforms: Tensor, eos: int, temperature: float, seen: Any = None
) -> Tensor:
    """What the model draws after each of N prompts, [N, steps]; eos fills up what ended. uniforms: [N, steps].

    The keys and values of what was read are kept. A prompt that comes several times is run once, and a row that ended
    leaves the batch. seen: a list that gets the logits of each step, of the rows that were left, [n, V].
    """
    different = list(dict.fromkeys(map(tuple, prompts)))  # U prompts of at most T tokens, padded on the left
    length = max(map(len, different))
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in different], device=uniforms.device)  # [U, T]
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in different], device=uniforms.device)
    kept = torch.tensor([different.index(tuple(p)) for p in prompts], device=uniforms.device)  # rows that go on, [n]
    row = torch.arange(len(prompts), device=uniforms.device)  # which of the N they are, [n]
    drawn = torch.full(uniforms.shape, eos, device=uniforms.device)
    run = {"past_key_values": DynamicCache(config=model.config), "use_cache": True, "logits_to_keep": 1}
    for step in range(uniforms.shape[1]):
        positions = (mask.cumsum(dim=-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **run).logits[kept, -1]  # [n, V]
        if seen is not None:
            seen.append(logits)
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
