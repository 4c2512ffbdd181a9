"""Several processes, one training: what `accelerate launch` has set up, seen from inside. One process needs none of it.

Each process computes the gradient of its share of every batch, and the gradients are added up. Launching, finding the
others and talking to them is accelerate's and torch's work.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import SettingsError

if TYPE_CHECKING:  # the command line's help imports this module, and torch takes seconds
    from torch import Tensor

Value = TypeVar("Value")

PATIENCE = timedelta(hours=12)  # one process may score or sample for long while the others wait


def count() -> int:
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
    return count() == 1 or bool(_state().is_main_process)


def require_one(what: str) -> None:
    """SettingsError if several processes were started for something that only one can do."""
    if count() > 1:
        raise SettingsError(
            f"{what} runs in one process, but {count()} were started: launch data, reference, sft, dpo or sweep "
            f"with several, then run {what} with plain python"
        )


def share(batch: Sequence[int]) -> list[int]:
    """This process's part of a batch: every n-th of n processes, so that sorted lengths are dealt out evenly."""
    return list(batch) if count() == 1 else list(batch[_state().process_index :: count()])


def total(values: Tensor) -> Tensor:
    """The sum of these numbers over all processes."""
    if count() == 1:
        return values
    from accelerate.utils import reduce

    _state()
    summed: Tensor = reduce(values, reduction="sum")
    return summed


def add_up_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradient of each parameter by its sum over all processes."""
    if count() == 1:
        return
    import torch

    trained = list(parameters)
    for parameter in trained:
        if parameter.grad is None:  # without a share of its own, a process still takes part
            parameter.grad = torch.zeros_like(parameter)
    summed = total(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    for parameter, part in zip(trained, torch.split(summed, [p.numel() for p in trained]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def from_first(value: Value) -> Value:
    """The first process's value, in all of them."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _state()
    values = [value]
    broadcast_object_list(values)
    return values[0]


def wait_for_all() -> None:
    """Return when every process has called this."""
    if count() > 1:
        _state().wait_for_everyone()
