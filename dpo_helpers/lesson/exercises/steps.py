"""Exercises 5.4 and 5.5: the learner writes the DPO step and the loop's body; `watching` sees what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .core import Exercise, Mistake
from .slips import row_with, step_with, update_with
from .watching import KEYS, cases, watch_step, watch_update

# slips that both exercises share: what goes wrong, and why it matters
_SHARED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("The gradients of the update before are still in",
     "backward adds to what is there; optimizer.zero_grad() empties it, before backward", ("no zero_grad",)),
    ("The step is not clipped",
     "clip_grad_norm_ shortens the gradients that are there, for the step that comes: backward, clip, step. Is it "
     "missing, or in another place?", ("no clip", "clip first", "clip before all")),
    ("Another number is the largest norm", "it is given: max_grad_norm", ("clip to 1",)),
    ("Frozen weights are in the gradient",
     "they are frozen already; with requires_grad_ you thaw them, and clipping counts them too",
     ("thawed", "thawed late")),
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
        "5.4", "The DPO step", 2, 10, step_with(),
        (
            *_made_by(step_with, skip=("policy twice",)),
            Mistake("The weights do not move",
                    "loss.backward() makes gradients and optimizer.step() uses them: is one missing, or zero_grad() "
                    "between them?",
                    step_with("no step"), (step_with("no backward"), step_with("zero_grad late"))),
            Mistake("One loss is asked for",
                    "return the mean of the losses, a number",
                    step_with("all"), (step_with("all, graph"),)),
            Mistake("That is the norm of the gradient",
                    "clip_grad_norm_ returns the norm; return the mean loss", step_with("norm")),
            Mistake("Nothing is returned",
                    "the update is right; return the mean loss too, a number", step_with("return")),
        ),
        cases=cases, tolerance=1e-5, observe=watch_step,
    ),
    Exercise(
        "5.5", "The loop's body", 3, 12, update_with(),
        (
            *_made_by(update_with),
            Mistake("The reference got gradients",
                    "score it under torch.no_grad(): what must not change needs no gradient, whoever froze it "
                    "or did not",
                    update_with("reference with gradient")),
            Mistake("There is no gradient",
                    "is loss.backward() missing, or does zero_grad() come between it and the clipping?",
                    update_with("no backward"), (update_with("zero_grad late"),)),
            Mistake("The weights do not move",
                    "optimizer.step() uses the gradients: is it missing, or does zero_grad() come before it?",
                    update_with("no step")),
            Mistake("The rate is set after the step",
                    "an optimizer reads its rate when it steps, so this update has the rate of the one before: the "
                    "warm-up is late by one update, and the first step has full length",
                    update_with("rate late")),
            Mistake("The optimizer does not know the rate",
                    "write it into all groups, before the step: for group in optimizer.param_groups: "
                    'group["lr"] = rate',
                    update_with("rate unset")),
            Mistake("Only one group gets the rate",
                    "an optimizer may have several groups of parameters: set the rate of each",
                    update_with("one group")),
            Mistake("The rate is multiplied again and again",
                    "learning_rate · factor is the rate; the group's own rate has the factors of earlier updates in it",
                    update_with("rate of the rate")),
            Mistake("The warm-up begins at 0",
                    "updates count from 0, so step / warmup_steps throws the first batch away: "
                    "(step + 1)/(warmup_steps + 1)",
                    update_with("from 0"), (update_with("one behind"),)),
            Mistake("Full rate one update too early",
                    "the warm-up has warmup_steps updates below the full rate: (step + 1)/(warmup_steps + 1)",
                    update_with("early")),
            Mistake("The rate goes on rising",
                    "after the warm-up the factor stays at 1: min(1, …)", update_with("uncapped")),
            Mistake("The factor alone is the rate",
                    "the rate is learning_rate times the factor of the warm-up", update_with("factor alone")),
            Mistake("There is no warm-up",
                    "learning_rate is the full rate; the first updates have a share of it", update_with("no warm-up")),
            Mistake("β is forgotten in the margin",
                    "a reward is β times the log-ratio; dpo_loss returns the rewards with it",
                    row_with("reward_margin", lambda row, beta, limit, full: row["reward_margin"] / beta)),
            Mistake("β is in the margin twice",
                    "dpo_loss returns rewards, which have it already",
                    row_with("reward_margin", lambda row, beta, limit, full: row["reward_margin"] * beta)),
            Mistake("That is no mean reward margin",
                    "the mean over the pairs of chosen minus rejected reward, as dpo_loss returns them",
                    update_with("margins summed"),
                    (update_with("all margins"), update_with("chosen alone"), update_with("margin of the policy"),
                     row_with("reward_margin", lambda row, beta, limit, full: -row["reward_margin"]))),
            Mistake("The norm is that after clipping",
                    "clip_grad_norm_ returns the norm before it clips: that one says how steep it was",
                    row_with("grad_norm", lambda row, beta, limit, full: min(row["grad_norm"], limit)),
                    (row_with("grad_norm", lambda row, beta, limit, full: limit),)),
            Mistake("The row has another rate",
                    "learning_rate is the rate of this update: the full one times the factor",
                    row_with("learning_rate", lambda row, beta, limit, full: row["learning_rate"] / full),
                    (row_with("learning_rate", lambda row, beta, limit, full: full),)),
            Mistake("Something is missing in the row, or it is no dict",
                    'return {"loss": …, "reward_margin": …, "grad_norm": …, "learning_rate": …}',
                    update_with(returned=lambda row, **given: None),
                    (update_with(returned=lambda row, **given: tuple(row.values())),
                     update_with(returned=lambda row, **given: list(row.values())),
                     update_with(returned=lambda row, **given: row["loss"]),
                     *(update_with(f"without {key}") for key in KEYS))),
        ),
        cases=cases, tolerance=1e-5, observe=watch_update,
    ),
)  # fmt: skip
