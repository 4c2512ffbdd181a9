"""One training loop for SFT and DPO: what differs is the objective, a function from a batch to losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from tqdm import tqdm

from . import parallel
from .device import Compute
from .engine import FastPath
from .errors import TrainingError
from .gradients import Gradient, NotFinite, Objective, require_finite
from .interrupts import Interrupted, finishing_first
from .logprobs import batch_logprobs, pair_logprobs
from .losses import pair_losses, sft_loss
from .resume import TrainState, Unfinished
from .tokens import EncodedPair, PairBatch, batch_order

MetricsRow = dict[str, Any]


@dataclass(frozen=True)
class TrainPlan:
    """How to train: sizes and rates as in `settings.Settings`, of one step of the course."""

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
    """Negative log-likelihood a token of the chosen responses; fast: the fast path over the training pairs, if any."""

    fast: FastPath | None = None

    def __call__(self, model: Any, batch: PairBatch, pairs: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of a batch; on the plain path only the B chosen rows are run."""
        size = len(batch.rows)
        ids, mask, response = batch.ids[:size], batch.attention_mask[:size], batch.response_mask[:size]
        fast = self.fast.chosen_logprobs(model, pairs) if self.fast else None
        logps = batch_logprobs(model, ids, mask, response) if fast is None else fast
        return sft_loss(logps, response.sum(dim=-1)), {}


sft_objective = SFTObjective()


