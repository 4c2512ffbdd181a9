"""What an exercise is: a function or a value to produce, the right answer, and the wrong ones that people give.

A wrong answer is written down as code too. It is recognised by what it computes: if the learner's function gives, on
every case, what the function with a known mistake gives, then that mistake is named, with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CourseError
from ..untrusted import one_line

SHOWN = 160  # characters of a value in a message


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: its name, why it is wrong, and the answer itself (a value, or a function of the same cases)."""

    name: str
    reason: str
    answer: Any


@dataclass(frozen=True)
class Exercise:
    """One exercise: number ("2.1"), title, difficulty (1 to 3), minutes, the right answer, and known wrong ones.

    solution: a value, or a function. cases: gives the arguments of each call of a function; None for a value.
    tolerance: absolute and relative, for numbers.
    """

    number: str
    title: str
    difficulty: int
    minutes: int
    solution: Any
    mistakes: tuple[Mistake, ...]
    cases: Callable[[], Sequence[tuple[Any, ...]]] | None = None
    tolerance: float = 1e-4

    def heading(self) -> str:
        """The two lines with which a notebook announces it."""
        dots = "●" * self.difficulty + "○" * (3 - self.difficulty)
        minutes = f"{self.minutes} minute{'s' * (self.minutes != 1)}"
        return f"### Exercise {self.number} · {self.title}\n\n*Difficulty {dots} · {minutes}*"

    def judge(self, answer: Any) -> str:
        """The verdict on an answer: "right", "not answered yet", or what is wrong, expected and got."""
        if answer is None or answer is ... or isinstance(answer, type(NotImplemented)):
            return "not answered yet"
        if self.cases is None:
            return self._compare([("", self.solution)], [answer], [[m.answer] for m in self.mistakes])
        if not callable(answer):
            return f"expected a function, got {show(answer)}; give the function itself, without calling it"
        cases = list(self.cases())
        try:
            got = [answer(*deepcopy(case)) for case in cases]
        except NotImplementedError:
            return "not answered yet"
        except Exception as error:  # whatever a learner's code leads to
            return f"your function raised {type(error).__name__}: {error}"
        if all(value is None or value is ... for value in got):
            return "not answered yet: your function returns nothing"
        expected = [(_arguments(case), self.solution(*deepcopy(case))) for case in cases]
        wrong = [[m.answer(*deepcopy(case)) for case in cases] for m in self.mistakes]
        return self._compare(expected, got, wrong)

    def _compare(self, expected: list[tuple[str, Any]], got: list[Any], wrong: list[list[Any]]) -> str:
        differing = [(e, g) for e, g in zip(expected, got, strict=True) if not same(e[1], g, self.tolerance)]
        if not differing:
            return "right"
        (where, want), value = differing[0]
        seen = [
            m for m, answers in zip(self.mistakes, wrong, strict=True)
            if all(same(a, g, self.tolerance) for a, g in zip(answers, got, strict=True))
        ]  # fmt: skip
        why = f"{seen[0].name}: {seen[0].reason}" if seen else _hint(want, value)
        lines = ["not yet", why, f"expected {show(want)}", f"got      {show(value)}", where and f"for      {where}"]
        return "\n  ".join(line for line in lines if line)


def same(want: Any, got: Any, tolerance: float = 1e-4) -> bool:
    """Whether two answers are equal: numbers and tensors within the tolerance, everything else exactly."""
    if isinstance(want, Tensor) or isinstance(got, Tensor):
        try:
            a, b = (torch.as_tensor(x).detach().double() for x in (want, got))
        except (TypeError, ValueError, RuntimeError):
            return False
        return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    if isinstance(want, bool) or isinstance(got, bool) or isinstance(want, str) or isinstance(got, str):
        return type(want) is type(got) and want == got
    if isinstance(want, Mapping) and isinstance(got, Mapping):
        return want.keys() == got.keys() and all(same(want[key], got[key], tolerance) for key in want)
    if isinstance(want, Sequence) and isinstance(got, Sequence):
        return len(want) == len(got) and all(same(a, b, tolerance) for a, b in zip(want, got, strict=True))
    try:
        return math.isclose(want, got, rel_tol=tolerance, abs_tol=tolerance)
    except TypeError:
        return bool(want == got)


def show(value: Any) -> str:
    """A value in a message: numbers rounded, tensors as lists with their shape, on one line, shortened."""
    if isinstance(value, Tensor):
        text = f"{show(value.tolist())} (shape {list(value.shape)})"
    elif isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, (list, tuple)):
        left, right = "[]" if isinstance(value, list) else "()"
        text = left + ", ".join(map(show, value)) + right
    else:
        text = repr(value)
    text = one_line(text)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _arguments(case: tuple[Any, ...]) -> str:
    plain = [show(value) for value in case if isinstance(value, (str, int, float, Tensor, list, tuple))]
    text = ", ".join(plain)
    return text if plain and len(text) <= SHOWN else ""


def _hint(want: Any, got: Any) -> str:
    """What can be said of an answer that matches no known mistake: its shape, its sign, or nothing."""
    if isinstance(want, Tensor) and (not isinstance(got, Tensor) or got.shape != want.shape):
        shape = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        return f"The shape should be {list(want.shape)}, and is {shape}"
    numbers = (int, float, Tensor)
    if isinstance(want, numbers) and isinstance(got, numbers) and not isinstance(want, bool):
        return "The sign is the other way round" if not same(want, 0.0) and same(want, -got) else ""
    return "" if type(want) is type(got) else f"The type should be {type(want).__name__}, and is {type(got).__name__}"


def find(exercises: Mapping[str, Exercise], number: str) -> Exercise:
    """The exercise of that number; CourseError, which lists the numbers, if there is none."""
    if number not in exercises:
        raise CourseError(f"there is no exercise {number!r}; there are {', '.join(exercises)}")
    return exercises[number]
