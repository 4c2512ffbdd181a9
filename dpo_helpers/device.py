"""One place that picks the device and the precision, and measures time and memory there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median

import torch

from . import parallel
from .errors import SettingsError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """Where and how precisely to compute: `device` is a torch device, `precision` fp32, bf16 or fp16.

    Weights stay float32; bf16 and fp16 apply to the matrix products inside `autocast()`, but for the head's.
    """

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which models run in this precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales an fp16 loss so that small gradients do not vanish; does nothing in other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def rounding(self, tokens: int) -> float:
        """Nats by which log p of so many tokens may differ from float32's by rounding: an allowance for checks.

        1e-3 in fp32, for another order of the same sums. In 16 bits 0.05 a token, which is wide: such a check then
        finds another model or another pair, but not always one missing token.
        """
        return 1e-3 if self.precision == "fp32" else 0.05 * tokens

    def describe(self) -> str:
        """Device and precision in words, such as "cuda (Tesla T4), fp16"."""
        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return f"{self.device.type}{name}, {self.precision}"


def pick_compute(device: str = "auto", precision: str = "auto") -> Compute:
    """The device and precision for settings "auto" or a name such as "cuda:1"; SettingsError if that is not there.

    auto device: cuda, else cpu; mps, on which nothing of this was ever run, has to be asked for. auto precision on
    cuda: bf16 where the chip computes in it natively (compute capability 8 and later; torch's is_bf16_supported also
    answers yes for emulation), else fp16 with a GradScaler, as on a T4; elsewhere fp32.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device is {device!r}, but torch sees no CUDA GPU: use --device cpu, or auto")
    if number and int(number) >= torch.cuda.device_count():
        there = ", ".join(f"cuda:{n}" for n in range(torch.cuda.device_count()))
        raise SettingsError(f"device is {device!r}, but torch sees only {there}: use one of these, or auto")
    if device == "mps" and not torch.backends.mps.is_available():
        raise SettingsError("device is 'mps', but this machine has none: use --device cpu, or auto")
    native_bf16 = kind == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    if precision == "auto":
        precision = ("bf16" if native_bf16 else "fp16") if kind == "cuda" else "fp32"
    if precision == "fp16" and kind != "cuda":
        raise SettingsError(f"precision is 'fp16', but {device} has no fp16 training: use --precision fp32, or auto")
    return Compute(parallel.local_device(device), precision)


def median_seconds(what: Callable[[], object], compute: Compute, repeats: int = 7) -> float:
    """Median time of `repeats` calls, after one that warms up; waits for what a GPU was asked to do."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        what()
        if compute.device.type == "cuda":
            torch.cuda.synchronize(compute.device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def peak_memory_gb(compute: Compute) -> float:
    """Peak memory in GB (10^9 bytes): of the GPU's allocator on cuda, else of this process."""
    if compute.device.type == "cuda":
        return torch.cuda.max_memory_allocated(compute.device) / 1e9
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # macOS counts bytes, Linux KiB
