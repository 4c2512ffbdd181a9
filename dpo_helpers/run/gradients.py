"""The gradient of one batch: added up over parts that fit into memory and over processes, scaled in fp16, never NaN."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from ..device import Compute
from ..errors import TrainingError
from ..tokens import EncodedPair, by_length
from ..training import WholeBatch
from . import processes


class NotFinite(TrainingError):
    """At update `step` (from 0) `what`, a key of a metrics row, was not finite in `rows` of the data."""

    def __init__(self, what: str, values: Tensor, step: int, rows: Sequence[int]):
        """values: [n], one per row."""
        self.what, self.step = {"gradient": "grad_norm"}.get(what, what), step
        self.rows = [row for row, good in zip(rows, torch.isfinite(values).tolist(), strict=True) if not good]
        super().__init__(
            f"the {what} is not finite at update {step + 1} (rows {', '.join(map(str, self.rows))}); the weights are "
            "as before it: look at these rows, or begin again (--no-resume) with a lower --learning-rate or fp32"
        )


class InParts(WholeBatch):
    """The gradient of a batch's mean loss from parts of `micro_size` pairs of like length: less padding and memory.

    Out of memory, the batch is done again with parts of half the size, and so are all later ones: the same gradient.
    Of several processes each computes every n-th pair. Raises TrainingError where one pair is too much, and NotFinite
    on a loss that is not finite, or on such a gradient where fp16's scaler cannot skip it (any more), before the update
    would spoil the weights.
    """

    def __init__(self, micro_size: int, compute: Compute, parameters: Sequence[torch.nn.Parameter]):
        self.micro_size, self.compute, self.parameters = micro_size, compute, parameters
        # scales an fp16 loss so that small gradients do not vanish; does nothing in other precisions
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")

    def parts(self, pairs: Sequence[EncodedPair], at: Sequence[int], step: int) -> Iterator[Sequence[int]]:
        """As `WholeBatch`; after a part for which the memory was too short, all parts come again, smaller."""
        self.rows, self.number = [pairs[i].index for i in at], step
        in_order = processes.share([at[i] for i in by_length([pairs[i] for i in at])])
        while True:
            self.sums: dict[str, Tensor] = {}
            self.is_short = False
            # without a share of its own, a process still needs the names of the metrics, with weight 0
            self.weight = (1.0 if in_order else 0.0) / len(at)
            mine = in_order or list(at[:1])
            for start in range(0, len(mine), self.micro_size):
                part = mine[start : start + self.micro_size]
                self.part_rows = [pairs[i].index for i in part]
                yield part
                if self.is_short:
                    break
            if not self.is_short:
                return
            self._halve(len(at))

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """As `WholeBatch`: an error for want of memory ends here, and `parts` tries again."""
        try:
            yield
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            self.is_short = True

    def backward(self, losses: Tensor, metrics: dict[str, Tensor]) -> None:
        """As `WholeBatch`, for one part of the batch."""
        if not torch.isfinite(losses).all():
            raise NotFinite("loss", losses.detach(), self.number, self.part_rows)
        self.scaler.scale(losses.sum() * self.weight).backward()  # type: ignore[no-untyped-call]
        for key, value in {"loss": losses.detach(), **metrics}.items():
            self.sums[key] = self.sums.get(key, 0.0) + value.sum() * self.weight

    def finish(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """As `WholeBatch`, over all parts and processes."""
        processes.add_up_gradients(self.parameters)
        self.scaler.unscale_(optimizer)
        means = processes.total(torch.stack(list(self.sums.values())))
        return dict(zip(self.sums, means.tolist(), strict=True))

    def step(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> dict[str, Any]:
        """As `WholeBatch`; "skipped" says that fp16's scaler met an overflow and made no update."""
        is_finite = bool(torch.isfinite(norm))
        # the scaler meets an overflow by skipping the update and scaling less, until there is nothing left to lower
        if not is_finite and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1):
            raise NotFinite("gradient", norm.expand(len(self.rows)), self.number, self.rows)
        try:
            self.scaler.step(optimizer)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise TrainingError(  # the weights in memory may be half updated; those of the last checkpoint are not
                f"out of memory in the optimiser's step of update {self.number + 1}: run the same again to go on from "
                "the last checkpoint, with less else in memory (--trunk-gb), or use a device with more"
            ) from error
        self.scaler.update()
        return {"grad_norm": norm.item()} | ({} if is_finite else {"skipped": True})

    def _halve(self, pairs: int) -> None:
        where = f"out of memory at update {self.number + 1} with {self.micro_size} pairs per forward pass"
        if processes.count() > 1:  # the others are in the middle of theirs
            raise TrainingError(f"{where} and process: lower --micro-batch-size, the update stays the same")
        rows = ", ".join(map(str, self.rows))
        size = min(self.micro_size, pairs)
        self.micro_size = halved(size, f"update {self.number + 1} (rows {rows}), the weights as before")
        print(f"{where}: from here on {self.micro_size}, and more passes per update; the update stays the same")
        for parameter in self.parameters:
            parameter.grad = None
        free_memory(self.compute)


def halved(pairs: int, where: str) -> int:
    """Half as many pairs for the next try after running out of memory; TrainingError if it was a single one."""
    if pairs == 1:
        raise TrainingError(
            f"out of memory with a single pair per forward pass, at {where}: lower --max-length or --trunk-gb, or use "
            "a device with more memory"
        )
    return -(-pairs // 2)


def free_memory(compute: Compute) -> None:
    """Give back what a pass that failed for want of memory has left."""
    gc.collect()
    if compute.device.type == "cuda":
        torch.cuda.empty_cache()
