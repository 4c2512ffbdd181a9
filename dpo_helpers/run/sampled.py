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
from ..generation import Response, sample_batches
from ..settings import EMBEDDED, Settings
from ..show.texts import text_measures
from ..tokens import encode_prompts, padded
from ..uncertainty import mean_and_error
from ..worlds import embedded
from .pairs import PairData

KEPT = 0.5e9  # bytes of logits that sampling may leave for the KL


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
    try:
        responses, kls = _with_kls(settings, tokenizer, policy, reference, prompts, name)
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


def _with_kls(
    settings: Settings, tokenizer: Any, policy: Any, reference: Any, prompts: Sequence[str], name: str
) -> tuple[list[Response], dict[str, Tensor]]:
    """The responses, and the estimates of their KL, [n] each: as many in a batch as the policy's logits leave room."""
    response_bytes = 4 * settings.max_new_tokens * len(policy.get_output_embeddings().weight)
    found, kls, seen = dict[int, Response](), dict[str, Tensor](), list[Tensor]()
    for batch in sample_batches(
        policy, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, seed=settings.seed, seen=seen, name=name,
        max_prompt_length=settings.max_prompt_length, batch_size=min(80, max(1, int(KEPT / response_bytes))),
    ):  # fmt: skip
        found |= batch
        after = encode_prompts(tokenizer, [response.prompt for response in batch.values()], settings.max_prompt_length)
        estimates = response_kls(reference, after, [response.ids for response in batch.values()], seen)
        for key, values in estimates.items():
            kls.setdefault(key, torch.empty(len(prompts)))[list(batch)] = values
        seen.clear()
    return [found[i] for i in range(len(prompts))], kls


@torch.no_grad()
def response_kls(
    reference: Any, prompts: Sequence[list[int]], responses: Sequence[list[int]], seen: Sequence[Tensor],
    batch_size: int = 16,
) -> dict[str, Tensor]:  # fmt: skip
    """The estimates of `evaluation.sequence_kl` for N responses to prompts, all token ids: [N] each, on the CPU.

    seen: the logits from which the policy drew each of their tokens, [N, V] per step (`generation.continued`), so that
    only the reference has to run. A response cut at max_new_tokens counts up to the cut: the KL of responses of at most
    that length.
    """
    order = sorted(range(len(responses)), key=lambda i: len(responses[i]))
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(order), batch_size):
        at = order[start : start + batch_size]
        steps, device = len(responses[at[-1]]), reference.device
        parts = padded([prompts[i] for i in at], side="left"), padded([responses[i] for i in at])
        ids, mask = (torch.cat(part, dim=1).to(device) for part in zip(*parts, strict=True))  # [n, T + steps]
        run = {"position_ids": (mask.cumsum(dim=-1) - 1).clamp_min(0), "logits_to_keep": steps + 1, "use_cache": False}
        of_reference = reference(input_ids=ids, attention_mask=mask, **run).logits  # [n, steps + 1, V]
        of_policy = torch.stack([logits[at] for logits in seen[:steps]], dim=1)  # [n, steps, V]
        last = ids[:, -steps - 1 :], mask[:, -steps - 1 :].bool()  # the responses, and one token before them
        for key, values in sequence_kl(of_policy, of_reference, *last).items():
            found.setdefault(key, []).append(values.float().cpu())
    return {key: torch.cat(parts)[torch.tensor(order).argsort()] for key, parts in found.items()}
