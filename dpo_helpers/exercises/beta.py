"""Exercises of notebook 6: what a loss says of a margin, what a KL is a mean of, and the best run for its distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .core import Exercise, Mistake


def _margin(loss: float, beta: float) -> float:
    return -math.log(math.exp(loss) - 1) / beta


def _losses() -> list[tuple[float, float]]:
    return [(2.74, 0.5), (0.2, 0.1), (1.0, 5.0)]


def _kl(samples_policy: Tensor, samples_ref: Tensor, chosen_policy: Tensor, chosen_ref: Tensor, beta: float) -> Tensor:
    return (samples_policy - samples_ref).mean()


def _models() -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """Log-probabilities of four sampled and of three chosen responses, under policy and reference."""
    sampled = torch.tensor([-9.0, -12.0, -7.0, -10.0]), torch.tensor([-11.0, -11.5, -9.0, -14.0])
    chosen = torch.tensor([-12.0, -15.0, -9.0]), torch.tensor([-11.0, -13.0, -9.5])
    return [(*sampled, *chosen, 0.5), (sampled[0][1:], sampled[1][1:], *chosen, 5.0)]


Row = Mapping[str, Any]


def _best_within(rows: Sequence[Row], budget: float) -> str | None:
    return _best([row for row in rows if row["kl"] <= budget], lambda row: row["true_reward"])


def _best(rows: Sequence[Row], key: Callable[[Row], float]) -> str | None:
    return max(rows, key=key)["name"] if rows else None


def _within(rows: Sequence[Row], budget: float) -> list[Row]:
    return [row for row in rows if row["kl"] <= budget]


def _runs() -> list[tuple[list[dict[str, Any]], float]]:
    columns = ("name", "kl", "true_reward", "reward_margin")
    near = ("A", 0.2, 0.3, 0.4), ("B", 0.8, 1.5, 1.0)
    far = ("C", 1.5, 1.8, 1.4), ("D", 2.0, 1.7, 2.2), ("E", 9.0, 2.0, 1.9)
    rows = [dict(zip(columns, row, strict=True)) for row in (*near, *far)]
    return [(rows, 2.5), (rows, 1.5), (rows[2:], 1.0)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        "6.1", "The margin that a loss stands for", 1, 5, _margin,
        (
            Mistake("That is the reward margin",
                    "log(1 + exp(-m)) holds the reward margin m = β·h; divide by β for the log-ratio margin h",
                    lambda loss, beta: beta * _margin(loss, beta)),
            Mistake("You multiplied by β",
                    "m = β·h, so h = m/β: a small β needs a large log-ratio margin for the same loss",
                    lambda loss, beta: beta**2 * _margin(loss, beta)),
            Mistake("The sign is the other way round",
                    "a loss above ln 2 means that the rejected response is preferred, so its margin is negative",
                    lambda loss, beta: -_margin(loss, beta)),
            Mistake("Only the logarithm is undone",
                    "-loss is log σ(β·h), so it is no margin yet; σ has to be undone too",
                    lambda loss, beta: -loss / beta),
            Mistake("That is the probability",
                    "exp(-loss) = σ(β·h) is how likely the policy finds the label; ask which h gives it",
                    lambda loss, beta: math.exp(-loss)),
        ),
        cases=_losses,
    ),
    Exercise(
        "6.2", "Is it a KL?", 2, 5, _kl,
        (
            Mistake("A mean over the data's chosen responses",
                    "that is the chosen log-ratio; KL(π_θ‖π_ref) is a mean over what the policy itself writes",
                    lambda sp, sr, cp, cr, beta: (cp - cr).mean()),
            Mistake("The two models are swapped",
                    "over the policy's samples the mean of log π_ref - log π_θ is minus the KL: at most 0 on average",
                    lambda sp, sr, cp, cr, beta: (sr - sp).mean()),
            Mistake("It is multiplied by β",
                    "β times the log-ratio is the implicit reward; the distance itself has no β in it",
                    lambda sp, sr, cp, cr, beta: beta * (sp - sr).mean()),
            Mistake("You summed over the responses",
                    "it is a mean a response: a sum grows with the number of samples",
                    lambda sp, sr, cp, cr, beta: (sp - sr).sum()),
            Mistake("You took absolute values",
                    "single log-ratios may be negative and must cancel; only their mean estimates the KL",
                    lambda sp, sr, cp, cr, beta: (sp - sr).abs().mean()),
            Mistake("You dropped the negative log-ratios",
                    "the KL is never negative, but single log-ratios are; without them the estimate is too high",
                    lambda sp, sr, cp, cr, beta: (sp - sr).clamp_min(0).mean()),
        ),
        cases=_models,
    ),
    Exercise(
        "6.3", "The best run within a KL budget", 1, 5, _best_within,
        (
            Mistake("The highest reward, whatever its KL",
                    "that run may be too far from the reference; drop the runs above the budget first",
                    lambda rows, budget: _best(rows, lambda row: row["true_reward"])),
            Mistake("The nearest run",
                    "the budget may be spent: among the runs within it the reward decides, not the KL",
                    lambda rows, budget: _best(_within(rows, budget), lambda row: -row["kl"])),
            Mistake("You went by the implicit margin",
                    "reward_margin is the model's opinion of itself; true_reward says how good its answers are",
                    lambda rows, budget: _best(_within(rows, budget), lambda row: row["reward_margin"])),
            Mistake("The most reward a nat",
                    "that prefers a run that hardly moved; within the budget a nat costs nothing",
                    lambda rows, budget: _best(_within(rows, budget), lambda row: row["true_reward"] / row["kl"])),
            Mistake("A run at the budget is left out",
                    "at most the budget includes the budget itself: use <=, not <",
                    lambda rows, budget: _best([r for r in rows if r["kl"] < budget], lambda row: row["true_reward"])),
        ),
        cases=_runs,
    ),
)  # fmt: skip
