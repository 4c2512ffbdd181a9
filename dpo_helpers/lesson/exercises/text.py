"""Exercises of notebook 7: variety of texts, and win rates."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from .core import Exercise, Mistake

# 7.1

Gram = tuple[str, ...]


def _grams(words: Sequence[str], n: int) -> list[Gram]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _distinct(
    texts: Sequence[str],
    n: int,
    *,
    words: Callable[[str], Sequence[str]] = str.split,
    grams: Callable[[Sequence[str], int], list[Gram]] = _grams,
    key: Callable[[Gram], Any] = tuple,
) -> float:
    """The keywords are what people do instead: other words, other groups, or others that count as the same."""
    found = [key(gram) for text in texts for gram in grams(words(text), n)]
    return len(set(found)) / len(found)


def _of_all(texts: Sequence[str], n: int) -> list[Gram]:
    return [gram for text in texts for gram in _grams(text.split(), n)]


def _slip(**how: Any) -> Callable[[Sequence[str], int], float]:
    return lambda texts, n: _distinct(texts, n, **how)


def _per(divisor: Callable[[Sequence[str], int], float]) -> Callable[[Sequence[str], int], float]:
    """The number of different groups over something else."""
    return lambda texts, n: len(set(_of_all(texts, n))) / divisor(texts, n)


def _mean_of_texts(texts: Sequence[str], n: int) -> float:
    counted = [text for text in texts if _grams(text.split(), n)]
    return sum(_distinct([text], n) for text in counted) / len(counted)


def _once(texts: Sequence[str], n: int) -> float:
    grams = _of_all(texts, n)
    return sum(grams.count(gram) == 1 for gram in grams) / len(grams)


def _texts() -> list[tuple[list[str], int]]:
    """Repetition within a text and between two; case and punctuation; order; short texts; groups of one word."""
    return [
        (["a b a b c", "a b d"], 2),
        (["I see. I see! Yes, I see", "It is. it is. I do"], 2),
        (["a b c a b c", "d e"], 3),
        (["a b c d a b", "b a", "c b a  b", "no where now here"], 2),
        (["no no\nyes", "yes"], 1),
    ]


# 7.2


def _points(first: Tensor, second: Tensor) -> Tensor:
    return (first > second).double() + 0.5 * (first == second).double()  # [n]


def _mean_and_error(points: Tensor) -> tuple[float, float]:
    return points.double().mean().item(), points.double().std().item() / sqrt(len(points))


def _win_rate(first: Tensor, second: Tensor) -> tuple[float, float]:
    return _mean_and_error(_points(first, second))


def _error(change: Callable[[float, int, float], float]) -> Callable[[Tensor, Tensor], tuple[float, float]]:
    """Another standard error, made of the right one, n, and the win rate."""

    def wrong(first: Tensor, second: Tensor) -> tuple[float, float]:
        rate, error = _win_rate(first, second)
        return rate, change(error, len(first), rate)

    return wrong


def _everyone(first: Tensor, second: Tensor) -> tuple[float, float]:
    return _mean_and_error(_points(first[:, None], second[None]).flatten())


def _interval(first: Tensor, second: Tensor, factor: float = 2.0) -> tuple[float, float]:
    rate, error = _win_rate(first, second)
    return rate - factor * error, rate + factor * error


def _answers() -> list[tuple[Tensor, Tensor]]:
    first = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, -1.0])
    return [
        (first, torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0, -1.0])),
        (first[:3], torch.tensor([0.0, 2.0, 2.0])),
        (torch.tensor([0.501, 2.0, -3.0, 0.0]), torch.tensor([0.5, 2.001, -4.0, 0.0])),
    ]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        "7.1", "distinct-n", 1, 5, _distinct,
        (
            Mistake("A mean over the texts",
                    "count over all texts at once: a text may be varied and still say what every other one says",
                    lambda texts, n: sum(_distinct([text], n) for text in texts) / len(texts), (_mean_of_texts,)),
            Mistake("n-grams run across two texts",
                    "the last word of a text and the first of the next were never written beside each other",
                    lambda texts, n: _distinct([" ".join(texts)], n),
                    (lambda texts, n: _distinct(["".join(texts)], n),)),
            Mistake("The last n-gram of each text is missing",
                    "a text of m words has m − n + 1 of them: the last one starts at m − n, and range stops "
                    "before its end",
                    _slip(grams=lambda words, n: _grams(words, n)[:-1])),
            Mistake("Groups that are too short",
                    "a text of m words has m − n + 1 groups of n; behind these, fewer than n words are left",
                    _slip(grams=lambda words, n: [tuple(words[i : i + n]) for i in range(len(words))]),
                    (_slip(grams=lambda words, n: [tuple(words[i : i + n]) for i in range(len(words) - n + 2)]),
                     _slip(grams=lambda words, n: [tuple(words[i : i + n]) for i in range(len(words) - 1)]))),
            Mistake("The words of a group are glued together",
                    "“no where” and “now here” would be the same group: keep the words apart, in a tuple",
                    _slip(key="".join)),
            Mistake("The groups have a word too many or too few",
                    "words[i : i + n] has n words: the end of a slice is left out",
                    lambda texts, n: _distinct(texts, n + 1), (lambda texts, n: _distinct(texts, max(1, n - 1)),)),
            Mistake("The groups do not overlap",
                    "every word starts a group, as long as n words are left: go on by one word, not by n",
                    _slip(grams=lambda words, n: _grams(words, n)[::n])),
            Mistake("Upper and lower case count as the same",
                    "here words count as they are written",
                    _slip(words=lambda text: text.lower().split())),
            Mistake("Punctuation is taken off",
                    "words are what text.split() gives, “see.” with its full stop",
                    _slip(words=re.compile(r"\w+").findall),
                    (_slip(words=lambda text: re.findall(r"\w+", text.lower())),
                     _slip(words=re.compile(r"\w+|[^\w\s]").findall))),
            Mistake("Words are split at single spaces",
                    "between two spaces that is an empty word, and a line break is none: split() takes all white space",
                    _slip(words=lambda text: text.split(" "))),
            Mistake("The order in a group is lost",
                    "“a b” and “b a” are two different groups: tuples keep the order, sets and sorting lose it",
                    _slip(key=frozenset), (_slip(key=lambda gram: tuple(sorted(gram))),)),
            Mistake("You divided by the number of words",
                    "divide by the number of n-grams, so that texts without any repetition get 1",
                    _per(lambda texts, n: sum(len(text.split()) for text in texts)),
                    (_per(lambda texts, n: len({word for text in texts for word in text.split()})),
                     _per(lambda texts, n: sum(map(len, texts))))),
            Mistake("You divided by the number of texts",
                    "divide by the number of n-grams, so that texts without any repetition get 1",
                    _per(lambda texts, n: len(texts))),
            Mistake("Groups of characters, not of words",
                    "split each text into words first",
                    _slip(words=list)),
            Mistake("You counted those that occur once",
                    "an n-gram that occurs three times is one different n-gram, not none",
                    _once, (lambda texts, n: _once(texts, n) * len(_of_all(texts, n)) / len(set(_of_all(texts, n))),)),
            Mistake("That is the share of repetitions",
                    "asked for is the share of different ones, 1 minus that",
                    lambda texts, n: 1 - _distinct(texts, n), (lambda texts, n: 1 - _once(texts, n),)),
            Mistake("A number, not a share",
                    "divide by how many n-grams there are, or longer texts look more varied",
                    _per(lambda texts, n: 1), (lambda texts, n: len(_of_all(texts, n)),)),
        ),
        cases=_texts,
    ),
    Exercise(
        "7.2", "Win rate with its standard error", 2, 8, _win_rate,
        (
            Mistake("Ties count as lost",
                    "a tie is half a win, or the two models' win rates would not add up to 1",
                    lambda first, second: _mean_and_error(first > second)),
            Mistake("Ties count as won",
                    "a tie is half a win, or both models could win more than half",
                    lambda first, second: _mean_and_error(first >= second)),
            Mistake("Ties are left out",
                    "a model that changes nothing would then be judged by the few prompts where it does",
                    lambda first, second: _mean_and_error((first > second)[first != second])),
            Mistake("What nearly ties is counted as tied",
                    "a tie is two equal rewards; a small difference is still a win",
                    lambda first, second: _mean_and_error(_points((first * 100).round(), (second * 100).round())),
                    (lambda first, second: _mean_and_error(_points(first.round(), second.round())),)),
            Mistake("Lost is −1",
                    "a win rate is a share: 1 for a win, ½ for a tie, 0 for a loss",
                    lambda first, second: _mean_and_error((first - second).sign()),
                    (lambda first, second: _mean_and_error(_points(first, second) - (first < second).double()),)),
            Mistake("That is a number of wins",
                    "the rate is their share: divide by the number of prompts",
                    lambda first, second: (_points(first, second).sum().item(), _win_rate(first, second)[1])),
            Mistake("Every answer against every other one",
                    "compare the two answers to the same prompt: what makes a prompt hard then cancels",
                    _everyone),
            Mistake("That is the difference of the rewards",
                    "a win rate asks only who is better, not by how much",
                    lambda first, second: _mean_and_error(first - second)),
            Mistake("That is the other model's win rate",
                    "asked for is how often the first one wins",
                    lambda first, second: _win_rate(second, first)),
            Mistake("The order is another one",
                    "the win rate first, then its standard error",
                    lambda first, second: _win_rate(first, second)[::-1]),
            Mistake("The standard deviation divides by n",
                    "of a sample it divides by n − 1, as torch's std does, for its mean was taken from the sample too",
                    _error(lambda error, n, rate: error * sqrt((n - 1) / n))),
            Mistake("That is the standard deviation",
                    "of single prompts; the mean of n of them scatters √n times less",
                    _error(lambda error, n, rate: error * sqrt(n)),
                    (_error(lambda error, n, rate: error * sqrt(n - 1)),)),
            Mistake("You divided by n, not by √n",
                    "variances divide by n, so standard deviations divide by √n",
                    _error(lambda error, n, rate: error / sqrt(n)),
                    (_error(lambda error, n, rate: error / sqrt(n) * sqrt((n - 1) / n)),)),
            Mistake("You divided by √(n − 1)",
                    "std has its n − 1 already; its mean over n prompts scatters √n times less",
                    _error(lambda error, n, rate: error * sqrt(n / (n - 1))),
                    (_error(lambda error, n, rate: error * sqrt(n) / (n - 1)),)),
            Mistake("That is a variance",
                    "its root is the standard error, in the unit of a share",
                    _error(lambda error, n, rate: error**2),
                    (_error(lambda error, n, rate: error**2 * n), _error(lambda error, n, rate: error**2 * sqrt(n)))),
            Mistake("Those are two standard errors",
                    "that is half the width of a 95 % interval; asked for is one",
                    _error(lambda error, n, rate: 2 * error), (_error(lambda error, n, rate: 1.96 * error),)),
            Mistake("That is an interval",
                    "asked for are its middle and one standard error, half of half its width",
                    _interval, (lambda first, second: _interval(first, second, 1.0),
                                lambda first, second: _interval(first, second, 1.96))),
            Mistake("The formula for wins and losses only",
                    "√(p(1 − p)/n) takes every prompt for won or lost; ties at ½ scatter less, so use the points' own "
                    "standard deviation",
                    _error(lambda error, n, rate: sqrt(rate * (1 - rate) / n)),
                    (_error(lambda error, n, rate: sqrt(rate * (1 - rate))),
                     _error(lambda error, n, rate: sqrt(rate * (1 - rate) / (n - 1))))),
            Mistake("Two numbers are asked for",
                    "return the win rate and its standard error",
                    lambda first, second: _win_rate(first, second)[0],
                    (lambda first, second: _win_rate(first, second)[1],)),
        ),
        cases=_answers,
    ),
)  # fmt: skip
