"""Exercises of notebook 6: what a KL is a mean of, and the best run for its distance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .core import Exercise, Mistake

# 6.1


def _kl(samples_policy: Tensor, samples_ref: Tensor, chosen_policy: Tensor, chosen_ref: Tensor, beta: float) -> Tensor:
    return (samples_policy - samples_ref).mean()


def _of_samples(change: Callable[[Tensor, float], Any]) -> Callable[..., Any]:
    """What is made of the log-ratios of the samples, and β."""
    return lambda sp, sr, cp, cr, beta: change(sp - sr, beta)


def _models() -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """Log-probabilities of four sampled and of three chosen responses, under policy and reference."""
    sampled = torch.tensor([-9.0, -12.0, -7.0, -10.0]), torch.tensor([-11.0, -11.5, -9.0, -14.0])
    chosen = torch.tensor([-12.0, -15.0, -9.0]), torch.tensor([-11.0, -13.0, -9.5])
    few = torch.tensor([-8.0, -9.0]), torch.tensor([-7.0, -8.5])  # few samples can give a mean below 0
    return [(*sampled, *chosen, 0.5), (sampled[0][1:], sampled[1][1:], *chosen, 5.0), (*few, *chosen, 0.1)]


# 6.2

Row = Mapping[str, Any]
Score = Callable[[Row], float]


def _reward(row: Row) -> float:
    return float(row["true_reward"])


def _within(rows: Sequence[Row], budget: float) -> list[Row]:
    return [row for row in rows if row["kl"] <= budget]


def _best(rows: Sequence[Row], score: Score = _reward) -> Any:
    return max(rows, key=score)["name"] if rows else None


def _best_within(rows: Sequence[Row], budget: float) -> Any:
    return _best(_within(rows, budget))


def _by(score: Score) -> Callable[[Sequence[Row], float], Any]:
    """The best one within the budget by another score."""
    return lambda rows, budget: _best(_within(rows, budget), score)


def _whole(take: Callable[[Row], Any]) -> Callable[[Sequence[Row], float], Any]:
    """Something else of the best row than its name."""
    return lambda rows, budget: take(max(kept, key=_reward)) if (kept := _within(rows, budget)) else None


def _from_zero(rows: Sequence[Row], budget: float) -> Any:
    """A search that starts at a reward of 0, so that it finds no run whose reward is negative."""
    return _best([row for row in _within(rows, budget) if row["true_reward"] > 0])


def _then_checked(rows: Sequence[Row], budget: float) -> Any:
    best = max(rows, key=_reward)
    return best["name"] if best["kl"] <= budget else None


def _runs() -> list[tuple[list[dict[str, Any]], float]]:
    """Five runs in no order, with four budgets; two that have only negative rewards; and none within the budget."""
    columns = ("name", "kl", "true_reward", "reward_margin")
    good = ("D", 2.0, 1.7, 2.2), ("A", 0.2, 0.3, 0.4), ("B", 0.8, 1.5, 1.9), ("E", 9.0, 2.0, 2.1), ("C", 1.5, 1.8, 1.4)
    rows = [dict(zip(columns, row, strict=True)) for row in good]
    bad = [dict(zip(columns, row, strict=True)) for row in (("G", 0.9, -1.2, 0.3), ("F", 0.5, -0.4, 0.1))]
    return [(rows, 2.5), (rows, 1.5), (rows, 0.9), (rows, 10.0), (bad, 1.0), ([*bad, rows[0]], 1.0), (rows[3:], 1.0)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        "6.1", "Is it a KL?", 2, 5, _kl,
        (
            Mistake("A mean over the data's chosen responses",
                    "that is the chosen log-ratio; KL(π_θ‖π_ref) is a mean over what the policy itself writes",
                    lambda sp, sr, cp, cr, beta: (cp - cr).mean(),
                    (lambda sp, sr, cp, cr, beta: (cr - cp).mean(),
                     lambda sp, sr, cp, cr, beta: beta * (cp - cr).mean(),
                     lambda sp, sr, cp, cr, beta: (cp - cr).sum())),
            Mistake("Samples and chosen responses are mixed",
                    "only responses that the policy wrote belong into the mean",
                    lambda sp, sr, cp, cr, beta: torch.cat([sp - sr, cp - cr]).mean(),
                    (lambda sp, sr, cp, cr, beta: ((sp - sr).mean() + (cp - cr).mean()) / 2,
                     lambda sp, sr, cp, cr, beta: (sp - sr).mean() - (cp - cr).mean(),
                     lambda sp, sr, cp, cr, beta: sp.mean() - cr.mean(),
                     lambda sp, sr, cp, cr, beta: sp.mean() - cp.mean())),
            Mistake("The two models are swapped",
                    "over the policy's samples the mean of log π_ref − log π_θ is minus the KL: at most 0 on average",
                    _of_samples(lambda r, beta: -r.mean())),
            Mistake("It is multiplied or divided by β",
                    "β times the log-ratio is the implicit reward; the distance itself has no β in it",
                    _of_samples(lambda r, beta: beta * r.mean()), (_of_samples(lambda r, beta: r.mean() / beta),)),
            Mistake("You summed over the responses",
                    "it is a mean over responses: a sum grows with the number of samples",
                    _of_samples(lambda r, beta: r.sum())),
            Mistake("One value for each response",
                    "the KL is their mean, one number",
                    _of_samples(lambda r, beta: r)),
            Mistake("That is the median",
                    "the expectation is estimated by the mean, with its few far values",
                    _of_samples(lambda r, beta: r.median())),
            Mistake("You took absolute values",
                    "single log-ratios may be negative and must cancel; only their mean estimates the KL",
                    _of_samples(lambda r, beta: r.abs().mean()), (_of_samples(lambda r, beta: r.mean().abs()),)),
            Mistake("You dropped what is negative",
                    "the KL is never negative, but log-ratios are, and so can be the mean of a few; without them the "
                    "estimate is too high",
                    _of_samples(lambda r, beta: r.clamp_min(0).mean()),
                    (_of_samples(lambda r, beta: r[r > 0].mean()), _of_samples(lambda r, beta: r.mean().clamp_min(0)))),
            Mistake("The policy's probabilities are weights too",
                    "the samples come from the policy, so likely responses come often already: a plain mean",
                    lambda sp, sr, cp, cr, beta: (sp.exp() * (sp - sr)).sum(),
                    (lambda sp, sr, cp, cr, beta: (sp.exp() * (sp - sr)).mean(),
                     lambda sp, sr, cp, cr, beta: (sp.softmax(0) * (sp - sr)).sum())),
            Mistake("The reference is missing",
                    "the KL compares two models: the mean of log π_θ alone says how sure the policy is",
                    lambda sp, sr, cp, cr, beta: sp.mean(), (lambda sp, sr, cp, cr, beta: -sp.mean(),)),
            Mistake("That is k3, or k2",
                    "both estimate it too, but asked for is the mean of log-ratios, k1",
                    _of_samples(lambda r, beta: ((-r).exp() - 1 + r).mean()),
                    (_of_samples(lambda r, beta: (r**2 / 2).mean()),
                     _of_samples(lambda r, beta: (r.exp() - 1 - r).mean()))),
            Mistake("Log-probabilities are divided",
                    "the logarithm of a ratio is the difference of two logarithms",
                    lambda sp, sr, cp, cr, beta: (sp / sr).mean(),
                    (lambda sp, sr, cp, cr, beta: (sp / sr).log().mean(),)),
            Mistake("Probabilities take the place of their logarithms",
                    "what is given are log-probabilities; take their difference as it is",
                    _of_samples(lambda r, beta: r.exp().mean()),
                    (_of_samples(lambda r, beta: r.exp().mean().log()),
                     lambda sp, sr, cp, cr, beta: (sp.exp() - sr.exp()).mean(),
                     lambda sp, sr, cp, cr, beta: (sp.log() - sr.log()).mean())),
        ),
        cases=_models,
    ),
    Exercise(
        "6.2", "The best run within a KL budget", 1, 5, _best_within,
        (
            Mistake("The highest reward, whatever its KL",
                    "that run may be too far from the reference; drop the runs above the budget first",
                    lambda rows, budget: _best(rows)),
            Mistake("You chose first and looked at the KL after",
                    "if the best run of all is too far, the best of those within the budget is asked for, not None",
                    _then_checked),
            Mistake("The nearest run",
                    "the budget may be spent: among the runs within it the reward decides, not the KL",
                    _by(lambda row: -row["kl"]), (lambda rows, budget: _best(rows, lambda row: -row["kl"]),)),
            Mistake("The farthest run within the budget",
                    "farther is not better: among the runs within the budget the reward decides",
                    _by(lambda row: row["kl"]),
                    (lambda rows, budget: _best(rows, lambda row: -abs(row["kl"] - budget)),)),
            Mistake("The first or the last run within the budget",
                    "the rows come in no order; look for the highest reward",
                    _by(lambda row: 0.0), (lambda rows, budget: _best(_within(rows, budget)[-1:]),)),
            Mistake("You went by the implicit margin",
                    "reward_margin is the model's opinion of itself; true_reward says how good its answers are",
                    _by(lambda row: row["reward_margin"]),
                    (lambda rows, budget: _best(rows, lambda row: row["reward_margin"]),
                     _by(lambda row: row["true_reward"] + row["reward_margin"]))),
            Mistake("The most reward per nat",
                    "that prefers a run that hardly moved; within the budget a nat costs nothing",
                    _by(lambda row: row["true_reward"] / row["kl"]),
                    (_by(lambda row: row["true_reward"] - row["kl"]),)),
            Mistake("The worst run",
                    "a higher true_reward is a better answer: take the maximum",
                    _by(lambda row: -row["true_reward"])),
            Mistake("Your search begins at 0",
                    "rewards may all be negative, and then nothing beats 0: begin at −∞, or with the first row",
                    _from_zero,
                    (_by(lambda row: max(0.0, row["true_reward"])), _by(lambda row: abs(row["true_reward"])))),
            Mistake("A run at the budget is left out",
                    "at most the budget includes the budget itself: use <=, not <",
                    lambda rows, budget: _best([row for row in rows if row["kl"] < budget])),
            Mistake("The runs above the budget are kept",
                    "at most the budget: row[\"kl\"] <= budget",
                    lambda rows, budget: _best([row for row in rows if row["kl"] >= budget]),
                    (lambda rows, budget: _best([row for row in rows if row["kl"] > budget]),)),
            Mistake("Where no run is within the budget, there is nothing to choose from",
                    "ask whether any is left before you take the maximum, and return None if not",
                    lambda rows, budget: max(_within(rows, budget), key=_reward)["name"],
                    (lambda rows, budget: sorted(_within(rows, budget), key=_reward)[-1]["name"],
                     lambda rows, budget: _best_within(rows, budget) or "",
                      lambda rows, budget: _best_within(rows, budget)
                     or "None", lambda rows, budget: _best_within(rows, budget) or [])),
            Mistake("The name is asked for",
                    "return row[\"name\"] of the best row",
                    _whole(lambda row: row), (_whole(_reward), _whole(lambda row: row["kl"]))),
        ),
        cases=_runs,
    ),
)  # fmt: skip
