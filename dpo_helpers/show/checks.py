"""Checks for notebooks: they print the expectation and assert the value, so that rounding flips no digit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from ..device import Compute
from ..errors import CourseError
from ..settings import PROFILES, Settings

EXPECTED = Path(__file__).with_name("expected.json")  # name of a check: [value, tolerance]


def check(name: str, got: float, want: float | None = None, tol: float = 0.0, only: Settings | None = None) -> None:
    """Print "name: want ok (tolerance tol)" if |got - want| <= tol, else raise AssertionError with the value.

    want: where a reader shall predict it, it is left out, and both numbers are looked up by name in `expected.json`,
    out of sight; CourseError if they are not there.
    only: settings of this run, for a number that was measured on the mini profile: under other settings the
    value is printed without an expectation.
    """
    if want is None:
        if name not in (recorded := json.loads(EXPECTED.read_text("utf-8"))):
            raise CourseError(f"{EXPECTED.name} has no value for {name!r}: add [value, tolerance], or pass both here")
        want, tol = recorded[name]
    if only is not None and not _expected(only):
        print(f"{name}: {got:.4g} (no expectation: it was measured on the mini profile as it is)")
        return
    if not (math.isfinite(got) and abs(got - want) <= tol):
        raise AssertionError(f"{name}: got {got:.6g}, want {want:g} ± {tol:g}")
    print(f"{name}: {want:g} ok (tolerance {tol:g})")


def check_that(claim: str, holds: bool, only: Settings | None = None) -> None:
    """Print "claim: holds", or raise AssertionError; with `only` as in `check`, other settings just report."""
    if only is not None and not _expected(only):
        print(f"{claim}: {'holds' if holds else 'does not hold'} here (claimed of the mini profile as it is)")
        return
    if not holds:
        raise AssertionError(f"{claim}: does not hold")
    print(f"{claim}: holds")


def rounding(compute: Compute, tokens: int) -> float:
    """Nats by which log p of so many tokens may differ from float32's by rounding: an allowance for checks.

    1e-3 in fp32, for another order of the same sums. In 16 bits 0.05 per token, which is wide: such a check then
    finds another model or another pair, but not always one missing token.
    """
    return 1e-3 if compute.precision == "fp32" else 0.05 * tokens


def _expected(settings: Settings) -> bool:
    """Whether nothing that changes a number differs from the mini profile."""
    same = {"runs_dir": "", "device": "auto", "trunk_gb": 4.0, "save_every": 50, "resume": True}
    return replace(settings, **same) == replace(PROFILES["mini"], **same)  # type: ignore[arg-type]