@dataclass(frozen=True)
class DPOObjective:
    """A loss of `losses.dpo_loss` against reference log-probabilities that were computed once.

    reference_chosen, reference_rejected: log p_ref of every training pair, [n], float32, on the CPU. fast: the fast
    path over the training pairs, if any.
    """

    reference_chosen: Tensor
    reference_rejected: Tensor
    beta: float
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    fast: FastPath | None = None

    def __call__(self, model: Any, batch: PairBatch, pairs: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """DPO losses and the rewards of a batch, one value a pair; `pairs` picks the reference's values."""
        chosen, rejected = self.fast.pair_logprobs(model, pairs) if self.fast else pair_logprobs(model, batch)
        at = list(pairs)
        reference_chosen = self.reference_chosen[at].to(chosen.device)
        reference_rejected = self.reference_rejected[at].to(chosen.device)
        tokens = batch.response_mask.sum(dim=-1).chunk(2)
        losses, chosen_reward, rejected_reward = pair_losses(
            chosen, rejected, reference_chosen, reference_rejected, *tokens,
            beta=self.beta, loss_type=self.loss_type, label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return losses, {
            "chosen_reward": chosen_reward,
            "rejected_reward": rejected_reward,
            "reward_margin": chosen_reward - rejected_reward,
            "reward_accuracy": (chosen_reward > rejected_reward).float(),
        }


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


def train(
    model: Any,
    pairs: Sequence[EncodedPair],
    objective: Objective,
    plan: TrainPlan,
    compute: Compute,
    *,
    pad_id: int,
    evaluate: Callable[[int], MetricsRow] | None = None,
    evaluations: int = 8,
    name: str = "training",
    unfinished: Unfinished | None = None,
) -> list[MetricsRow]:
    """Train the model's trainable parameters in place; returns the metrics, one row an update or evaluation.

    A row holds step, epoch and split ("train" or "held_out"); training rows the batch means of loss and the
    objective's metrics, grad_norm (before clipping), learning_rate, pairs and seconds, and skipped, true, where fp16's
    scaler met an overflow and made no update. `evaluate`, which is given the number of updates done, is called before
    the first update, then about `evaluations` times, the last after the last update. Raises TrainingError on a loss
    that is not finite, and on such a gradient where no scaler can skip it (any more), before the update would spoil
    the weights.

    unfinished: where checkpoints are kept, and gone on from bit for bit. With it, Ctrl-C and SIGTERM let the update end
    and save before they raise `interrupts.Interrupted`.
    """
    batches = list(batch_order(len(pairs), plan.batch_size, plan.epochs, plan.seed))
    points = evaluation_points(len(batches), evaluations)
    model.eval()  # dropout stays off: a log-probability that enters a loss must be the model's own
    run = _Run(model, pairs, objective, plan, compute, pad_id, len(batches), name)
    run.begin(unfinished)
    if evaluate and not run.rows:
        run.note({"step": 0, "epoch": 0, "split": "held_out", **evaluate(0)})
    quiet = {} if parallel.is_main() else {"disable": True}  # else TQDM_DISABLE decides
    bar = tqdm(batches[run.done :], desc=name, unit="update", initial=run.done, total=len(batches), **quiet)
    with finishing_first() if unfinished else nullcontext(lambda: 0) as asked_to_stop, run.own_randomness():
        for epoch, at in bar:
            row = run.update(epoch, at)
            bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{row['learning_rate']:.1e}")
            if evaluate and run.done in points:
                run.note({"step": run.done, "epoch": epoch, "split": "held_out", **evaluate(run.done)})
            run.keep(asked_to_stop())
        run.keep(asked_to_stop(), saved=True)  # asked while the last checkpoint was written
    return run.rows


class _Run:
    """A training under way: its optimiser, its rows, and how many updates are done."""

    def __init__(
        self,
        model: Any,
        pairs: Sequence[EncodedPair],
        objective: Objective,
        plan: TrainPlan,
        compute: Compute,
        pad_id: int,
        total: int,
        name: str,
    ):
        self.named = {key: p for key, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.optimizer = make_optimizer(plan.optimizer, self.parameters, plan.learning_rate)
        self.scaler = compute.grad_scaler()
        self.gradient = Gradient(model, pairs, objective, plan.micro_batch_size, compute, self.scaler, pad_id)
        self.pairs, self.plan, self.compute, self.total, self.name = pairs, plan, compute, total, name
        self.rows: list[MetricsRow] = []
        self.done = 0
        self.unfinished: Unfinished | None = None

    def update(self, epoch: int, at: Sequence[int]) -> MetricsRow:
        """One update with the pairs at these positions, and its row of metrics."""
        started, step = time.perf_counter(), self.done
        torch.manual_seed(self.plan.seed * 1_000_003 + step)  # anything random in it depends on (seed, step) alone
        rate = self.plan.learning_rate * rate_factor(step, self.total, self.plan)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        row: MetricsRow = {"step": step + 1, "epoch": epoch, "split": "train"}
        try:
            row |= self.gradient.of_batch(at, step, self.parameters)
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.plan.max_grad_norm)
            # fp16's scaler meets an overflow by skipping the update and scaling less, until there is nothing to lower
            if not self.scaler.is_enabled() or self.scaler.get_scale() < 1:
                require_finite("gradient", norm.expand(len(at)), step, [self.pairs[i].index for i in at])
        except NotFinite as error:
            self._log({**row, error.what: math.nan, "rows": error.rows})
            raise
        self._step(step)
        row |= {"grad_norm": norm.item(), "learning_rate": rate, "pairs": len(at)}
        if not math.isfinite(row["grad_norm"]):
            row["skipped"] = True
        row["seconds"] = time.perf_counter() - started
        self.done += 1
        self.note(row)
        return row

    def _step(self, step: int) -> None:
        try:
            self.scaler.step(self.optimizer)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise TrainingError(  # the weights in memory may be half updated; those of the last checkpoint are not
                f"out of memory in the optimiser's step of update {step + 1}: run the same again to go on from the "
                "last checkpoint, with less else in memory (--trunk-gb), or use a device with more"
            ) from error
        self.scaler.update()

    def note(self, row: MetricsRow) -> None:
        """Add a row to the metrics."""
        self.rows.append(row)
        self._log(row)

    def _log(self, row: MetricsRow) -> None:
        if self.unfinished and parallel.is_main():
            self.unfinished.log(row)

    def own_randomness(self) -> AbstractContextManager[None]:
        """A context after which PyTorch's global generators are as before."""
        return torch.random.fork_rng([self.compute.device] if self.compute.device.type == "cuda" else [])

    def begin(self, unfinished: Unfinished | None) -> None:
        """Go on from the newest checkpoint, if there is one."""
        self.unfinished = unfinished
        state = unfinished.newest() if unfinished else None
        if state:
            self._restore(state)
        if unfinished and parallel.is_main():
            unfinished.begin_log(self.rows)

    def _restore(self, state: TrainState) -> None:
        with torch.no_grad():
            for key, parameter in self.named.items():
                parameter.copy_(state.weights[key])
        moments: dict[int, dict[str, Tensor]] = {}
        for number, key in enumerate(self.named):
            of_key = {k: v for k, v in state.optimizer.items() if k.rpartition("/")[0] == key}
            moments[number] = {k.rpartition("/")[2]: v for k, v in of_key.items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.rows, self.done = list(state.rows), state.step
        self.gradient.micro_size = min(state.micro_size, self.plan.micro_batch_size)

    def state(self) -> TrainState:
        """What has to be kept to go on from here."""
        weights = {key: parameter.detach().cpu().contiguous() for key, parameter in self.named.items()}
        moments = {
            f"{key}/{k}": torch.as_tensor(v).cpu().contiguous()
            for key, parameter in self.named.items()
            for k, v in self.optimizer.state[parameter].items()
        }
        return TrainState(self.done, weights, moments, self.rows, self.gradient.micro_size, self.scaler.state_dict())

    def keep(self, signal_number: int, saved: bool = False) -> None:
        """Save a checkpoint if one is due and not saved yet; after a signal save and raise `Interrupted`."""
        if self.unfinished is None:
            return
        signal_number = parallel.agreed(signal_number)  # of several processes, the first one's counts
        due = self.done % self.unfinished.every == 0 or self.done == self.total  # what follows may take long too
        if not (signal_number or due):
            return
        if parallel.is_main() and not saved:
            self.unfinished.save(self.state())
        if signal_number:
            raise Interrupted(
                f"{self.name}: interrupted after update {self.done} of {self.total}, saved in "
                f"{self.unfinished.folder}; run the same again to go on (without --fresh or --no-resume)",
                signal_number,
            )


def updates_of(pairs: int, plan: TrainPlan) -> int:
    """How many updates a plan makes of so many pairs."""
    return plan.epochs * -(-pairs // plan.batch_size)


def evaluation_points(updates: int, evaluations: int) -> set[int]:
    """The updates after which to evaluate: `evaluations` of them at even distances, the last one among them."""
    return {round(updates * k / evaluations) for k in range(1, evaluations + 1)}
