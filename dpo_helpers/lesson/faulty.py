"""Six trainings with one fault each, which a learner finds from their curves (notebook 5, "Bugs to find").

Each trains the settings' model with the course's own loop on a few hundred pairs. A fault is a function that is given
the good set-up and returns it with one thing wrong; the good code stays as it is. Held-out points are measured by the
course's own evaluation, with the policy and the reference of that training: they show what became of the policy, where
the training rows show what the training believes.

Which letter has which fault is decided in `exercises.faults`, where the learner's guess is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..evaluation import preference_metrics
from ..logprobs import BOTH, PairScores, PlainScorer, Scorer
from ..models import freeze
from ..run.artefacts import ModelArtefact
from ..run.gradients import InParts
from ..run.machine import compute_of
from ..run.stages import HOT_FACTOR, dpo_objective, get_base, get_data, get_reference, get_sft
from ..run.trained import plan_of, score_part, scorer_of, updates_of
from ..run.watch import Points
from ..settings import Settings
from ..tokens import EncodedPair
from ..training import DPOObjective, MetricsRow, TrainPlan, train
from .exercises.faults import PUZZLES

PAIRS = 320  # training pairs of each training, each seen once
BATCH = 8  # pairs per update, so that there are 40 updates
HELD_OUT = 60  # held-out pairs behind a point
POINTS = 4  # points on the way, the end included, after the one at the start
DROPOUT = 0.1  # GPT-2's rate; the embedded model was trained without


@dataclass(frozen=True)
class Setup:
    """What a training is made of; a fault changes it.

    start: the model that the policy starts from. reference: π_ref; scores, held_out: its log-probabilities of training
    and held-out pairs. scorer: the policy's log-probabilities in training. own_reference: the policy itself is taken
    for π_ref, as it is at each step.
    """

    settings: Settings
    start: ModelArtefact
    reference: ModelArtefact
    scores: PairScores
    held_out: PairScores
    scorer: Scorer
    plan: TrainPlan
    own_reference: bool = False

    @property
    def pairs(self) -> list[EncodedPair]:
        """The training pairs: the first ones of the data."""
        return get_data(self.settings).train[:PAIRS]


def good_setup(settings: Settings) -> Setup:
    """The set-up without a fault: the settings' DPO, on fewer pairs, in smaller batches, with a shorter warm-up."""
    data, reference = get_data(settings), get_reference(settings)
    plan = replace(plan_of(settings, 1, settings.learning_rate), batch_size=BATCH)
    updates = updates_of(len(data.train[:PAIRS]), plan)
    plan = replace(plan, warmup_steps=min(plan.warmup_steps, updates // 4))
    scorer = scorer_of(settings, data, reference.load(compute_of(settings)), "train")
    return Setup(settings, reference, reference, *_reference_scores(settings, reference), scorer, plan)


def _reference_scores(settings: Settings, start: ModelArtefact) -> tuple[PairScores, PairScores]:
    """Log-probabilities of the training and of the held-out pairs under a stored model."""
    data, model = get_data(settings), start.load(compute_of(settings))
    return score_part(settings, data, model, "train", PAIRS), score_part(settings, data, model, "held_out", HELD_OUT)


# the faults


@dataclass(frozen=True)
class _WithDropout(PlainScorer):
    """The plain path after `model.train()`; dropout is off again when it is done."""

    def __call__(self, model: Any, at: Sequence[int], sides: Sequence[str] = BOTH) -> tuple[Tensor, ...]:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = DROPOUT
            elif hasattr(module, "attention_dropout"):  # of Llama's family, whose only dropout it is
                module.attention_dropout = DROPOUT
        model.train()
        logps = super().__call__(model, at, sides)
        model.eval()
        return logps


def with_dropout(good: Setup) -> Setup:
    """The policy trains with dropout on; the reference was scored with dropout off."""
    return replace(good, scorer=_WithDropout(good.pairs, get_data(good.settings).pad_id))


def swap_sides(good: Setup) -> Setup:
    """In training the rejected responses are taken for the chosen ones, by policy and reference alike."""
    scores = good.scores
    swapped = PairScores(scores.rejected, scores.chosen, scores.rejected_tokens, scores.chosen_tokens)

    def _scorer(model: Any, at: Sequence[int], sides: Sequence[str] = BOTH) -> tuple[Tensor, ...]:
        return good.scorer(model, at, sides)[::-1]

    return replace(good, scores=swapped, scorer=_scorer)


def average_logprobs(good: Setup) -> Setup:
    """In training log-probabilities are means over the tokens of a response, of policy and reference alike."""
    sums = good.scores
    means = replace(sums, chosen=sums.chosen / sums.chosen_tokens, rejected=sums.rejected / sums.rejected_tokens)

    def _scorer(model: Any, at: Sequence[int], sides: Sequence[str] = BOTH) -> tuple[Tensor, ...]:
        chosen, rejected = good.scorer(model, at, sides)
        lengths = sums[list(at)].to(chosen.device)
        return chosen / lengths.chosen_tokens, rejected / lengths.rejected_tokens

    return replace(good, scores=means, scorer=_scorer)


def own_reference(good: Setup) -> Setup:
    """There is one model: what was meant for a copy of the start is the policy itself."""
    return replace(good, own_reference=True)


def wrong_reference(good: Setup) -> Setup:
    """The policy starts from SFT, and the reference is the plain model."""
    base = get_base(good.settings)
    scores, held_out = good.scores, good.held_out
    if base.weights_sha256 != good.reference.weights_sha256:
        scores, held_out = _reference_scores(good.settings, base)
    return replace(good, start=get_sft(good.settings), reference=base, scores=scores, held_out=held_out)


def too_hot(good: Setup) -> Setup:
    """No warm-up, and a learning rate that is ten times too high."""
    rate = HOT_FACTOR * good.plan.learning_rate
    return replace(good, plan=replace(good.plan, learning_rate=rate, warmup_steps=0))


INJECT: dict[str, Callable[[Setup], Setup]] = {  # by the names of `exercises.FAULTS`
    "averaged log-probabilities": average_logprobs,
    "dropout on": with_dropout,
    "policy is its own reference": own_reference,
    "rate too high, no warm-up": too_hot,
    "sides swapped": swap_sides,
    "wrong reference": wrong_reference,
}


# the trainings


@dataclass(frozen=True)
class _OwnReference(DPOObjective):
    """DPO with the policy in the place of the reference: its own log-probabilities, without their gradient."""

    def __call__(self, at: Sequence[int], chosen: Tensor, rejected: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        now, places = self.reference, list(at)
        of_policy = replace(
            now,
            chosen=now.chosen.index_copy(0, torch.tensor(places), chosen.detach().cpu()),
            rejected=now.rejected.index_copy(0, torch.tensor(places), rejected.detach().cpu()),
        )
        return DPOObjective(of_policy, self.beta, self.loss_type, self.label_smoothing)(at, chosen, rejected)


def _held_out(setup: Setup, model: Any) -> MetricsRow:
    settings = setup.settings
    scores = score_part(settings, get_data(settings), model, "held_out", HELD_OUT)
    reference, loss = scores if setup.own_reference else setup.held_out, (settings.loss_type, settings.label_smoothing)
    return {"pairs": len(scores.chosen), **preference_metrics(scores, reference, settings.beta, *loss)}


def train_faulty(setup: Setup, name: str) -> list[MetricsRow]:
    """Train with a set-up; returns the rows of `training.train`, held-out points among them."""
    settings, plan, compute = setup.settings, setup.plan, compute_of(setup.settings)
    model = setup.start.load(compute)
    freeze(model, settings.freeze_layers, settings.freeze_embeddings)
    objective = dpo_objective(settings, settings.beta, setup.scores)
    if setup.own_reference:
        objective = _OwnReference(objective.reference, objective.beta, objective.loss_type, objective.label_smoothing)
    in_parts = InParts(plan.micro_batch_size, compute, [p for p in model.parameters() if p.requires_grad])
    every = -(-updates_of(len(setup.pairs), plan) // POINTS)
    watch = Points(lambda model, _: _held_out(setup, model), every)
    return train(model, setup.pairs, setup.scorer, objective, plan, compute, gradient=in_parts, watch=watch, name=name)


@lru_cache(maxsize=1)
def _all_trainings(settings: Settings) -> dict[str, list[MetricsRow]]:
    good = good_setup(settings)
    faulty = {name: train_faulty(INJECT[puzzle.fault](good), f"run {name}") for name, puzzle in PUZZLES.items()}
    return {"healthy": train_faulty(good, "healthy run"), **faulty}


def get_faulty_trainings(settings: Settings) -> dict[str, list[MetricsRow]]:
    """The rows of the six faulty trainings, by letter, "A" to "F"; kept in memory, for they take some seconds each."""
    return {letter: deepcopy(_all_trainings(settings)[letter]) for letter in PUZZLES}


def get_healthy_training(settings: Settings) -> list[MetricsRow]:
    """The rows of the same training without a fault."""
    return deepcopy(_all_trainings(settings)["healthy"])


def signs(rows: Sequence[MetricsRow]) -> dict[str, float]:
    """What to compare runs by: where they start, how large the gradient is, and where both kinds of pairs end.

    "at the end" is the mean of the last quarter of the updates for training batches, the last point for held-out pairs.
    Updates that fp16's scaler skipped do not count.
    """
    done = [row for row in rows if not row.get("skipped")]
    updates, points = ([row for row in done if row["split"] == split] for split in ("train", "held_out"))
    late = updates[-max(1, len(updates) // 4) :]
    return {
        "held-out loss before": points[0]["loss"],
        "first training loss": updates[0]["loss"],
        "first gradient norm": updates[0]["grad_norm"],
        "second training loss": updates[:2][-1]["loss"],
        "highest training loss": max(row["loss"] for row in updates),
        "highest gradient norm": max(row["grad_norm"] for row in updates),
        **{
            f"{kind} {what} at the end": sum(row[f"reward_{what}"] for row in end) / len(end)
            for what in ("margin", "accuracy")
            for kind, end in (("training", late), ("held-out", points[-1:]))
        },
    }
