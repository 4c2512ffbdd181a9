"""The source study of this course: what it published, and its own estimator on our runs.

"Direct Preference Optimization Implementation on GPT-2", the README that this course began with, trained GPT-2 on
HH-RLHF with RMSprop at 1e-6 and reports a "reward" and a "KL" for its models. It describes its reward as the mean
β-scaled log-ratio on chosen responses, and its reward is β times its "KL"; so we read that "KL" as the mean log-ratio
on the data's chosen responses (`chosen_logratio` here).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from ..evaluation import Evaluation
from ..training import MetricsRow

LOSS_BY_EPOCH = (2.74, 2.18, 2.23, 2.24, 1.98)  # mean DPO loss of each of five epochs
REWARD_AND_KL = {"sft": (5.7, 11.42), "dpo": (2.26, 4.51)}  # at β = 0.5
SWEEP_KL = {0.1: 1.25, 0.5: 2.98, 1.0: 3.38, 5.0: 3.50}  # "KL" by β


def reward_of_kl(beta: float, kl: float) -> float:
    """The study's reward for its "KL": β × "KL", since both are the chosen log-ratio."""
    return beta * kl


def study_point(evaluation: Evaluation) -> tuple[float, float]:
    """(Reward, "KL") of one of our models, as the study estimates them."""
    return evaluation.metrics["chosen_reward"], evaluation.metrics["chosen_logratio"]


def loss_by_part(rows: Sequence[MetricsRow], parts: int = 5) -> list[float]:
    """Mean training loss of each of `parts` equal parts of a run (or of each update, if they are fewer)."""
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    parts = min(parts, len(losses))
    ends = [round(len(losses) * k / parts) for k in range(parts + 1)]
    return [sum(losses[a:b]) / (b - a) for a, b in pairwise(ends)]


def sweep_columns(evaluations: Mapping[float, Evaluation]) -> list[dict[str, object]]:
    """One row a β: the study's "KL" and β × "KL" as published, our chosen log-ratio and reward, the measured KL."""
    rows: list[dict[str, object]] = []
    for beta in sorted(evaluations):
        metrics, published = evaluations[beta].metrics, SWEEP_KL.get(beta)
        rows.append({
            "β": f"{beta:g}",
            'study: "KL"': "–" if published is None else published,
            'study: β × "KL"': "–" if published is None else reward_of_kl(beta, published),
            "ours: chosen log-ratio": metrics["chosen_logratio"],
            "ours: chosen reward": metrics["chosen_reward"],
            "ours: measured KL": metrics["kl"],
            "± (standard error)": metrics["kl_se"],
        })  # fmt: skip
    return rows
