"""What the course measures of its models: rewards and KL of each, differences between them, points along trainings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import DataError
from ..evaluation import Evaluation, pair_values, preference_metrics
from ..generation import Response
from ..logprobs import PairScores, token_logprobs
from ..settings import EMBEDDED, Settings
from ..tokens import EncodedPair, collate
from ..training import MetricsRow
from ..uncertainty import Interval, mean_and_error, paired_difference
from ..worlds import embedded
from .artefacts import ModelArtefact, open_artefact, read_jsonl, write_jsonl
from .machine import compute_of
from .sampled import prompts_to_sample, sample_and_measure, true_rewards
from .stages import beta_name, get_base, get_data, get_dpo, get_hot_dpo, get_reference, get_sft, get_sweep
from .trained import CURVE_PAIRS

KLS = "kls.safetensors"


def longer_wins(pairs: PairScores) -> tuple[float, float]:
    """(Accuracy, share of ties) of a judge who always prefers the longer response, in tokens.

    The baseline of every reward accuracy: a model that only learned to like length gets this much.
    """
    longer = pairs.chosen_tokens - pairs.rejected_tokens
    return (longer > 0).float().mean().item(), (longer == 0).float().mean().item()


def accuracy_baselines(settings: Settings) -> dict[str, float]:
    """What an accuracy on the held-out pairs is to be compared with: "longer wins", and "best possible" if known.

    best possible: expected of a judge who knows the true reward; only the embedded world has one.
    """
    data, scores = get_data(settings), get_reference(settings).scores("held_out")
    accuracy, ties = longer_wins(scores)
    baselines = {"longer wins": accuracy + ties / 2}  # a tie is decided by a coin
    if settings.dataset == EMBEDDED:
        pairs = data.pairs.held_out
        gaps = [embedded.true_reward(p.prompt, p.chosen) - embedded.true_reward(p.prompt, p.rejected) for p in pairs]
        baselines["best possible"] = embedded.best_possible_accuracy(gaps)
    return baselines


def _beta_of(settings: Settings, model: ModelArtefact) -> float:
    return float(model.manifest["made_from"].get("beta", settings.beta))


def get_evaluation(settings: Settings, model: ModelArtefact) -> Evaluation:
    """Measure a model: rewards on all held-out pairs, KL to π_ref and text measures on its own samples.

    Artefact: evaluation/<name>/. metrics: those of `preference_metrics` and `sampled.sample_and_measure`. Rewards use
    the model's own β (for reference and SFT the settings' β).
    """
    data, reference = get_data(settings), get_reference(settings)
    name, beta = model.name.replace("sweep/", ""), _beta_of(settings, model)
    loss = settings.loss_type, settings.label_smoothing
    made_from = {
        "model": model.weights_sha256,
        "reference": reference.weights_sha256,
        "data": data.sha256,
        "tokenizer": data.tokenizer_sha256,
        "beta": beta,
        "loss": loss,
        **{k: getattr(settings, k) for k in ("prompts", "max_new_tokens", "max_length", "max_prompt_length", "seed")},
    }
    with open_artefact(settings, f"evaluation/{name}", made_from) as artefact:
        if artefact.mine:
            compute, prompts = compute_of(settings), prompts_to_sample(settings, data.pairs)
            policy, base = model.load(compute), reference.load(compute)
            metrics = preference_metrics(model.scores("held_out"), reference.scores("held_out"), beta, *loss)
            found = sample_and_measure(settings, data.tokenizer, policy, base, prompts, f"sampling from {name}")
            write_jsonl(artefact.folder / "responses.jsonl", [asdict(r) for r in found.responses])
            save_file(found.kls, artefact.folder / KLS)
            text = json.dumps(metrics | found.metrics, indent=1)
            (artefact.folder / "metrics.json").write_text(text, encoding="utf-8")
    metrics = json.loads((artefact.folder / "metrics.json").read_text(encoding="utf-8"))
    responses = [Response(**row) for row in read_jsonl(artefact.folder / "responses.jsonl")]
    return Evaluation(name, beta, metrics, responses, load_file(artefact.folder / KLS))


def get_comparison(settings: Settings) -> dict[str, Evaluation]:
    """The three models of the course, measured: reference, sft, dpo."""
    return {m.name: get_evaluation(settings, m) for m in (get_base(settings), get_sft(settings), get_dpo(settings))}


def get_sweep_evaluations(settings: Settings) -> dict[float, Evaluation]:
    """Every β of the sweep, measured."""
    return {beta: get_evaluation(settings, model) for beta, model in get_sweep(settings).items()}


def get_frontier(settings: Settings) -> dict[str, list[MetricsRow]]:
    """Points on the way of each training, in order: SFT, DPO at every β (the frontier's too), and the hot run.

    A point is a row with step (updates done), kl, true_reward where it is known, reward_margin of DPO, each with _se.
    Those along a training are of the same `curve_prompts` prompts and CURVE_PAIRS pairs, up to its end; the last one,
    of the same update, is of all, as `get_evaluation` has it. A run without a curve, or SFT where it is π_ref, has only
    that one.
    """
    betas = sorted({*settings.betas, *settings.frontier_betas})
    models = {"sft": get_sft(settings)} | {f"β = {beta_name(beta)}": get_dpo(settings, beta) for beta in betas}
    return {name: _points(settings, model) for name, model in (models | {"hot": get_hot_dpo(settings)}).items()}


def _points(settings: Settings, model: ModelArtefact) -> list[MetricsRow]:
    updates = max(row["step"] for row in model.metrics)
    end = {"step": updates, **get_evaluation(settings, model).metrics}
    on_the_way = [row for row in model.metrics if "kl" in row and row["step"] < updates]
    if not on_the_way or model.name == get_reference(settings).name:  # whose KL on the way was to the plain model
        return [end]
    values, of_the_same = get_values(settings, model), {"step": updates}
    for key, count in {
        "reward_margin": CURVE_PAIRS,
        **dict.fromkeys(("kl", "true_reward"), settings.curve_prompts),
    }.items():
        if key in on_the_way[-1]:
            of_the_same[key], of_the_same[f"{key}_se"] = mean_and_error(values[key][:count])
    return [*on_the_way, of_the_same, end]


def get_values(settings: Settings, model: ModelArtefact) -> dict[str, Tensor]:
    """The per-pair and per-response values that `get_evaluation` averages.

    Keys as in its metrics. Per held-out pair, [pairs]: loss … chosen_logratio of `evaluation.pair_values`. Per sampled
    response, [prompts]: kl, k1, k3, length, ended, and in the embedded world true_reward.
    """
    held_out, evaluation = get_reference(settings).scores("held_out"), get_evaluation(settings, model)
    loss, responses = (settings.loss_type, settings.label_smoothing), evaluation.responses
    values = pair_values(model.scores("held_out"), held_out, _beta_of(settings, model), *loss)
    values |= evaluation.kls
    values["length"] = torch.tensor([float(len(r.ids)) for r in responses])
    values["ended"] = torch.tensor([float(r.ended) for r in responses])
    rewards = true_rewards(settings, responses)
    return values if rewards is None else values | {"true_reward": rewards}


def get_differences(settings: Settings) -> dict[str, Interval]:
    """Differences between the three models with 95 % bootstrap intervals, paired: by held-out pair, or by prompt.

    Keys such as "reward_accuracy: dpo - sft"; true_reward only in the embedded world. The reference has no accuracy of
    its own: all its margins are ties.
    """
    models = {"reference": get_base(settings), "sft": get_sft(settings), "dpo": get_dpo(settings)}
    values = {name: get_values(settings, model) for name, model in models.items()}
    wanted = [("reward_accuracy", "dpo", "sft"), ("reward_margin", "dpo", "sft")]
    if settings.dataset == EMBEDDED:
        wanted += [("true_reward", *pair) for pair in (("dpo", "reference"), ("sft", "reference"), ("dpo", "sft"))]
    return {
        f"{metric}: {first} - {second}": paired_difference(values[first][metric], values[second][metric])
        for metric, first, second in wanted
    }


def calibration(margins: Tensor, edges: Sequence[float]) -> list[dict[str, float]]:
    """How often a model agrees with the labels, by how often it expects to: a row per bin that has pairs.

    margins: score of the chosen minus that of the rejected response, [n]. Between two responses the model expects to
    agree with the label with probability σ(|margin|). edges: of the bins of that probability, from 0.5 to 1.
    """
    expected, agrees, rows = margins.abs().sigmoid(), (margins > 0).double(), []
    for low, high in pairwise(edges):
        inside = (expected >= low) & ((expected < high) | (high == edges[-1]))
        if inside.any():
            observed, error = mean_and_error(agrees[inside])
            row = {"pairs": float(inside.sum()), "predicted": expected[inside].mean().item()}
            rows.append(row | {"observed": observed, "observed_se": error})
    return rows


def best_of(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """What the best-scored of n samples has, per prompt: [P]. scores, values: of N samples of each prompt, [P, N].

    The N samples make N / n groups, whose winners are averaged; n must divide N.
    """
    groups = scores.view(len(scores), -1, n)  # [P, N/n, n]
    winners = groups.argmax(dim=-1, keepdim=True)
    return values.view(groups.shape).gather(-1, winners).squeeze(-1).mean(dim=1)


@torch.no_grad()
def token_logratios(policy: Any, reference: Any, pair: EncodedPair) -> tuple[Tensor, Tensor]:
    """log π_θ - log π_ref of each token of a pair's responses: [C] of the chosen, [R] of the rejected, on the CPU.

    Their sums are the pair's log-ratios, which are the rewards over β. End-of-text is a token like any other. Raises
    DataError where the prompt is empty, so that nothing predicts the first token.
    """
    if not pair.prompt:
        raise DataError(f"row {pair.index}: the prompt is empty, so nothing predicts the first response token")
    batch = collate([pair], pad_id=0).to(policy.device)  # any id pads: masks go by position
    run = {"input_ids": batch.ids, "attention_mask": batch.attention_mask, "use_cache": False}
    of_policy, of_reference = (token_logprobs(model(**run).logits, batch.ids) for model in (policy, reference))
    ratios, scored = of_policy - of_reference, batch.response_mask[:, 1:]  # [2, T-1] each
    chosen, rejected = (ratios[side][scored[side]].cpu() for side in (0, 1))
    return chosen, rejected
