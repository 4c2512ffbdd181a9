"""Responses that a model samples, and what is measured on them: the KL to the reference, text, and the true reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from ..errors import TrainingError
from ..evaluation import sequence_kl
from ..generation import Response, sample
from ..settings import EMBEDDED, Settings
from ..show.texts import text_measures
from ..tokens import EncodedPair, by_length, collate, encode_prompts
from ..uncertainty import mean_and_error
from ..worlds import embedded
from .machine import compute_of
from .pairs import PairData


@dataclass(frozen=True)
class Sampled:
    """Responses to some prompts; kls: the estimates of `evaluation.sequence_kl`, [n] each; metrics: means, with _se."""

    responses: list[Response]
    kls: dict[str, Tensor]
    metrics: dict[str, float]


def prompts_to_sample(settings: Settings, pairs: PairData) -> list[str]:
    """Prompts on which responses are sampled: of the embedded world's held-out topics, or of held-out pairs."""
    if settings.dataset == EMBEDDED:
        return embedded.sampling_prompts(settings.prompts)
    unique = dict.fromkeys(pair.prompt for pair in pairs.held_out)
    return list(unique)[: settings.prompts]


def true_rewards(settings: Settings, responses: Sequence[Response]) -> Tensor | None:
    """The true reward of each response, [n] float64; None where it is not known: only the embedded world has one."""
    if settings.dataset != EMBEDDED:
        return None
    return torch.tensor([embedded.true_reward(r.prompt, r.text) for r in responses], dtype=torch.float64)


def true_score(tokenizer: Any) -> Callable[[Sequence[list[int]], Sequence[list[int]]], Tensor]:
    """The embedded world's true reward of responses to prompts, as a `rlhf.Score`: of token ids, [N] float32."""

    def score(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
        texts = ([tokenizer.decode(ids, skip_special_tokens=True) for ids in each] for each in (prompts, responses))
        return torch.tensor([embedded.true_reward(*text) for text in zip(*texts, strict=True)])

    return score


def sample_and_measure(
    settings: Settings, tokenizer: Any, policy: Any, reference: Any, prompts: Sequence[str], name: str = "sampling"
) -> Sampled:
    """Sample one response to each prompt from the policy, as the settings say, and measure them.

    metrics: kl, k1 and k3 in nats per response, `show.texts.text_measures`, and true_reward (with _sd, the standard
    deviation) where it is known. Raises TrainingError when out of memory.
    """
    compute, length = compute_of(settings), settings.max_prompt_length
    try:
        responses = sample(
            policy, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, compute=compute, seed=settings.seed,
            max_prompt_length=length, name=name,
        )  # fmt: skip
        kls = response_kls(policy, reference, tokenizer, responses, max_prompt_length=length)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise TrainingError(
            f"out of memory while {name}: lower --max-new-tokens, --max-prompt-length or --trunk-gb, and run it again"
        ) from error
    metrics: dict[str, float] = {}
    for key, values in kls.items():
        metrics[key], metrics[f"{key}_se"] = mean_and_error(values)
    metrics |= text_measures(responses)
    rewards = true_rewards(settings, responses)
    if rewards is not None:
        metrics["true_reward"], metrics["true_reward_se"] = mean_and_error(rewards)
        metrics["true_reward_sd"] = rewards.std().item()
    return Sampled(responses, kls, metrics)


@torch.no_grad()
def response_kls(
    policy: Any, reference: Any, tokenizer: Any, responses: Sequence[Response], *, max_prompt_length: int,
    batch_size: int = 16,
) -> dict[str, Tensor]:  # fmt: skip
    """The estimates of `evaluation.sequence_kl` for each sampled response, [N] each, in their order.

    A response cut at max_new_tokens counts up to the cut: the KL of responses of at most that length. In float32
    whatever the run's precision: a KL is never negative, so rounding adds up in it instead of averaging out.
    """
    prompts = encode_prompts(tokenizer, [response.prompt for response in responses], max_prompt_length)
    rows = [EncodedPair(prompt, r.ids, r.ids) for prompt, r in zip(prompts, responses, strict=True)]
    order = by_length(rows)
    estimates = {key: torch.empty(len(rows)) for key in ("kl", "k1", "k3")}
    for start in range(0, len(rows), batch_size):
        at = order[start : start + batch_size]
        batch = collate([rows[i] for i in at], tokenizer.eos_token_id).to(policy.device)
        # chosen and rejected hold the same response here: the first half is enough
        ids, mask, response = (t[: len(at)] for t in (batch.ids, batch.attention_mask, batch.response_mask))
        first = int(response.any(dim=0).nonzero()[0]) - 1  # predicts the earliest response token
        run = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": ids.shape[1] - first, "use_cache": False}
        logits = policy(**run).logits, reference(**run).logits  # [n, kept, V] each
        for key, value in sequence_kl(*logits, ids[:, first:], response[:, first:]).items():
            estimates[key][at] = value.float().cpu()
    return estimates
