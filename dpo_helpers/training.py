"""One training loop for SFT and DPO: what differs is the objective, a function from a batch to losses."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from tqdm import tqdm

from . import parallel
from .device import Compute
from .engine import FastPath
from .errors import TrainingError
from .logprobs import batch_logprobs, pair_logprobs
from .losses import pair_losses, sft_loss
from .tokens import EncodedPair, PairBatch, batch_order, by_length, collate

MetricsRow = dict[str, Any]


class Objective(Protocol):
    """What a step minimises: (model, batch, positions of its pairs) -> (losses [B], metrics, each [B])."""

    def __call__(self, model: Any, batch: PairBatch, pairs: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses and metrics of a batch, one value a pair."""


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
    evaluate: Callable[[], MetricsRow] | None = None,
    evaluations: int = 8,
    name: str = "training",
) -> list[MetricsRow]:
    """Train the model's trainable parameters in place; returns the metrics, one row an update or evaluation.

    A row holds step, epoch and split ("train" or "held_out"); training rows the batch means of loss and the
    objective's metrics, grad_norm (before clipping), learning_rate, pairs and seconds. `evaluate` is called before
    the first update, then about `evaluations` times, the last after the last update. Raises TrainingError on a
    loss or gradient that is not finite, before the update would spoil the weights.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(plan.optimizer, parameters, plan.learning_rate)
    scaler = compute.grad_scaler()
    batches = list(batch_order(len(pairs), plan.batch_size, plan.epochs, plan.seed))
    points = _evaluation_points(len(batches), evaluations)
    model.eval()  # dropout stays off: a log-probability that enters a loss must be the model's own
    gradient = _Gradient(model, pairs, objective, plan.micro_batch_size, compute, scaler, pad_id)
    rows: list[MetricsRow] = [{"step": 0, "epoch": 0, "split": "held_out", **evaluate()}] if evaluate else []
    quiet = {} if parallel.is_main() else {"disable": True}  # else TQDM_DISABLE decides
    bar = tqdm(batches, desc=name, unit="update", **quiet)
    for step, (epoch, at) in enumerate(bar):
        started = time.perf_counter()
        rate = plan.learning_rate * rate_factor(step, len(batches), plan)
        for group in optimizer.param_groups:
            group["lr"] = rate
        means = gradient.of_batch(at, step, parameters)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm)
        if not scaler.is_enabled():  # fp16's scaler meets an overflow by skipping the update and scaling less
            _require_finite("gradient", norm.expand(len(at)), step, [pairs[i].index for i in at])
        scaler.step(optimizer)
        scaler.update()
        row: MetricsRow = {"step": step + 1, "epoch": epoch, "split": "train", **means}
        row |= {"grad_norm": norm.item(), "learning_rate": rate, "pairs": len(at)}
        row["seconds"] = time.perf_counter() - started
        rows.append(row)
        bar.set_postfix(loss=f"{means['loss']:.3f}", lr=f"{rate:.1e}")
        if evaluate and step + 1 in points:
            rows.append({"step": step + 1, "epoch": epoch, "split": "held_out", **evaluate()})
    return rows


class _Step(torch.nn.Module):
    """The objective as a module, since that is what DistributedDataParallel wraps."""

    def __init__(self, model: Any, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: PairBatch, at: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(self.model, batch, at)


class _Gradient:
    """The gradient of a batch's mean loss, added up over micro-batches that fit in memory, and over processes."""

    def __init__(
        self,
        model: Any,
        pairs: Sequence[EncodedPair],
        objective: Objective,
        micro_size: int,
        compute: Compute,
        scaler: torch.amp.GradScaler,
        pad_id: int,
    ):
        self.step = parallel.together(_Step(model, objective))
        self.pairs, self.micro_size, self.compute, self.scaler, self.pad_id = pairs, micro_size, compute, scaler, pad_id

    def of_batch(self, at: Sequence[int], step: int, parameters: Sequence[Tensor]) -> dict[str, float]:
        """Put the gradient into `parameters`; returns the batch means of loss and metrics.

        Out of memory, the batch is done again with micro-batches of half the size, and so are all later ones: the
        same gradient, from smaller parts. Raises TrainingError where one pair is too much.
        """
        while True:
            for parameter in parameters:
                parameter.grad = None
            try:
                return self._accumulate(at, step)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self._halve(at, step)
            gc.collect()  # outside the except block, whose error keeps the failed pass's tensors alive
            if self.compute.device.type == "cuda":
                torch.cuda.empty_cache()

    def _halve(self, at: Sequence[int], step: int) -> None:
        where = f"out of memory at update {step + 1} with {self.micro_size} pairs a forward pass"
        if parallel.processes() > 1:  # the others are in the middle of theirs
            raise TrainingError(f"{where} and process: lower --micro-batch-size, the update stays the same")
        self.micro_size = min(self.micro_size, len(at))
        if self.micro_size == 1:
            rows = ", ".join(str(self.pairs[i].index) for i in at)
            raise TrainingError(
                f"out of memory at update {step + 1} with a single pair a forward pass (rows {rows}); the weights are "
                "as before it: lower --max-length, or use a device with more memory"
            )
        self.micro_size = -(-self.micro_size // 2)
        print(f"{where}: from here on {self.micro_size}, and more passes an update; the update stays the same")

    def _accumulate(self, at: Sequence[int], step: int) -> dict[str, float]:
        micros = _micro_batches(parallel.share(_sorted(self.pairs, at)), self.micro_size)
        weight = 1.0 if micros else 0.0  # without a share of its own, a process still takes part in the averaging
        micros = micros or [list(at[:1])]
        sums: dict[str, Tensor] = {}
        for n, micro in enumerate(micros):
            batch = collate([self.pairs[i] for i in micro], self.pad_id).to(self.compute.device)
            with parallel.alone(self.step) if n + 1 < len(micros) else nullcontext():
                with self.compute.autocast():
                    losses, metrics = self.step(batch, micro)
                _require_finite("loss", losses, step, batch.rows)
                # a sum over processes is wanted where DistributedDataParallel gives their mean
                share = weight * parallel.processes() / len(at)
                self.scaler.scale(losses.sum() * share).backward()  # type: ignore[no-untyped-call]
            for key, value in {"loss": losses.detach(), **metrics}.items():
                sums[key] = sums.get(key, 0.0) + value.sum() * (weight / len(at))
        means = parallel.total(torch.stack(list(sums.values())))
        return dict(zip(sums, means.tolist(), strict=True))


def _evaluation_points(updates: int, evaluations: int) -> set[int]:
    """The updates after which to evaluate: `evaluations` of them at even distances, the last one among them."""
    return {round(updates * k / evaluations) for k in range(1, evaluations + 1)}


def _sorted(pairs: Sequence[EncodedPair], at: Sequence[int]) -> list[int]:
    return [at[i] for i in by_length([pairs[i] for i in at])]


def _micro_batches(at: list[int], size: int) -> list[list[int]]:
    """Split a batch, sorted by length, into parts of `size` pairs: less padding and memory, the same gradient."""
    return [at[start : start + size] for start in range(0, len(at), size)]


def _require_finite(what: str, values: Tensor, step: int, rows: Sequence[int]) -> None:
    """values: [n], one a row."""
    wrong = ~torch.isfinite(values)
    if wrong.any():
        bad = ", ".join(str(row) for row, is_wrong in zip(rows, wrong.tolist(), strict=True) if is_wrong)
        raise TrainingError(
            f"the {what} is not finite at update {step + 1} (rows {bad}); the weights are as before it: lower "
            "--learning-rate or use --precision fp32"
        )
