"""The exercises of the course: `exercises.check("2.1", my_function)` says whether it is right, or what went wrong.

24 exercises, a module a notebook. Each knows typical wrong answers and says which one it sees, and why it is wrong.
"""

from __future__ import annotations

from typing import Any

from . import beta, data, loss, reference, sft, text, training
from .core import Exercise, Mistake, find
from .faults import FAULTS, judge_fault

__all__ = ["EXERCISES", "FAULTS", "Exercise", "Mistake", "check", "check_fault"]

EXERCISES: dict[str, Exercise] = {
    exercise.number: exercise
    for module in (data, reference, sft, loss, training, beta, text)
    for exercise in module.EXERCISES
}


def check(number: str, answer: Any) -> None:
    """Print the verdict on an answer: one line, never an exception for what the answer does.

    answer: a value, or a function of the arguments that the exercise names. CourseError if there is no such exercise.
    """
    print(f"exercise {number}: {find(EXERCISES, number).judge(answer)}")


def check_fault(run: str, guess: Any) -> None:
    """Print the verdict on a guess which fault a run of `dpo_helpers.faulty` has: a name of FAULTS, for "A" to "F"."""
    print(f"run {run}: {judge_fault(run, guess)}")
