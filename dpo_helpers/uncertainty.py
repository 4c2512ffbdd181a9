"""How sure a number is: standard errors, and bootstrap intervals for means and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """An estimate and an interval that holds the true value in a share `level` of repetitions (0.95: 19 of 20)."""

    estimate: float
    low: float
    high: float
    level: float

    def __str__(self) -> str:
        """Such as "0.84 [0.80, 0.87]"."""
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


def mean_and_error(values: Tensor | Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean (nan for fewer than two values)."""
    x = torch.as_tensor(values, dtype=torch.float64)
    error = x.std().item() / math.sqrt(len(x)) if len(x) > 1 else float("nan")
    return x.mean().item(), error


def bootstrap_mean(
    values: Tensor | Sequence[float], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of a mean (Efron 1979): of means of samples drawn with replacement.

    values: one per pair or prompt, [n], n > 0; they must be independent of each other.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    most = max(1, 10**7 // len(x))  # resamples drawn at a time: 160 MB
    counts = [min(most, resamples - start) for start in range(0, resamples, most)]
    means = [x[torch.randint(len(x), (n, len(x)), generator=generator)].mean(dim=1) for n in counts]
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(tails).tolist()
    return Interval(x.mean().item(), low, high, level)


def paired_difference(first: Tensor | Sequence[float], second: Tensor | Sequence[float], **options: float) -> Interval:
    """Bootstrap interval of mean(first) - mean(second), where both were measured on the same pairs or prompts.

    The two are resampled together, so what makes a pair hard for both models cancels: where their values rise and
    fall together, the interval is narrower than that of two separate samples. Raises ValueError for different
    lengths; options as in `bootstrap_mean`.
    """
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (first, second))
    if a.shape != b.shape:
        raise ValueError(f"paired values need the same pairs: {len(a)} against {len(b)}")
    return bootstrap_mean(a - b, **options)  # type: ignore[arg-type]
