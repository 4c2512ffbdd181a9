"""Sample responses, so that a response depends on its prompt, its seed and the model, not on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .device import Compute
from .tokens import encode_prompts


@dataclass(frozen=True)
class Response:
    """A sampled response: its token ids (end-of-text included where it ended), text, and whether it ended."""

    prompt: str
    ids: list[int]
    text: str
    ended: bool


class _InverseTransform(LogitsProcessor):  # type: ignore[misc]
    """Turns greedy decoding into sampling: keeps only the token at which the cumulative probability passes u.

    uniforms: [N, steps], one number in [0, 1) per row and step, fixed beforehand. So a row's sample does not
    depend on the rows beside it, and two models that see the same u differ only where their distributions do.
    """

    def __init__(self, uniforms: Tensor, temperature: float):
        self.uniforms, self.temperature, self.step = uniforms, temperature, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wide = scores.cpu() if scores.device.type == "mps" else scores  # mps has no float64
        cumulative = (wide.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)  # [N, V]
        u = self.uniforms[:, self.step, None].to(cumulative) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, u, right=True).clamp_max(scores.shape[-1] - 1).to(scores.device)
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)


def row_uniforms(index: int, steps: int, seed: int) -> Tensor:
    """The random numbers of the index-th prompt, [steps] float64 in [0, 1): a function of (seed, index)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) * 2 + 1)
    return torch.rand(steps, generator=generator, dtype=torch.float64)


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    compute: Compute,
    seed: int = 0,
    temperature: float = 1.0,
    max_prompt_length: int = 128,
    batch_size: int = 80,
    name: str = "sampling",
) -> list[Response]:
    """One response to each prompt, at `temperature` (1: the model's own distribution; 0: the likeliest token).

    Longer prompts than `max_prompt_length` tokens keep their last ones. Prompts of like length share a batch, padded on
    the left. `generate` adds the model's own defaults (bans, penalties, …) to any configuration: it is given none.
    """
    eos = tokenizer.eos_token_id
    plain = copy(model)  # the same weights
    plain.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=eos, pad_token_id=eos
    )
    encoded = encode_prompts(tokenizer, prompts, max_prompt_length)
    by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    responses: dict[int, Response] = {}
    for start in tqdm(range(0, len(prompts), batch_size), desc=name, unit="batch"):
        at = by_length[start : start + batch_size]
        length = max(len(encoded[i]) for i in at)
        ids = torch.tensor([[eos] * (length - len(encoded[i])) + encoded[i] for i in at])
        mask = torch.tensor([[0] * (length - len(encoded[i])) + [1] * len(encoded[i]) for i in at])
        uniforms = torch.stack([row_uniforms(i, max_new_tokens, seed) for i in at])
        processors = LogitsProcessorList([_InverseTransform(uniforms, temperature)] if temperature > 0 else [])
        with compute.autocast():
            out = plain.generate(
                ids.to(compute.device), attention_mask=mask.to(compute.device), logits_processor=processors
            )
        for i, row in zip(at, out[:, length:].tolist(), strict=True):
            ended = eos in row
            row = row[: row.index(eos) + 1] if ended else row
            responses[i] = Response(prompts[i], row, tokenizer.decode(row[:-1] if ended else row), ended)
    return [responses[i] for i in range(len(prompts))]
