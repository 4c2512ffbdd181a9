"""Several processes, one training: what `accelerate launch` has set up, seen from inside. One process needs none of it.

Each process computes the gradient of its share of every batch, and DistributedDataParallel averages the gradients.
Launching, finding the others and talking to them is accelerate's and torch's work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import SettingsError

if TYPE_CHECKING:  # the command line's help imports this module, and torch takes seconds
    import torch
    from torch import Tensor, nn

Value = TypeVar("Value")


PATIENCE = timedelta(hours=12)  # one process may score or sample for long while the others wait


def processes() -> int:
    """How many processes train together (1 unless started by `accelerate launch` or torchrun)."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


@cache
def _state() -> Any:
    """accelerate's record of the processes; it connects them when first asked."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def is_main() -> bool:
    """Whether this process writes files and messages: the first one, or the only one."""
    return processes() == 1 or bool(_state().is_main_process)


def require_one(what: str) -> None:
    """SettingsError if several processes were started for something that only one can do."""
    if processes() > 1:
        raise SettingsError(
            f"{what} runs in one process, but {processes()} were started: launch data, reference, sft, dpo or sweep "
            f"with several, then run {what} with plain python"
        )


def local_device(kind: str) -> torch.device:
    """The device of this process: with several on one machine's GPUs, the one of its local number."""
    import torch

    if processes() > 1 and kind.startswith("cuda:"):
        raise SettingsError(f"device is {kind!r}, but {processes()} processes cannot share it: use --device cuda")
    number = int(os.environ["LOCAL_RANK"]) if processes() > 1 and kind == "cuda" else None
    return torch.device(kind) if number is None else torch.device(kind, number)


def share(batch: Sequence[int]) -> list[int]:
    """This process's part of a batch: every n-th of n processes, so that sorted lengths are dealt out evenly."""
    return list(batch) if processes() == 1 else list(batch[_state().process_index :: processes()])


def together(step: nn.Module) -> nn.Module:
    """The module whose gradients are averaged over the processes in each backward pass; itself for one process."""
    if processes() == 1:
        return step
    from torch.nn.parallel import DistributedDataParallel

    _state()
    return DistributedDataParallel(step)


def alone(step: nn.Module) -> Any:
    """A context whose backward passes only add up gradients here; they are averaged by the next one outside it."""
    return nullcontext() if processes() == 1 else step.no_sync()  # type: ignore[operator]


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
