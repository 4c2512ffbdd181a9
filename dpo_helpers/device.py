"""Where and how precisely a model computes; `run.machine` picks it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Compute:
    """Where and how precisely to compute: `device` is a torch device, `precision` fp32, bf16 or fp16.

    Weights stay float32; bf16 and fp16 apply to the matrix products inside `autocast()`, but for the head's.
    """

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which models run in this precision."""
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()
