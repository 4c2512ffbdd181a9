"""What an exercise is: a function or a value to produce, the right answer, and the wrong ones that people give.

A wrong answer is written down as code too. It is recognised by what it computes: if the learner's function gives, on
every case, what the function with a known mistake gives, then that mistake is named, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import CourseError
from .hints import hint, relation
from .running import TOO_SLOW, limited, raised, safely_shown
from .values import SHOWN, Raised, first_difference, plain, same, show, show_both

Case = tuple[Any, ...]
Kind = Literal["right", "wrong", "unanswered", "error", "too slow"]


@dataclass(frozen=True)
class Verdict:
    """What is said of an answer. text: for the learner; mistake: the name of the known mistake that was recognised."""

    kind: Kind
    text: str
    mistake: str | None = None


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: its name, why it is wrong, and the answer itself (a value, or a function of the same cases).

    variants: other answers of which the same is to be said.
    """

    name: str
    reason: str
    answer: Any
    variants: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Outcome:
    """What an answer gives in one case, as plain values, and whether it changed its arguments."""

    value: Any
    changed: bool = False


@dataclass(frozen=True)
class Exercise:
    """One exercise: number ("2.1"), title, difficulty (1 to 3), minutes, the right answer, and known wrong ones.

    solution: a value, or a function. cases: gives the arguments of each call of a function; None for a value.
    tolerance: absolute and relative, for numbers. observe: for a function that is judged by what it does and not only
    by what it returns; it gets the function and a case, runs it, and returns all that is compared. seconds: how long
    an answer may take for all cases.
    """

    number: str
    title: str
    difficulty: int
    minutes: int
    solution: Any
    mistakes: tuple[Mistake, ...]
    cases: Callable[[], Sequence[Case]] | None = None
    tolerance: float = 1e-4
    observe: Callable[..., Any] | None = None
    seconds: float = 5.0
    _known: dict[tuple[int, int], Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def heading(self) -> str:
        """The two lines with which a notebook announces it."""
        dots = "●" * self.difficulty + "○" * (3 - self.difficulty)
        minutes = f"{self.minutes} minute{'s' * (self.minutes != 1)}"
        return f"### Exercise {self.number} · {self.title}\n\n*Difficulty {dots} · {minutes}*"

    def judge(self, answer: Any) -> Verdict:
        """The verdict on an answer, whatever it is or does; never an exception, and soon."""
        if answer is None or answer is ... or answer is NotImplemented:
            return Verdict("unanswered", "not answered yet")
        if self.cases is not None and not callable(answer):
            text = f"expected a function, got {safely_shown(answer)}; give the function itself, without calling it"
            return Verdict("wrong", text)
        cases = [()] if self.cases is None else list(self.cases())
        wanted = [self._outcome(self.solution, case).value for case in cases]
        outcomes = limited(lambda: [self._outcome(answer, case) for case in cases], self.seconds)
        if outcomes is TOO_SLOW:
            return Verdict("too slow", f"no end after {self.seconds:g} seconds: is there a loop that never stops?")
        if isinstance(outcomes, Raised):  # SystemExit and its like, which no case holds
            return _error(outcomes)
        got = [outcome.value for outcome in outcomes]
        if any(isinstance(value, Raised) and value.type == "NotImplementedError" for value in got):
            return Verdict("unanswered", "not answered yet")
        if all(map(self._same, wanted, got)):
            return Verdict("right", "\n  ".join(["right", *_remarks(wanted, outcomes)]))
        return self._wrong(cases, wanted, got)

    def _outcome(self, answer: Any, case: Case) -> _Outcome:
        """What an answer gives in a case; with gradients on, and without an effect on later random numbers."""
        if self.cases is None:
            return _Outcome(plain(answer))
        arguments = deepcopy(case)
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            try:
                value = self.observe(answer, *arguments) if self.observe else answer(*arguments)
            except Exception as error:  # whatever a learner's code leads to
                return _Outcome(raised(error, answer))
        return _Outcome(plain(value), not same(plain(case), plain(arguments), 0.0))

    def _same(self, want: Any, got: Any) -> bool:
        return same(want, got, self.tolerance)

    def _wrong(self, cases: list[Case], wanted: list[Any], got: list[Any]) -> Verdict:
        mistake, why = self._recognised(cases, got)
        failed = [value for value in got if isinstance(value, Raised)]
        if not mistake and failed:
            return _error(failed[0])
        if not mistake and self._gives(_nothing, cases, got):
            return Verdict("unanswered", "not answered yet: your function returns nothing")
        at = next(i for i, want in enumerate(wanted) if not self._same(want, got[i]))
        where, want, value = first_difference(wanted[at], got[at], self.tolerance)
        why = why or relation(wanted, got, self.tolerance) or hint(want, value, self.tolerance)
        expected, shown = show_both(want, value, self.tolerance)
        where = where if self.observe else _arguments(cases[at])
        lines = ["not yet", why, f"expected {expected}", f"got      {shown}", where and f"for      {where}"]
        return Verdict("wrong", "\n  ".join(line for line in lines if line), mistake)

    def _recognised(self, cases: list[Case], got: list[Any]) -> tuple[str | None, str]:
        """Name and text of the known mistake that gives just this, or just this with the other sign."""
        signs = [(got, ""), ([_negative(value) for value in got], "; and the sign is the other way round")]
        for answers, tail in signs[: 1 if self.observe else 2]:
            for mistake in self.mistakes:
                for answer in (mistake.answer, *mistake.variants):
                    if self._gives(answer, cases, answers):
                        return mistake.name, f"{mistake.name}: {mistake.reason}{tail}"
        return None, ""

    def _gives(self, answer: Any, cases: Iterable[Case], got: Iterable[Any]) -> bool:
        """Whether an answer of ours gives just this; cases are run one by one, until one differs, and once for all."""
        for number, (case, value) in enumerate(zip(cases, got, strict=True)):
            key = id(answer), number
            if key not in self._known:
                self._known[key] = self._outcome(answer, case).value
            if not self._same(self._known[key], value):
                return False
        return True


def _nothing(*_: Any) -> None:
    """The answer that a learner starts from."""


def _negative(value: Any) -> Any:
    """Minus a number, a tensor or a list of numbers; what has no sign becomes what no answer gives."""
    if isinstance(value, Tensor) and value.dtype != torch.bool:
        return -value
    if isinstance(value, (list, tuple)):
        return [_negative(item) for item in value]
    return -value if isinstance(value, (int, float)) and not isinstance(value, bool) else object()


def _error(error: Raised) -> Verdict:
    text = f"your function raised {error.type}: {error.text}".rstrip(": ")
    return Verdict("error", text if not error.line else f"{text}\n  in       {error.line}")


def _remarks(wanted: list[Any], outcomes: list[_Outcome]) -> list[str]:
    """What a right answer should know nevertheless."""
    remarks = []
    tensors = [outcome.value for want, outcome in zip(wanted, outcomes, strict=True) if isinstance(want, Tensor)]
    if not all(isinstance(value, Tensor) for value in tensors):
        remarks.append("but a tensor is asked for: torch.tensor(…) or torch.stack(…) makes one")
    if any(outcome.changed for outcome in outcomes):
        remarks.append("but your function changes what it is given; whoever called it goes on with other values")
    return remarks


def _arguments(case: Case) -> str:
    given = ", ".join(show(value) for value in case if isinstance(value, (str, int, float, Tensor, list, tuple)))
    return given if len(given) <= SHOWN else ""


def find(exercises: Mapping[str, Exercise], number: str) -> Exercise:
    """The exercise of that number; CourseError, which lists the numbers, if there is none."""
    if number not in exercises:
        raise CourseError(f"there is no exercise {number!r}; there are {', '.join(exercises)}")
    return exercises[number]
