"""The one training loop, for SFT and DPO: what differs is the objective, from log-probabilities to losses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from .device import Compute
from .logprobs import BOTH, PairScores, Scorer
from .losses import dpo_loss, sft_loss
from .tokens import EncodedPair, batch_order

MetricsRow = dict[str, Any]
# Gradient by a log-probability below which a pair is left out. No float32 weight would change, but a backward pass of
# numbers that are almost 0 (denormals) takes a CPU up to a hundred times as long.
LEARNED = 1e-30


@dataclass(frozen=True)
class TrainPlan:
    """How to train: sizes and rates as in `settings.Settings`, of one training of the course."""

    epochs: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    optimizer: str
    warmup_steps: int
    schedule: str
    max_grad_norm: float
    seed: int


@dataclass(frozen=True)
class SFTObjective:
    """Negative log-likelihood per token of the chosen responses. chosen_tokens: their lengths, [n], on the CPU.

    An objective gets the positions of B pairs and the policy's log-probabilities of their responses, [B] for each side
    that it names, and gives losses [B] and metrics, [B] each.
    """

    sides: ClassVar[tuple[str, ...]] = ("chosen",)
    chosen_tokens: Tensor

    def __call__(self, at: Sequence[int], chosen: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses; there are no metrics beside them."""
        return sft_loss(chosen, self.chosen_tokens[list(at)].to(chosen.device)), {}


