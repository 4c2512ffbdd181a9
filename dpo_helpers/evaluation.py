"""Measure a model: rewards and accuracy on held-out pairs, KL to the reference on its own samples.

Every mean comes with its standard error, so a difference can be told from noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from tqdm import tqdm

from .device import Compute
from .engine import FastPath
from .errors import DataError, TrainingError
from .generation import Response, distinct_n, ends_in_a_loop, repeated_share, sample
from .gradients import halved
from .kl import sequence_kl
from .logprobs import pair_logprobs, token_logprobs
from .losses import pair_losses
from .tokens import EncodedPair, by_length, collate, encode_text
from .uncertainty import mean_and_error


@dataclass(frozen=True)
class PairScores:
    """log p(response | prompt) of n pairs under one model, with the responses' lengths; all [n], on the CPU.

    chosen, rejected: float32, nats; chosen_tokens, rejected_tokens: int64, end-of-text included.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def __getitem__(self, at: Any) -> PairScores:
        """The scores of some of the pairs: a slice, indices or a mask."""
        return PairScores(self.chosen[at], self.rejected[at], self.chosen_tokens[at], self.rejected_tokens[at])


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model: `metrics` by name (`_se`: standard error), and the sampled responses."""

    name: str
    beta: float
    metrics: dict[str, float]
    responses: list[Response]


@torch.no_grad()
def score_pairs(
    model: Any,
    pairs: Sequence[EncodedPair],
    compute: Compute,
    *,
    pad_id: int,
    batch_size: int = 16,
    name: str = "",
    fast: FastPath | None = None,
) -> PairScores:
    """Log-probabilities of all pairs, in their order. Pairs of like length share a batch, to pad little.

    fast: a fast path whose first pairs these are; without one the plain version is run. Raises TrainingError, naming
    rows, where a log-probability is not finite, or where one pair is too much for the memory; before that, running out
    of memory only makes the batches smaller.
    """
    order = by_length(pairs)
    chosen, rejected = torch.empty(len(pairs)), torch.empty(len(pairs))
    bar = tqdm(total=len(pairs), desc=name or "scoring", unit="pair", disable=None if name else True)
    done = 0
    while done < len(pairs):
        at = order[done : done + batch_size]
        try:
            with compute.autocast():
                if fast:
                    of_chosen, of_rejected = fast.pair_logprobs(model, at)
                else:
                    batch = collate([pairs[i] for i in at], pad_id).to(compute.device)
                    of_chosen, of_rejected = pair_logprobs(model, batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            batch_size = halved(len(at), f"scoring row {pairs[at[0]].index}")
            continue
        chosen[at], rejected[at] = of_chosen.float().cpu(), of_rejected.float().cpu()
        done += len(at)
        bar.update(len(at))
    bar.close()
    wrong = ~(chosen.isfinite() & rejected.isfinite())
    if wrong.any():
        rows = ", ".join(str(pairs[i].index) for i in wrong.nonzero().flatten().tolist()[:10])
        raise TrainingError(
            f"{name or 'scoring'}: {int(wrong.sum())} of {len(pairs)} pairs have log-probabilities that are not finite "
            f"(rows {rows}): the model's weights are not finite, or use --precision fp32"
        )
    lengths = (torch.tensor([len(getattr(pair, side)) for pair in pairs]) for side in ("chosen", "rejected"))
    return PairScores(chosen, rejected, *lengths)


@torch.no_grad()
def token_logratios(policy: Any, reference: Any, pair: EncodedPair, compute: Compute) -> tuple[Tensor, Tensor]:
    """log π_θ - log π_ref of each token of a pair's responses: [C] of the chosen, [R] of the rejected, on the CPU.

    Their sums are the pair's log-ratios, which are the rewards over β. End-of-text is a token like any other. Raises
    DataError where the prompt is empty, so that nothing predicts the first token.
    """
    if not pair.prompt:
        raise DataError(f"row {pair.index}: the prompt is empty, so nothing predicts the first response token")
    batch = collate([pair], pad_id=0).to(compute.device)  # any id pads: masks go by position
    run = {"input_ids": batch.ids, "attention_mask": batch.attention_mask, "use_cache": False}
    with compute.autocast():
        of_policy, of_reference = (token_logprobs(model(**run).logits, batch.ids) for model in (policy, reference))
    ratios, scored = of_policy - of_reference, batch.response_mask[:, 1:]  # [2, T-1] each
    chosen, rejected = (ratios[side][scored[side]].cpu() for side in (0, 1))
    return chosen, rejected


def pair_values(
    policy: PairScores, reference: PairScores, beta: float, loss_type: str = "sigmoid", label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """Of each pair, [n]: loss, chosen and rejected reward, reward margin, whether it is right, chosen log-ratio."""
    losses, chosen, rejected = pair_losses(
        policy.chosen, policy.rejected, reference.chosen, reference.rejected, policy.chosen_tokens,
        policy.rejected_tokens, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing,
    )  # fmt: skip
    return {
        "loss": losses,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "reward_margin": chosen - rejected,
        "reward_accuracy": (chosen > rejected).float(),
        "chosen_logratio": chosen / beta,
    }


def preference_metrics(
    policy: PairScores, reference: PairScores, beta: float, loss_type: str = "sigmoid", label_smoothing: float = 0.0
) -> dict[str, float]:
    """Means of `pair_values` over the pairs, each with its standard error (`_se`), and the share of ties.

    reward_accuracy is the share of pairs with margin > 0 and ties the share with margin exactly 0.
    chosen_logratio is the mean log-ratio on the data's chosen responses, which is not a KL divergence: it is
    no expectation over the policy and can be negative.
    """
    values = pair_values(policy, reference, beta, loss_type, label_smoothing)
    metrics = {"ties": (values["reward_margin"] == 0).float().mean().item()}
    for key, value in values.items():
        metrics[key], metrics[f"{key}_se"] = mean_and_error(value)
    return metrics


def longer_wins(pairs: PairScores) -> tuple[float, float]:
    """(Accuracy, share of ties) of a judge who always prefers the longer response, in tokens.

    The baseline of every reward accuracy: a model that only learned to like length gets this much.
    """
    longer = pairs.chosen_tokens - pairs.rejected_tokens
    return (longer > 0).float().mean().item(), (longer == 0).float().mean().item()


def measure_kl(
    policy: Any, reference: Any, tokenizer: Any, responses: Sequence[Response], compute: Compute, **lengths: int
) -> dict[str, float]:
    """KL(policy ‖ reference) in nats a response, on responses sampled from the policy at temperature 1.

    Returns the means of `response_kls`, kl, k1 and k3, each with its standard error over prompts (`_se`); lengths as
    there.
    """
    result: dict[str, float] = {}
    for key, values in response_kls(policy, reference, tokenizer, responses, compute, **lengths).items():
        result[key], result[f"{key}_se"] = mean_and_error(values)
    return result


@torch.no_grad()
def response_kls(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    responses: Sequence[Response],
    compute: Compute,
    *,
    max_prompt_length: int,
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """Of each sampled response, [N] in their order: kl (the exact next-token KL, summed over its tokens), k1 and k3.

    See `kl.sequence_kl`. A response cut at max_new_tokens counts up to the cut: the KL of responses of at most that
    length.
    """
    rows = [
        EncodedPair(encode_text(tokenizer, r.prompt)[-max_prompt_length:], r.ids, r.ids, index=i)
        for i, r in enumerate(responses)
    ]
    order = by_length(rows)
    estimates: dict[str, list[Tensor]] = {"kl": [], "k1": [], "k3": []}
    for start in range(0, len(rows), batch_size):
        at = order[start : start + batch_size]
        pair_batch = collate([rows[i] for i in at], tokenizer.eos_token_id).to(compute.device)
        size = len(at)  # chosen and rejected hold the same response here: the first half is enough
        ids, mask, response = (t[:size] for t in (pair_batch.ids, pair_batch.attention_mask, pair_batch.response_mask))
        with compute.autocast():
            first = int(response.any(dim=0).nonzero()[0]) - 1  # predicts the earliest response token
            run = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": ids.shape[1] - first, "use_cache": False}
            logits = policy(**run).logits, reference(**run).logits  # [n, kept, V] each
        for key, value in sequence_kl(*logits, ids[:, first:], response[:, first:]).items():
            estimates[key].append(value.cpu())
    back = torch.tensor(order).argsort()
    return {key: torch.cat(values)[back] for key, values in estimates.items()}


def text_measures(responses: Sequence[Response]) -> dict[str, float]:
    """Of sampled responses: length in tokens, the share that ended by itself, repeated 3-grams and the share
    that end in a loop (each with _se), and distinct-1 and distinct-2 over all of them.
    """
    texts = [response.text for response in responses]
    measures = {"distinct_1": distinct_n(texts, 1), "distinct_2": distinct_n(texts, 2)}
    for key, values in {
        "length": [float(len(r.ids)) for r in responses],
        "ended": [float(r.ended) for r in responses],
        "repeated_3grams": [repeated_share(text) for text in texts],
        "looping": [float(ends_in_a_loop(text)) for text in texts],
    }.items():
        measures[key], measures[f"{key}_se"] = mean_and_error(values)
    return measures


def measure_samples(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    compute: Compute,
    *,
    max_new_tokens: int,
    max_prompt_length: int,
    seed: int,
    true_reward: Callable[[str, str], float] | None = None,
    name: str = "sampling",
) -> tuple[list[Response], dict[str, float]]:
    """Sample one response to each prompt from the policy and measure them: KL to the reference, text, true reward.

    true_reward: (prompt, response text) -> reward, where it is known. Returns the responses and the metrics of
    `measure_kl` and `text_measures`, with true_reward, true_reward_se and true_reward_sd if it is known. Raises
    TrainingError when out of memory.
    """
    lengths = {"max_prompt_length": max_prompt_length}
    try:
        responses = sample(
            policy, tokenizer, prompts, max_new_tokens=max_new_tokens, compute=compute, seed=seed, name=name, **lengths
        )
        metrics = measure_kl(policy, reference, tokenizer, responses, compute, **lengths) | text_measures(responses)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise TrainingError(
            f"out of memory while {name}: lower --max-new-tokens, --max-prompt-length or --trunk-gb, and run it again"
        ) from error
    if true_reward is not None:
        rewards = torch.tensor([true_reward(r.prompt, r.text) for r in responses], dtype=torch.float64)
        mean, its_error = mean_and_error(rewards)
        metrics |= {"true_reward": mean, "true_reward_se": its_error, "true_reward_sd": rewards.std().item()}
    return responses, metrics
