"""Exercises of notebook 7: variety of texts, loops, and win rates."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from .core import Exercise, Mistake

Gram = tuple[str, ...]


def _grams(words: Sequence[str], n: int) -> list[Gram]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _of_all(texts: Sequence[str], n: int) -> list[Gram]:
    return [gram for text in texts for gram in _grams(text.split(), n)]


def _distinct(texts: Sequence[str], n: int) -> float:
    grams = _of_all(texts, n)
    return len(set(grams)) / len(grams)


def _distinct_of_each(texts: Sequence[str], n: int) -> float:
    return sum(_distinct([text], n) for text in texts) / len(texts)


def _distinct_joined(texts: Sequence[str], n: int) -> float:
    return _distinct([" ".join(texts)], n)


def _distinct_a_word(texts: Sequence[str], n: int) -> float:
    return len(set(_of_all(texts, n))) / sum(len(text.split()) for text in texts)


def _distinct_characters(texts: Sequence[str], n: int) -> float:
    grams = [gram for text in texts for gram in _grams(list(text), n)]
    return len(set(grams)) / len(grams)


def _never_repeated(texts: Sequence[str], n: int) -> float:
    grams = _of_all(texts, n)
    return sum(grams.count(gram) == 1 for gram in grams) / len(grams)


def _texts() -> list[tuple[list[str], int]]:
    return [(["a b a b c", "a b d"], 2), (["I see. I see. I see.", "I see it"], 2), (["a b c a b c"], 3)]


def _loops(text: str, times: int, *, whole: bool = False, anywhere: bool = False, longest: int | None = None) -> bool:
    """Whether a text ends with the same words `times` times in a row; the keywords are what people do instead."""
    words = text.split()
    for period in range(1, min(longest or len(words), len(words) // times) + 1):
        starts = range(len(words) - times * period + 1) if anywhere else [len(words) - times * period]
        if whole:
            starts = [0] if len(words) == times * period else []
        if any(words[s : s + period] * times == words[s : s + times * period] for s in starts):
            return True
    return False


def _last_words_occur(text: str, times: int) -> bool:
    """Whether the last three words stand anywhere in the text `times` times: not in a row."""
    grams = _grams(text.split(), 3)
    return bool(grams) and grams.count(grams[-1]) >= times


def _ends() -> list[tuple[str, int]]:
    return [
        ("so it goes. it goes. it goes.", 3),  # a group of two words, after another beginning
        ("no no no", 3),  # one word, and the whole text
        ("well, no no no", 3),  # one word, after another beginning
        ("it depends. it depends. it depends. Good luck!", 3),  # a loop that the text gets out of
        ("water them. water them.", 3),  # twice is no loop yet
        ("water them. water them.", 2),  # unless twice is asked for
        ("no", 3),  # fewer words than times
        ("I plant it now. I water it. I plant it now. I rest. I plant it now.", 3),  # three times, not in a row
    ]


def _win_rate(first: Tensor, second: Tensor) -> tuple[float, float]:
    points = (first > second).double() + 0.5 * (first == second).double()  # [n]
    return points.mean().item(), points.std().item() / sqrt(len(points))


def _share(points: Tensor) -> tuple[float, float]:
    return points.double().mean().item(), points.double().std().item() / sqrt(len(points))


def _binomial(first: Tensor, second: Tensor) -> tuple[float, float]:
    rate, n = _win_rate(first, second)[0], len(first)
    return rate, sqrt(rate * (1 - rate) / n)


def _scatter(first: Tensor, second: Tensor) -> tuple[float, float]:
    rate, error = _win_rate(first, second)
    return rate, error * sqrt(len(first))


def _of_all_there_is(first: Tensor, second: Tensor) -> tuple[float, float]:
    rate, error = _win_rate(first, second)
    return rate, error * sqrt((len(first) - 1) / len(first))


def _everyone(first: Tensor, second: Tensor) -> tuple[float, float]:
    a, b = first[:, None], second[None]
    return _share(((a > b).double() + 0.5 * (a == b).double()).flatten())


def _answers() -> list[tuple[Tensor, Tensor]]:
    first = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, -1.0])
    return [(first, torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0, -1.0])), (first[:3], torch.tensor([0.0, 2.0, 2.0]))]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        "7.1", "distinct-n", 1, 5, _distinct,
        (
            Mistake("A mean over the texts",
                    "count over all texts at once: a text may be varied and still say what every other one says",
                    _distinct_of_each),
            Mistake("n-grams run across two texts",
                    "the last word of a text and the first of the next were never written beside each other",
                    _distinct_joined),
            Mistake("You divided by the number of words",
                    "divide by the number of n-grams, so that texts without any repetition get 1",
                    _distinct_a_word),
            Mistake("Groups of characters, not of words",
                    "split each text into words first",
                    _distinct_characters),
            Mistake("You counted those that occur once",
                    "an n-gram that occurs three times is one different n-gram, not none",
                    _never_repeated),
            Mistake("A number, not a share",
                    "divide by how many n-grams there are, or longer texts look more varied",
                    lambda texts, n: float(len(set(_of_all(texts, n))))),
        ),
        cases=_texts,
    ),
    Exercise(
        "7.2", "Does it end in a loop?", 3, 10, _loops,
        (
            Mistake("Only single words",
                    "a loop may be a group of words, such as a whole sentence: try every length of the group",
                    lambda text, times: _loops(text, times, longest=1)),
            Mistake("Anywhere in the text",
                    "asked for is how it ends: a text that gets out of its loop does not count",
                    lambda text, times: _loops(text, times, anywhere=True)),
            Mistake("The whole text must be the loop",
                    "a text may begin well; only its last words are compared",
                    lambda text, times: _loops(text, times, whole=True)),
            Mistake("Once too few",
                    "the group has to stand there `times` times, the last one included",
                    lambda text, times: _loops(text, times - 1)),
            Mistake("The last words occur often, but not in a row",
                    "the groups must follow each other without a gap",
                    _last_words_occur),
        ),
        cases=_ends,
    ),
    Exercise(
        "7.3", "Win rate with its standard error", 2, 8, _win_rate,
        (
            Mistake("Ties count as lost",
                    "a tie is half a win, or the two models' win rates would not add up to 1",
                    lambda first, second: _share(first > second)),
            Mistake("Ties count as won",
                    "a tie is half a win, or both models could win more than half",
                    lambda first, second: _share(first >= second)),
            Mistake("Ties are left out",
                    "a model that changes nothing would then be judged by the few prompts where it does",
                    lambda first, second: _share((first > second)[first != second])),
            Mistake("Every answer against every other one",
                    "compare the two answers to the same prompt: what makes a prompt hard then cancels",
                    _everyone),
            Mistake("The standard deviation divides by n",
                    "of a sample it divides by n - 1, as torch's std does, for its mean was taken from the sample too",
                    _of_all_there_is),
            Mistake("That is the standard deviation",
                    "of single prompts; the mean of n of them scatters √n times less",
                    _scatter),
            Mistake("The formula for wins and losses only",
                    "√(p(1 - p)/n) takes every prompt for won or lost; ties at ½ scatter less, so use the points' own "
                    "standard deviation",
                    _binomial),
        ),
        cases=_answers,
    ),
)  # fmt: skip
