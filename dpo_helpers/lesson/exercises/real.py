"""Exercises of beyond/d_real_models_and_data: what is scored behind a template, what LoRA trains, a win rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .core import Exercise, Mistake

Points = dict[str, float]
POINTS = {"first": 1.0, "tie": 0.5, "second": 0.0}


def _scored(ids: list[int], prompt_length: int, end: int) -> list[bool]:
    last = ids.index(end, prompt_length)
    return [prompt_length <= i <= last for i in range(len(ids))]


def _between(begin: Callable[..., int], stop: Callable[..., int]) -> Callable[..., list[bool]]:
    """Scored from begin(…) up to, without, stop(…); both of (ids, prompt_length, place of the end of turn)."""

    def wrong(ids: list[int], prompt_length: int, end: int) -> list[bool]:
        given = ids, prompt_length, ids.index(end, prompt_length)
        return [begin(*given) <= i < stop(*given) for i in range(len(ids))]

    return wrong


def _first_end(ids: list[int], prompt_length: int, end: int) -> list[bool]:
    return [prompt_length <= i <= ids.index(end) for i in range(len(ids))]


def _by_id(ids: list[int], prompt_length: int, end: int) -> list[bool]:
    last = ids.index(end, prompt_length)
    return [prompt_length <= i <= last and token != end for i, token in enumerate(ids)]


def _conversations() -> list[tuple[list[int], int, int]]:
    """Ids, length of the prompt, id of the end of turn: 7 begins a turn, 8 ends one, 9 is a line break."""
    return [
        ([7, 1, 9, 3, 4, 8, 9, 7, 2, 9, 5, 6, 8, 9], 10, 8),
        ([7, 1, 9, 3, 8, 9, 7, 2, 9, 4, 8, 9, 7, 1, 9, 3, 8, 9, 7, 2, 9, 5, 8], 21, 8),
        ([7, 1, 9, 7, 2, 9, 5, 6, 7, 8, 9, 9], 6, 8),
    ]


def _lora(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes)


def _each(count: Callable[[int, int, int], float]) -> Callable[..., float]:
    """Another count of a matrix: count(inputs, outputs, rank)."""
    return lambda shapes, rank: sum(count(inputs, outputs, rank) for inputs, outputs in shapes)


def _shapes() -> list[tuple[list[tuple[int, int]], int]]:
    return [([(128, 384), (128, 128), (128, 512), (512, 128)], 8), ([(768, 2304)], 4), ([(3, 5), (5, 2)], 2)]


def _swapped(a_first: Sequence[str], a_second: Sequence[str]) -> float:
    return sum(POINTS[x] + 1 - POINTS[y] for x, y in zip(a_first, a_second, strict=True)) / (2 * len(a_first))


def _with(points: Points) -> Callable[..., float]:
    """The right way with other points for a verdict."""

    def wrong(a_first: Sequence[str], a_second: Sequence[str]) -> float:
        other = {"first": points["second"], "tie": points["tie"], "second": points["first"]}
        return sum(points[x] + other[y] for x, y in zip(a_first, a_second, strict=True)) / (2 * len(a_first))

    return wrong


def _without_ties(a_first: Sequence[str], a_second: Sequence[str]) -> float:
    of_a = [POINTS[x] for x in a_first if x != "tie"] + [1 - POINTS[y] for y in a_second if y != "tie"]
    return sum(of_a) / len(of_a)


def _agreeing(a_first: Sequence[str], a_second: Sequence[str]) -> float:
    of_a = [POINTS[x] for x, y in zip(a_first, a_second, strict=True) if POINTS[x] == 1 - POINTS[y]]
    return sum(of_a) / len(of_a)


def _both(a_first: Sequence[str], a_second: Sequence[str]) -> float:
    return sum((x, y) == ("first", "second") for x, y in zip(a_first, a_second, strict=True)) / len(a_first)


def _zheng(a_first: Sequence[str], a_second: Sequence[str]) -> float:
    """Won if both orders say so, lost if both do, else a tie (Zheng et al. 2023, section 3.4)."""
    of_a = [1.0 if (x, y) == ("first", "second") else 0.0 if (x, y) == ("second", "first") else 0.5
            for x, y in zip(a_first, a_second, strict=True)]  # fmt: skip
    return sum(of_a) / len(of_a)


def _by_majority(a_first: Sequence[str], a_second: Sequence[str]) -> float:
    of_a = [POINTS[x] + 1 - POINTS[y] for x, y in zip(a_first, a_second, strict=True)]
    return sum((points > 1) + 0.5 * (points == 1) for points in of_a) / len(of_a)


def _agreeing_without_ties(a_first: Sequence[str], a_second: Sequence[str]) -> float:
    of_a = [x == "first" for x, y in zip(a_first, a_second, strict=True) if {x, y} == {"first", "second"}]
    return sum(of_a) / len(of_a)


def _verdicts() -> list[tuple[list[str], list[str]]]:
    return [
        (["first", "first", "second", "tie", "first"], ["second", "first", "second", "first", "tie"]),
        (["first", "first", "tie", "second"], ["second", "second", "second", "first"]),
        (["second", "tie", "second", "first", "first", "second"], ["first", "tie", "first", "first", "second", "tie"]),
    ]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        "d.1", "What is scored of a rendered dialogue", 2, 6, _scored,
        (
            Mistake("The end of turn is not scored",
                    "a model that is never scored on ending its turn does not learn to end it: its answers go on",
                    _between(lambda ids, n, last: n, lambda ids, n, last: last), (_by_id,)),
            Mistake("What follows the end of turn is scored",
                    "the template writes the line break, not the model: sampling stops at the end of turn",
                    _between(lambda ids, n, last: n, lambda ids, n, last: len(ids)),
                    (_between(lambda ids, n, last: n, lambda ids, n, last: last + 2),)),
            Mistake("An earlier turn's end is taken for the answer's",
                    "user turns end with the same token: look for it behind the prompt", _first_end),
            Mistake("The place of the end is counted from the answer's start",
                    "ids[prompt_length:].index(end) begins to count at prompt_length: add it, or use "
                    "ids.index(end, prompt_length)",
                    lambda ids, n, end: [n <= i <= ids[n:].index(end) for i in range(len(ids))]),
            Mistake("One token of the prompt is scored",
                    "the prompt is ids 0 to prompt_length − 1, with the header that opens the answer",
                    _between(lambda ids, n, last: n - 1, lambda ids, n, last: last + 1)),
            Mistake("The first token of the answer is not scored",
                    "it is at position prompt_length, counted from 0",
                    _between(lambda ids, n, last: n + 1, lambda ids, n, last: last + 1)),
            Mistake("The prompt is scored too",
                    "DPO scores responses; the prompt is given, and the same on both sides",
                    _between(lambda ids, n, last: 0, lambda ids, n, last: last + 1),
                    (lambda ids, n, end: [True] * len(ids),)),
            Mistake("The prompt is scored, and the answer is not",
                    "True is for what is scored: the answer and its end of turn",
                    _between(lambda ids, n, last: 0, lambda ids, n, last: n)),
        ),
        cases=_conversations,
    ),
    Exercise(
        "d.2", "What LoRA trains", 1, 4, _lora,
        (
            Mistake("That is a full matrix",
                    "LoRA leaves it frozen, and trains two thin ones beside it: A [r, d_in] and B [d_out, r]",
                    _each(lambda inputs, outputs, rank: inputs * outputs)),
            Mistake("That is r full matrices",
                    "B·A is as large as the full matrix, but what trains are its factors: their sizes add up",
                    _each(lambda inputs, outputs, rank: rank * inputs * outputs)),
            Mistake("Only A is counted",
                    "B trains too: d_out rows of r", _each(lambda inputs, outputs, rank: rank * inputs)),
            Mistake("Only B is counted",
                    "A trains too: r rows of d_in", _each(lambda inputs, outputs, rank: rank * outputs)),
            Mistake("The full matrix is in it",
                    "it is there, but frozen: count A and B alone",
                    _each(lambda inputs, outputs, rank: inputs * outputs + rank * (inputs + outputs))),
            Mistake("There is a matrix of r by r in it",
                    "B·A has two factors and nothing between them",
                    _each(lambda inputs, outputs, rank: rank * (inputs + outputs) + rank**2)),
            Mistake("r is counted once",
                    "A has r rows and B r columns, so both sizes are multiplied by r",
                    _each(lambda inputs, outputs, rank: rank + inputs + outputs),
                    (_each(lambda inputs, outputs, rank: inputs + outputs),
                     _each(lambda inputs, outputs, rank: rank * inputs + outputs),
                     _each(lambda inputs, outputs, rank: inputs + rank * outputs))),
            Mistake("Only one matrix is counted",
                    "add up over all of them", lambda shapes, rank: rank * sum(shapes[0]),
                    (lambda shapes, rank: rank * sum(shapes[-1]),)),
            Mistake("A list is returned",
                    "asked for is their sum", lambda shapes, rank: [rank * sum(shape) for shape in shapes]),
        ),
        cases=_shapes,
    ),
    Exercise(
        "d.3", "A win rate from both orders", 2, 6, _swapped,
        (
            Mistake("The second order is not turned round",
                    "there A is read second, so “first” is a win of the other model",
                    lambda a_first, a_second: sum(POINTS[x] + POINTS[y] for x, y in zip(a_first, a_second, strict=True))
                    / (2 * len(a_first))),
            Mistake("That is the win rate of the other model",
                    "“first” is a win of A where A is read first",
                    lambda a_first, a_second: 1 - _swapped(a_first, a_second)),
            Mistake("Ties count as lost",
                    "a tie is half a win, or the two models' win rates would not add up to 1",
                    _with({"first": 1.0, "tie": 0.0, "second": 0.0})),
            Mistake("Ties count as won",
                    "a tie is half a win, or both models could win more than half",
                    _with({"first": 1.0, "tie": 1.0, "second": 0.0})),
            Mistake("Ties are left out",
                    "the prompts where the judge sees no difference belong to the answer, as half wins",
                    _without_ties),
            Mistake("Only prompts where both orders agree",
                    "where the judge contradicts itself it prefers nobody: that is half a win, not a missing prompt",
                    _agreeing, (_agreeing_without_ties,)),
            Mistake("A prompt is won only if both orders say so",
                    "that is the rule of Zheng et al.; here each verdict counts by itself, so a win and a tie are ¾",
                    _zheng, (_by_majority,)),
            Mistake("Only what is won in both orders counts",
                    "one win of two is half a win", _both),
            Mistake("Only one order is used",
                    "one order alone holds the whole preference for a place; the mean of both holds none of it",
                    lambda a_first, a_second: sum(POINTS[x] for x in a_first) / len(a_first),
                    (lambda a_first, a_second: 1 - sum(POINTS[y] for y in a_second) / len(a_second),)),
            Mistake("That is a number of wins",
                    "the rate is their share: divide by the number of prompts",
                    lambda a_first, a_second: len(a_first) * _swapped(a_first, a_second),
                    (lambda a_first, a_second: 2 * len(a_first) * _swapped(a_first, a_second),)),
        ),
        cases=_verdicts,
    ),
)  # fmt: skip
