"""The machine that a run has: its device and precision, its memory, and how long something takes on it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median

import torch

from ..device import Compute
from ..errors import SettingsError
from ..settings import Settings
from . import processes


def compute_of(settings: Settings) -> Compute:
    """The device and precision that the settings ask for."""
    return _compute(settings.device, settings.precision)


@cache
def _compute(device: str, precision: str) -> Compute:
    return pick_compute(device, precision)


def pick_compute(device: str = "auto", precision: str = "auto") -> Compute:
    """The device and precision for settings "auto" or a name such as "cuda:1"; SettingsError if that is not there.

    auto device: cuda, else cpu; mps, on which nothing of this was ever run, has to be asked for. auto precision on
    cuda: bf16 where the chip computes in it natively (compute capability 8 and later; torch's is_bf16_supported also
    answers yes for emulation), else fp16, with a gradient that is scaled, as on a T4; elsewhere fp32.
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
    if processes.count() > 1 and kind == "cuda":
        if number:
            raise SettingsError(f"device is {device!r}, but {processes.count()} processes cannot share it: use cuda")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return Compute(torch.device(device), precision)


def describe(compute: Compute) -> str:
    """Device and precision in words, such as "cuda (Tesla T4), fp16"."""
    name = f" ({torch.cuda.get_device_name(compute.device)})" if compute.device.type == "cuda" else ""
    return f"{compute.device.type}{name}, {compute.precision}"


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
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    # not ru_maxrss, which begins with the peak of the process that started this one
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
