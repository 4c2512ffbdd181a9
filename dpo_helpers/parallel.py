"""Several processes, one training: what `accelerate launch` has set up, seen from inside. One process needs none of it.

Each process computes the gradient of its share of every batch, and DistributedDataParallel averages the gradients.
Launching, finding the others and talking to them is accelerate's and torch's work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


def processes() -> int:
    """How many processes train together (1 unless started by `accelerate launch` or torchrun)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@cache
def _state() -> Any:
    from accelerate import PartialState

    return PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"))


def is_main() -> bool:
    """Whether this process writes files and messages: the first one, or the only one."""
    return processes() == 1 or bool(_state().is_main_process)


def local_device(kind: str) -> torch.device:
    """The device of this process: the GPU with its local number if there are several processes on GPUs."""
    return (
        torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
        if processes() > 1 and kind == "cuda"
        else torch.device(kind)
    )


def share(batch: Sequence[int]) -> list[int]:
    """This process's part of a batch: every n-th of n processes, so that sorted lengths are dealt out evenly."""
    return list(batch) if processes() == 1 else list(batch[_state().process_index :: processes()])


def together(step: nn.Module) -> nn.Module:
    """The module whose gradients are averaged over the processes in each backward pass; itself for one process."""
    if processes() == 1:
        return step
    _state()
    return nn.parallel.DistributedDataParallel(step)


def alone(step: nn.Module) -> Any:
    """A context whose backward passes only add up gradients here; they are averaged by the next one outside it."""
    return step.no_sync() if isinstance(step, nn.parallel.DistributedDataParallel) else nullcontext()


def total(values: Tensor) -> Tensor:
    """The sum of these numbers over all processes."""
    if processes() == 1:
        return values
    from accelerate.utils import reduce

    _state()
    summed: Tensor = reduce(values, reduction="sum")
    return summed


def agreed(value: Value) -> Value:
    """The first process's value, in all of them."""
    if processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _state()
    values = [value]
    broadcast_object_list(values)
    return values[0]
