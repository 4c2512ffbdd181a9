"""The stored results of `benchmarks.rlhf`, as notebook c shows them: methods on one plane, their costs, their seeds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

STORED = Path(__file__).with_name("rlhf.json")  # written by benchmarks.rlhf


@cache
def stored() -> dict[str, Any]:
    """All stored numbers. methods: rows with name, family, short, kl, true_reward, scores and costs; and by name:
    reward_models, baselines, reference, rates, curves, seeds."""
    found: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return found


def method(name: str) -> dict[str, Any]:
    """The row of one method, such as "RLOO, β = 0.5". KeyError, which lists the names, if there is none."""
    rows = {row["name"]: row for row in stored()["methods"]}
    if name not in rows:
        raise KeyError(f"no method {name!r}; there are {', '.join(rows)}")
    found: dict[str, Any] = rows[name]
    return found


def cost_rows() -> list[dict[str, Any]]:
    """One row per method with costs: what it took on one CPU core, from the pairs to the trained policy.

    Where a method needs the reward model, its training is in the seconds, since nobody has one before.
    """
    return [
        {
            "method": row["name"],
            "seconds of a core": round(row["cpu_s"]),
            "of them the reward model": round(row["reward_model_s"]) or "–",
            "tokens sampled": f"{row['tokens']:,}",
            "peak memory, MB": round(row["peak_mb"]),
            "settings to choose": len(row["settings"]),
            "true reward": f"{row['true_reward']:.2f} ± {row['true_reward_se']:.2f}",
        }
        for row in stored()["methods"]
        if "cpu_s" in row
    ]  # fmt: skip


def worse_seeds(family: str) -> tuple[int, int]:
    """(How many seeds of the short runs ended with a lower true reward than they began with, how many there are)."""
    seeds, start = stored()["seeds"][family], stored()["seeds"]["start"]["true_reward"]
    return sum(row["true_reward"] < start for row in seeds), len(seeds)
