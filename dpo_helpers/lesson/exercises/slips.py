"""Solutions of exercises 5.4 and 5.5 in which one thing goes wrong: what is wrong is named by a word, the slip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ...logprobs import pair_logprobs
from ...losses import dpo_loss
from ...tokens import PairBatch


def _backward(slip: str, policy: Any, optimizer: torch.optim.Optimizer, losses: Tensor, limit: float) -> Tensor:
    """From the losses to gradients, clipped; returns their norm before that. slip: what goes wrong on the way."""
    loss = losses.sum() if slip in ("sum", "mean returned") else losses.mean()
    if slip == "step first":
        optimizer.step()
    if slip == "thawed late":
        policy.requires_grad_(True)
    early = clip_grad_norm_(policy.parameters(), limit) if slip == "clip before all" else None
    if slip not in ("no zero_grad", "no backward"):
        optimizer.zero_grad()
    early = clip_grad_norm_(policy.parameters(), limit) if slip == "clip first" else early
    if slip != "no backward":
        (-loss if slip == "uphill" else loss).backward()  # type: ignore[no-untyped-call]
    if slip == "zero_grad late":
        optimizer.zero_grad()
    if slip == "clip values":
        clip_grad_value_(policy.parameters(), limit)
    another = {"no clip": float("inf"), "clip values": float("inf"), "clip to 1": 1.0}
    norm = clip_grad_norm_(policy.parameters(), another.get(slip, limit) if early is None else float("inf"))
    return norm if early is None else early


def _scored(
    slip: str, policy: Any, batch: PairBatch, chosen: Tensor, rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dpo_loss of a batch, (losses, chosen rewards, rejected rewards); slip: what goes wrong in it."""
    policy.train(slip in ("dropout", "dropout, then eval"))
    if slip == "thawed":
        policy.requires_grad_(True)
    mine = pair_logprobs(policy, batch)
    if slip == "dropout, then eval":
        policy.eval()
    given = {
        "swapped": (*mine[::-1], rejected, chosen),
        "policy swapped": (*mine[::-1], chosen, rejected),
        "reference swapped": (*mine, rejected, chosen),
        "models swapped": (chosen, rejected, *mine),
        "no reference": (*mine, torch.zeros_like(chosen), torch.zeros_like(rejected)),
        "own reference": (*mine, *(logps.detach() for logps in mine)),
    }
    return dpo_loss(*given.get(slip, (*mine, chosen, rejected)), beta=1.0 if slip == "β is 1" else beta)


def step_with(slip: str = "") -> Callable[..., Any]:
    """A solution of 5.4; slip: the one thing that goes wrong in it."""

    def step(
        policy: Any, optimizer: torch.optim.Optimizer, batch: PairBatch, chosen: Tensor, rejected: Tensor, beta: float,
        max_grad_norm: float,
    ) -> Any:  # fmt: skip
        losses = _scored(slip, policy, batch, chosen, rejected, beta)[0]
        norm = _backward(slip, policy, optimizer, losses, max_grad_norm)
        if slip not in ("step first", "no step"):
            optimizer.step()
        if slip == "after":
            losses = _scored(slip, policy, batch, chosen, rejected, beta)[0]
        other = {"sum": losses.sum().item(), "graph": losses.mean(), "all": losses.detach(), "all, graph": losses,
                 "norm": norm.item(), "return": None}  # fmt: skip
        return other[slip] if slip in other else losses.mean().item()

    return step


def _rate(slip: str, step: int, learning_rate: float, warmup_steps: int) -> float:
    factors = {
        "from 0": min(1.0, step / warmup_steps),
        "one behind": min(1.0, step / (warmup_steps + 1)),
        "early": min(1.0, (step + 1) / warmup_steps),
        "uncapped": (step + 1) / (warmup_steps + 1),
        "no warm-up": 1.0,
        "factor alone": min(1.0, (step + 1) / (warmup_steps + 1)) / learning_rate,
    }
    return learning_rate * factors.get(slip, min(1.0, (step + 1) / (warmup_steps + 1)))


def _row(slip: str, losses: Tensor, margins: Tensor, norm: Tensor, rate: float) -> dict[str, Any]:
    """What 5.5 returns; slip: what goes wrong in it."""
    loss = losses.sum() if slip == "sum" else losses.mean()
    margin = margins.sum() if slip == "margins summed" else margins.mean()
    row = {
        "loss": loss if slip == "graph" else loss.item(),
        "reward_margin": margins if slip == "all margins" else margin.item(),
        "grad_norm": norm.item(),
        "learning_rate": rate,
    }
    return {key: value for key, value in row.items() if slip != f"without {key}"}


def update_with(slip: str = "", returned: Callable[..., Any] = lambda row, **given: row) -> Callable[..., Any]:
    """A solution of 5.5; slip: the one thing that goes wrong in it; returned: what is made of the row in the end."""

    def one_update(
        step: int, policy: Any, optimizer: torch.optim.Optimizer, batch: PairBatch, reference: Any, beta: float,
        learning_rate: float, warmup_steps: int, max_grad_norm: float,
    ) -> Any:  # fmt: skip
        with torch.set_grad_enabled(slip == "reference with gradient"):
            chosen, rejected = pair_logprobs(policy if slip == "policy twice" else reference, batch)
        losses, chosen_reward, rejected_reward = _scored(slip, policy, batch, chosen, rejected, beta)
        norm = _backward(slip, policy, optimizer, losses, max_grad_norm)
        rate = _rate(slip, step, learning_rate, warmup_steps)
        groups = [] if slip in ("rate unset", "rate late") else optimizer.param_groups
        for group in groups[: 1 if slip == "one group" else None]:
            group["lr"] = group["lr"] * rate / learning_rate if slip == "rate of the rate" else rate
        if slip not in ("step first", "no step"):
            optimizer.step()
        for group in optimizer.param_groups if slip == "rate late" else []:
            group["lr"] = rate
        if slip == "after":
            losses, chosen_reward, rejected_reward = _scored(slip, policy, batch, chosen, rejected, beta)
        margins = chosen_reward if slip == "chosen alone" else chosen_reward - rejected_reward
        if slip == "margin of the policy":
            margins = margins / beta + chosen - rejected
        row = _row(slip, losses, margins, norm, rate)
        return returned(row, beta=beta, limit=max_grad_norm, full=learning_rate)

    return one_update


def row_with(key: str, value: Callable[..., float]) -> Callable[..., Any]:
    """A solution of 5.5 with another value for a key of the row: value(row, β, largest norm, full rate)."""
    return update_with(returned=lambda row, beta, limit, full: row | {key: value(row, beta, limit, full)})