@dataclass(frozen=True)
class DPOObjective:
    """A loss of `losses.dpo_loss`. reference: log-probabilities of all training pairs under π_ref, computed once."""

    sides: ClassVar[tuple[str, ...]] = BOTH
    reference: PairScores
    beta: float
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0

    def __call__(self, at: Sequence[int], chosen: Tensor, rejected: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses; the metrics are the implicit rewards, their margin, and whether it is above 0."""
        ref = self.reference[list(at)].to(chosen.device)
        for logps in (chosen, rejected):
            if logps.requires_grad:
                logps.register_hook(lambda weight: weight.masked_fill(weight.abs() < LEARNED, 0.0))  # type: ignore[no-untyped-call]
        losses, chosen_reward, rejected_reward = dpo_loss(
            chosen, rejected, ref.chosen, ref.rejected, lengths=(ref.chosen_tokens, ref.rejected_tokens),
            beta=self.beta, loss_type=self.loss_type, label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return losses, {
            "chosen_reward": chosen_reward,
            "rejected_reward": rejected_reward,
            "reward_margin": chosen_reward - rejected_reward,
            "reward_accuracy": (chosen_reward > rejected_reward).float(),
        }


Objective = SFTObjective | DPOObjective  # what a training minimises


def make_optimizer(name: str, parameters: list[torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """RMSprop with PyTorch's defaults, as EM and the study use it, or AdamW without weight decay.

    RMSprop divides by a running mean of squared gradients that starts at 0 and is not corrected for it: its
    first update is about ten times the learning rate in each weight. That is what the warm-up is for.
    """
    if name == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=learning_rate)
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Share of the learning rate at update `step` (from 0): (step + 1)/(warmup_steps + 1), then 1 (EM)."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def rate_factor(step: int, total: int, plan: TrainPlan) -> float:
    """Share of the learning rate at update `step` of `total`: warm-up, then constant or a linear fall to 0.

    "constant" is what EM does after its warm-up, "linear" transformers' get_linear_schedule_with_warmup. The
    fall takes out the noise that a constant rate leaves in the last weights, which shows in short runs.
    """
    factor = warmup_factor(step, plan.warmup_steps)
    if plan.schedule == "linear":
        factor *= min(1.0, (total - step) / max(1, total - plan.warmup_steps))
    return factor


class WholeBatch:
    """How a gradient is made, plainly: from all pairs of a batch at once. `run.gradients` does it in parts."""

    def parts(self, pairs: Sequence[EncodedPair], at: Sequence[int], step: int) -> Iterator[Sequence[int]]:
        """The parts of a batch, as positions of pairs: one, which is all of it."""
        yield at

    def attempt(self) -> AbstractContextManager[object]:
        """A context in which one part is computed."""
        return nullcontext()

    def backward(self, losses: Tensor, metrics: dict[str, Tensor]) -> None:
        """Add the gradient of the mean loss to the parameters; losses and each metric: [B]."""
        losses.mean().backward()  # type: ignore[no-untyped-call]
        self.means = {"loss": losses.mean().item(), **{key: value.mean().item() for key, value in metrics.items()}}

    def finish(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """The batch means of loss and metrics, now that all parts are in."""
        return self.means

    def step(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> dict[str, Any]:
        """Update the weights; norm: of the gradient, before clipping. Returns what the row should say of it."""
        optimizer.step()
        return {"grad_norm": norm.item()}


class Watch:
    """What happens after an update: here nothing. `run.watch` evaluates, logs, saves and stops."""

    def begin(self, model: Any, optimizer: torch.optim.Optimizer, gradient: WholeBatch, total: int) -> list[MetricsRow]:
        """Before the first of `total` updates: the rows of an earlier part of this training, whose weights it sets."""
        return []

    def updated(self, rows: list[MetricsRow]) -> None:
        """After an update, whose row is the last one; rows of its own are added to the list."""


def train(
    model: Any, pairs: Sequence[EncodedPair], scorer: Scorer, objective: Objective, plan: TrainPlan, compute: Compute,
    *, gradient: WholeBatch | None = None, watch: Watch | None = None, name: str = "training",
) -> list[MetricsRow]:  # fmt: skip
    """Train the model's trainable parameters in place; returns the metrics, one row per update (and those of `watch`).

    scorer: where log-probabilities come from, over these pairs (it may know more, behind them). gradient: how a
    gradient is made, by default from the whole batch. watch: what happens after an update, by default nothing.
    A row holds step, epoch and split ("train"); the batch means of loss and the objective's metrics; grad_norm (before
    clipping), learning_rate, pairs and seconds.
    """
    model.eval()  # dropout stays off: a log-probability that enters a loss must be the model's own
    gradient, watch = gradient or WholeBatch(), watch or Watch()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(plan.optimizer, parameters, plan.learning_rate)
    batches = list(batch_order(len(pairs), plan.batch_size, plan.epochs, plan.seed))
    rows = watch.begin(model, optimizer, gradient, len(batches))
    done = sum(row["split"] == "train" for row in rows)
    bar = tqdm(range(done, len(batches)), desc=name, unit="update", initial=done, total=len(batches))
    with torch.random.fork_rng([compute.device] if compute.device.type == "cuda" else []):
        for step in bar:
            started, (epoch, at) = time.perf_counter(), batches[step]
            torch.manual_seed(plan.seed * 1_000_003 + step)  # whatever is random depends on (seed, step) alone
            optimizer.zero_grad()
            for part in gradient.parts(pairs, at, step):
                with gradient.attempt():
                    with compute.autocast():
                        logps = scorer(model, part, objective.sides)  # log π_θ(y | x), [B] for each side
                        losses, metrics = objective(part, *logps)  # [B] each
                    gradient.backward(losses, metrics)
                logps = losses = metrics = None  # type: ignore[assignment]  # or the graph of a part that failed stays
            means = gradient.finish(optimizer)
            norm = clip_grad_norm_(parameters, plan.max_grad_norm)
            rate = plan.learning_rate * rate_factor(step, len(batches), plan)
            for group in optimizer.param_groups:
                group["lr"] = rate
            row = {"step": step + 1, "epoch": epoch, "split": "train", **means, **gradient.step(optimizer, norm)}
            rows.append(row | {"learning_rate": rate, "pairs": len(at), "seconds": time.perf_counter() - started})
            watch.updated(rows)
            bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{rate:.1e}")
    return rows
