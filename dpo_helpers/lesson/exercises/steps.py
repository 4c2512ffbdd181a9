"""Exercises 5.4 and 5.5: the learner writes the DPO step and the loop's body, and `watching` sees what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ...logprobs import pair_logprobs
from ...losses import dpo_loss
from ...tokens import PairBatch
from .core import Exercise, Mistake
from .watching import KEYS, cases, watch_step, watch_update


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


def _step(slip: str = "") -> Callable[..., Any]:
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


def _update(slip: str = "", returned: Callable[..., Any] = lambda row, **given: row) -> Callable[..., Any]:
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


def _with(key: str, value: Callable[..., float]) -> Callable[..., Any]:
    """A solution of 5.5 with another value for a key of the row: value(row, β, largest norm, full rate)."""
    return _update(returned=lambda row, beta, limit, full: row | {key: value(row, beta, limit, full)})


# slips that both exercises share: what goes wrong, and why it matters
_SHARED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("The gradients of the update before are still in",
     "backward adds to what is there; optimizer.zero_grad() empties it, before backward", ("no zero_grad",)),
    ("The step is not clipped",
     "clip_grad_norm_ shortens the gradients that are there, for the step that comes: backward, clip, step. Is it "
     "missing, or in another place?", ("no clip", "clip first", "clip before all")),
    ("Another number is the largest norm", "it is given: max_grad_norm", ("clip to 1",)),
    ("Frozen weights are in the gradient",
     "they are frozen already; with requires_grad_ you thaw them, and clipping counts them too", ("thawed", "thawed late")),
    ("Each number of the gradient is clipped",
     "clip_grad_value_ turns the gradient; clip_grad_norm_ shortens it and keeps its direction", ("clip values",)),
    ("The losses are summed",
     "the mean over the pairs is asked for: a sum makes the step longer for a larger batch", ("sum", "mean returned")),
    ("Dropout is on",
     "policy.train() switches it on, and a log-probability is then one draw of many; leave the policy in eval mode",
     ("dropout", "dropout, then eval")),
    ("The gradient is used one update late",
     "optimizer.step() comes last: zero_grad, backward, clip, step", ("step first",)),
    ("You climb",
     "the optimizer goes against the gradient by itself: backward is for the loss, not for minus the loss",
     ("uphill",)),
    ("Chosen and rejected are swapped",
     "pair_logprobs returns the chosen ones first; dpo_loss takes both of the policy, then both of the reference, the "
     "chosen ones first", ("swapped", "policy swapped", "reference swapped", "models swapped")),
    ("The reference is missing",
     "the policy is compared with the reference: its log-probabilities are the third and fourth argument",
     ("no reference",)),
    ("The policy is its own reference",
     "the loss is then ln 2 at every update; the reference is another model, which stays as it is",
     ("own reference", "policy twice")),
    ("β is not that which is given", "pass it on: beta=beta", ("β is 1",)),
    ("The loss is that after the update",
     "keep the loss from which the gradient came; after the update it would take another forward pass", ("after",)),
    ("The graph hangs on what you return",
     "the tensor keeps all activations of this batch in memory; .item() makes it a number", ("graph",)),
)  # fmt: skip


def _made_by(make: Callable[[str], Callable[..., Any]], skip: tuple[str, ...] = ()) -> tuple[Mistake, ...]:
    """The shared mistakes as answers of one exercise, without the slips that it cannot have."""
    kept = [(name, reason, [slip for slip in slips if slip not in skip]) for name, reason, slips in _SHARED]
    return tuple(
        Mistake(name, reason, make(slips[0]), tuple(map(make, slips[1:]))) for name, reason, slips in kept if slips
    )


EXERCISES = (
    Exercise(
        "5.4", "The DPO step", 2, 10, _step(),
        (
            *_made_by(_step, skip=("policy twice",)),
            Mistake("The weights do not move",
                    "loss.backward() makes gradients and optimizer.step() uses them: is one missing, or zero_grad() "
                    "between them?",
                    _step("no step"), (_step("no backward"), _step("zero_grad late"))),
            Mistake("One loss is asked for",
                    "return the mean of the losses, a number",
                    _step("all"), (_step("all, graph"),)),
            Mistake("That is the norm of the gradient",
                    "clip_grad_norm_ returns the norm; return the mean loss", _step("norm")),
            Mistake("Nothing is returned",
                    "the update is right; return the mean loss too, a number", _step("return")),
        ),
        cases=cases, tolerance=1e-5, observe=watch_step,
    ),
    Exercise(
        "5.5", "The loop's body", 3, 12, _update(),
        (
            *_made_by(_update),
            Mistake("The reference got gradients",
                    "score it under torch.no_grad(): what must not change needs no gradient, whoever froze it "
                    "or did not",
                    _update("reference with gradient")),
            Mistake("There is no gradient",
                    "is loss.backward() missing, or does zero_grad() come between it and the clipping?",
                    _update("no backward"), (_update("zero_grad late"),)),
            Mistake("The weights do not move",
                    "optimizer.step() uses the gradients: is it missing, or does zero_grad() come before it?",
                    _update("no step")),
            Mistake("The rate is set after the step",
                    "an optimizer reads its rate when it steps, so this update has the rate of the one before: the "
                    "warm-up is late by one update, and the first step has full length",
                    _update("rate late")),
            Mistake("The optimizer does not know the rate",
                    "write it into all groups, before the step: for group in optimizer.param_groups: "
                    'group["lr"] = rate',
                    _update("rate unset")),
            Mistake("Only one group gets the rate",
                    "an optimizer may have several groups of parameters: set the rate of each", _update("one group")),
            Mistake("The rate is multiplied again and again",
                    "learning_rate · factor is the rate; the group's own rate has the factors of earlier updates in it",
                    _update("rate of the rate")),
            Mistake("The warm-up begins at 0",
                    "updates count from 0, so step / warmup_steps throws the first batch away: "
                    "(step + 1)/(warmup_steps + 1)",
                    _update("from 0"), (_update("one behind"),)),
            Mistake("Full rate one update too early",
                    "the warm-up has warmup_steps updates below the full rate: (step + 1)/(warmup_steps + 1)",
                    _update("early")),
            Mistake("The rate goes on rising",
                    "after the warm-up the factor stays at 1: min(1, …)", _update("uncapped")),
            Mistake("The factor alone is the rate",
                    "the rate is learning_rate times the factor of the warm-up", _update("factor alone")),
            Mistake("There is no warm-up",
                    "learning_rate is the full rate; the first updates have a share of it", _update("no warm-up")),
            Mistake("β is forgotten in the margin",
                    "a reward is β times the log-ratio; dpo_loss returns the rewards with it",
                    _with("reward_margin", lambda row, beta, limit, full: row["reward_margin"] / beta)),
            Mistake("β is in the margin twice",
                    "dpo_loss returns rewards, which have it already",
                    _with("reward_margin", lambda row, beta, limit, full: row["reward_margin"] * beta)),
            Mistake("That is no mean reward margin",
                    "the mean over the pairs of chosen minus rejected reward, as dpo_loss returns them",
                    _update("margins summed"),
                    (_update("all margins"), _update("chosen alone"), _update("margin of the policy"),
                     _with("reward_margin", lambda row, beta, limit, full: -row["reward_margin"]))),
            Mistake("The norm is that after clipping",
                    "clip_grad_norm_ returns the norm before it clips: that one says how steep it was",
                    _with("grad_norm", lambda row, beta, limit, full: min(row["grad_norm"], limit)),
                    (_with("grad_norm", lambda row, beta, limit, full: limit),)),
            Mistake("The row has another rate",
                    "learning_rate is the rate of this update: the full one times the factor",
                    _with("learning_rate", lambda row, beta, limit, full: row["learning_rate"] / full),
                    (_with("learning_rate", lambda row, beta, limit, full: full),)),
            Mistake("Something is missing in the row, or it is no dict",
                    'return {"loss": …, "reward_margin": …, "grad_norm": …, "learning_rate": …}',
                    _update(returned=lambda row, **given: None),
                    (_update(returned=lambda row, **given: tuple(row.values())),
                     _update(returned=lambda row, **given: list(row.values())),
                     _update(returned=lambda row, **given: row["loss"]),
                     *(_update(f"without {key}") for key in KEYS))),
        ),
        cases=cases, tolerance=1e-5, observe=watch_update,
    ),
)  # fmt: skip
