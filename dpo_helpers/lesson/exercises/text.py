"""Exercise 7.1: variety of texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from .core import Exercise, Mistake

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
                    "then longer texts look more varied: divide by the number of n-grams",
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
)  # fmt: skip
