"""The gradient of one batch: added up over parts that fit in memory, averaged over processes, and never NaN."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from . import parallel
from .device import Compute
from .errors import TrainingError
from .tokens import EncodedPair, PairBatch, by_length, collate


class Objective(Protocol):
    """What a step minimises: (model, batch, positions of its pairs) -> (losses [B], metrics, each [B])."""

    def __call__(self, model: Any, batch: PairBatch, pairs: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses and metrics of a batch, one value a pair."""


class NotFinite(TrainingError):
    """`what` ("loss" or "gradient") was not finite in `rows` of the data."""

    def __init__(self, message: str, what: str, rows: list[int]):
        super().__init__(message)
        self.what, self.rows = {"gradient": "grad_norm"}.get(what, what), rows


def require_finite(what: str, values: Tensor, step: int, rows: Sequence[int]) -> None:
    """values: [n], one a row."""
    wrong = ~torch.isfinite(values)
    if wrong.any():
        bad = [row for row, is_wrong in zip(rows, wrong.tolist(), strict=True) if is_wrong]
        raise NotFinite(
            f"the {what} is not finite at update {step + 1} (rows {', '.join(map(str, bad))}); the weights are as "
            "before it: look at these rows, or begin anew (--no-resume) with a lower --learning-rate or fp32",
            what,
            bad,
        )


def halved(pairs: int, where: str) -> int:
    """Half as many pairs for the next try after running out of memory; TrainingError if it was a single one."""
    if pairs == 1:
        raise TrainingError(
            f"out of memory with a single pair a forward pass, at {where}: lower --max-length or --trunk-gb, or use "
            "a device with more memory"
        )
    return -(-pairs // 2)


class _Step(torch.nn.Module):
    """The objective as a module, since that is what DistributedDataParallel wraps."""

    def __init__(self, model: Any, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: PairBatch, at: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(self.model, batch, at)


class Gradient:
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
        rows = ", ".join(str(self.pairs[i].index) for i in at)
        self.micro_size = halved(
            min(self.micro_size, len(at)), f"update {step + 1} (rows {rows}), the weights as before"
        )
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
                require_finite("loss", losses, step, batch.rows)
                # a sum over processes is wanted where DistributedDataParallel gives their mean
                share = weight * parallel.processes() / len(at)
                self.scaler.scale(losses.sum() * share).backward()  # type: ignore[no-untyped-call]
            for key, value in {"loss": losses.detach(), **metrics}.items():
                sums[key] = sums.get(key, 0.0) + value.sum() * (weight / len(at))
        means = parallel.total(torch.stack(list(sums.values())))
        return dict(zip(sums, means.tolist(), strict=True))


def _sorted(pairs: Sequence[EncodedPair], at: Sequence[int]) -> list[int]:
    return [at[i] for i in by_length([pairs[i] for i in at])]


def _micro_batches(at: list[int], size: int) -> list[list[int]]:
    """Split a batch, sorted by length, into parts of `size` pairs: less padding and memory, the same gradient."""
    return [at[start : start + size] for start in range(0, len(at), size)]
