"""Six training set-ups with one fault each, which a learner finds from their curves (notebook 5, "Bugs to find").

Each trains the settings' model with the course's own loop on a few hundred pairs. A fault is a function that is given
the good set-up and returns it with one thing wrong; the good code stays as it is. Held-out points are measured by the
course's own evaluation, with the policy and the reference of that run: they show what became of the policy, where
the training rows show what the training believes.

Which letter has which fault stands in `exercises.faults`, where the learner's guess is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .engine import FastPath
from .evaluation import PairScores, preference_metrics, score_pairs
from .exercises.faults import PUZZLES
from .logprobs import pair_logprobs
from .models import freeze
from .runs import Stage, compute_of
from .settings import Settings
from .stages import fast_path, plan_of
from .steps import HOT_FACTOR, get_base, get_data, get_reference, get_sft
from .tokens import EncodedPair, PairBatch, collate
from .training import DPOObjective, MetricsRow, TrainPlan, train, updates_of

PAIRS = 320  # training pairs of a run, each seen once
BATCH = 8  # pairs an update, so that there are 40 updates
HELD_OUT = 60  # held-out pairs behind a point
POINTS = 4  # points on the way, the end included, after the one at the start
DROPOUT = 0.1  # GPT-2's rate; the embedded model was trained without


class Scorer(Protocol):
    """What gives a model's log-probabilities of the training pairs, such as `engine.FastPath`."""

    def pair_logprobs(self, model: Any, at: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(log p(chosen | prompt), log p(rejected | prompt)) of the pairs at these positions, each [B]."""


@dataclass(frozen=True)
class Setup:
    """What a run is made of; a fault changes it.

    start: the model that the policy starts from. reference: π_ref; scores, held_out: its log-probabilities of training
    and held-out pairs. scorer: the policy's log-probabilities in training. own_reference: the policy itself is taken
    for π_ref, as it is at each step.
    """

    settings: Settings
    start: Stage
    reference: Stage
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
    pairs = data.train[:PAIRS]
    plan = replace(plan_of(settings, 1, settings.learning_rate), batch_size=BATCH)
    plan = replace(plan, warmup_steps=min(plan.warmup_steps, updates_of(len(pairs), plan) // 4))
    scores, held_out = _reference_scores(settings, reference)
    fast = fast_path(settings, data, reference.load(compute_of(settings)), "train")
    return Setup(settings, reference, reference, scores, held_out, fast or Plain(pairs, data.pad_id), plan)


def _reference_scores(settings: Settings, stage: Stage) -> tuple[PairScores, PairScores]:
    """Log-probabilities of the training and of the held-out pairs under a stage's model."""
    model = stage.load(compute_of(settings))
    return _score(settings, model, "train", PAIRS), _score(settings, model, "held_out", HELD_OUT)


def _score(settings: Settings, model: Any, part: str, count: int) -> PairScores:
    data = get_data(settings)
    pairs: list[EncodedPair] = getattr(data, part)[:count]
    fast = fast_path(settings, data, model, part)
    return score_pairs(model, pairs, compute_of(settings), pad_id=data.pad_id, fast=fast)


@dataclass(frozen=True)
class Plain:
    """The plain path, `logprobs.pair_logprobs`, as a scorer."""

    pairs: Sequence[EncodedPair]
    pad_id: int

    def pair_logprobs(self, model: Any, at: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As `Scorer`."""
        return pair_logprobs(model, collate([self.pairs[i] for i in at], self.pad_id).to(model.device))


# the faults


@dataclass(frozen=True)
class _WithDropout(Plain):
    """The plain path after `model.train()`; dropout is off again when it is done."""

    def pair_logprobs(self, model: Any, at: Sequence[int]) -> tuple[Tensor, Tensor]:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = DROPOUT
            elif hasattr(module, "attention_dropout"):  # of Llama's family, whose only dropout it is
                module.attention_dropout = DROPOUT
        model.train()
        logps = super().pair_logprobs(model, at)
        model.eval()
        return logps


def with_dropout(good: Setup) -> Setup:
    """The policy trains with dropout on; the reference was scored with dropout off."""
    return replace(good, scorer=_WithDropout(good.pairs, get_data(good.settings).pad_id))


@dataclass(frozen=True)
class _Swapped:
    good: Scorer

    def pair_logprobs(self, model: Any, at: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.good.pair_logprobs(model, at)
        return rejected, chosen


def swap_sides(good: Setup) -> Setup:
    """In training the rejected responses are taken for the chosen ones, by policy and reference alike."""
    swapped = PairScores(
        good.scores.rejected, good.scores.chosen, good.scores.rejected_tokens, good.scores.chosen_tokens
    )
    return replace(good, scores=swapped, scorer=_Swapped(good.scorer))


@dataclass(frozen=True)
class _Averaged:
    good: Scorer
    lengths: PairScores

    def pair_logprobs(self, model: Any, at: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.good.pair_logprobs(model, at)
        lengths = self.lengths[list(at)]
        return chosen / lengths.chosen_tokens.to(chosen.device), rejected / lengths.rejected_tokens.to(chosen.device)


def average_logprobs(good: Setup) -> Setup:
    """In training log-probabilities are means over the tokens of a response, of policy and reference alike."""
    sums = good.scores
    means = replace(sums, chosen=sums.chosen / sums.chosen_tokens, rejected=sums.rejected / sums.rejected_tokens)
    return replace(good, scores=means, scorer=_Averaged(good.scorer, sums))


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


# the runs


@dataclass(frozen=True)
class _OwnReference:
    """DPO with the policy in the place of the reference: scored again at each step, without gradient."""

    good: DPOObjective
    scorer: Scorer

    def __call__(self, model: Any, batch: PairBatch, pairs: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            now = torch.stack(self.scorer.pair_logprobs(model, pairs)).cpu()
        torch.clear_autocast_cache()  # else the pass with gradient goes on with 16-bit weights cast without one
        chosen, rejected = torch.zeros(2, len(self.good.reference_chosen)).index_copy(1, torch.tensor(pairs), now)
        return replace(self.good, reference_chosen=chosen, reference_rejected=rejected)(model, batch, pairs)


def run(setup: Setup, name: str) -> list[MetricsRow]:
    """Train with a set-up; returns the rows of `training.train`, held-out points among them."""
    settings, data, compute = setup.settings, get_data(setup.settings), compute_of(setup.settings)
    loss = settings.loss_type, settings.label_smoothing
    model = setup.start.load(compute)
    freeze(model, settings.freeze_layers, settings.freeze_embeddings)

    def _evaluate(step: int) -> MetricsRow:
        scores = _score(settings, model, "held_out", HELD_OUT)
        reference = scores if setup.own_reference else setup.held_out
        return {"pairs": len(scores.chosen), **preference_metrics(scores, reference, settings.beta, *loss)}

    # a scorer takes the place of the fast path: both answer pair_logprobs(model, at)
    fast = cast(FastPath, setup.scorer)
    objective = DPOObjective(setup.scores.chosen, setup.scores.rejected, settings.beta, *loss, fast=fast)
    return train(
        model, setup.pairs, _OwnReference(objective, setup.scorer) if setup.own_reference else objective, setup.plan,
        compute, pad_id=data.pad_id, evaluate=_evaluate, evaluations=POINTS, name=name,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _all_runs(settings: Settings) -> dict[str, list[MetricsRow]]:
    good = good_setup(settings)
    runs = {letter: run(INJECT[puzzle.fault](good), f"run {letter}") for letter, puzzle in PUZZLES.items()}
    return {"healthy": run(good, "healthy run"), **runs}


def get_runs(settings: Settings) -> dict[str, list[MetricsRow]]:
    """The rows of the six faulty runs, by letter, "A" to "F"; kept in memory, for they take some seconds each."""
    return {letter: deepcopy(_all_runs(settings)[letter]) for letter in PUZZLES}


def get_healthy_run(settings: Settings) -> list[MetricsRow]:
    """The rows of the same training without a fault."""
    return deepcopy(_all_runs(settings)["healthy"])


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
