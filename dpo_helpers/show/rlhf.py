"""The stored results of `benchmarks.rlhf`, as notebook c shows them: methods on one plane, their costs, their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..worlds.embedded import true_reward

__all__ = ["late_reward", "true_reward"]

LATE = 5  # updates at the end of a training that `late_reward` averages


def late_reward(rows: Sequence[Mapping[str, Any]], beta: float) -> float:
    """What RLOO raises, score - β × KL, over the last LATE updates. rows: score and k1 of each update's samples."""
    late = rows[-LATE:]
    return sum(float(row["score"]) - beta * float(row["k1"]) for row in late) / len(late)
