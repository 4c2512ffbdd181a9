"""The exercises of the course: `exercises.check("2.1", my_function)` says whether it is right, or what went wrong.

Each exercise knows typical wrong answers and says which one it sees, and why it is wrong. `Exercise.judge` gives
the verdict as a value, with its kind.
"""

from __future__ import annotations

from typing import Any

from . import (
    beta,
    beyond,
    data,
    frozen,
    kl,
    loss,
    pairs,
    real,
    reference,
    rlhf,
    rows,
    sft,
    steps,
    text,
    weights,
    wins,
)  # fmt: skip
from .core import Exercise, Mistake, Verdict, find
from .faults import FAULTS, judge_fault

__all__ = ["EXERCISES", "FAULTS", "Exercise", "Mistake", "Verdict", "check", "check_fault"]

_IN_ORDER = (
    data, rows, reference, frozen, sft, loss, weights, pairs, kl, steps, beta, text, wins, beyond, rlhf, real,
)  # fmt: skip
EXERCISES: dict[str, Exercise] = {exercise.number: exercise for module in _IN_ORDER for exercise in module.EXERCISES}


def check(number: str, answer: Any) -> None:
    """Print the verdict on an answer; never an exception for what the answer is or does, and within seconds.

    answer: a value, or a function of the arguments that the exercise names. CourseError if there is no such exercise.
    """
    print(f"exercise {number}: {find(EXERCISES, number).judge(answer).text}")


def check_fault(run: str, guess: Any) -> None:
    """Print the verdict on a guess which fault a run of `lesson.faulty` has: a name of FAULTS, for "A" to "F"."""
    print(f"run {run}: {judge_fault(run, guess).text}")
