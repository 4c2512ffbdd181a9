"""Measures of text, for samples side by side: how varied it is, whether it repeats itself, whether it ends."""

from __future__ import annotations

from collections.abc import Sequence

from ..generation import Response
from ..uncertainty import mean_and_error


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different word n-grams among all of a set of texts (Li et al. 2016); nan if there are none."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repeated_share(text: str, n: int = 3) -> float:
    """Share of a text's word n-grams that repeat an earlier one; 0 for a text without any."""
    grams = _ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_a_loop(text: str, times: int = 3) -> bool:
    """Whether a text ends with the same group of words `times` times in a row, such as "I see. I see. I see." """
    words = text.lower().split()
    return any(words[-times * period :] == words[-period:] * times for period in range(1, len(words) // times + 1))


def text_measures(responses: Sequence[Response]) -> dict[str, float]:
    """Of sampled responses: length in tokens, the share that ended by itself, repeated 3-grams and the share
    that end in a loop (each with _se), and distinct-1 and distinct-2 over all of them.
    """
    texts = [response.text for response in responses]
    measures = {"distinct_1": distinct_n(texts, 1), "distinct_2": distinct_n(texts, 2)}
    for key, values in {
        "length": [float(len(r.ids)) for r in responses],
        "ended": [float(r.ended) for r in responses],
        "repeated_3grams": [repeated_share(text) for text in texts],
        "looping": [float(ends_in_a_loop(text)) for text in texts],
    }.items():
        measures[key], measures[f"{key}_se"] = mean_and_error(values)
    return measures


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
