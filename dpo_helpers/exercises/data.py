"""Exercises of notebook 1: where the prompt ends, what is scored, and what a judge can reach."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .core import Exercise, Mistake

_MARKER = "\n\nAssistant:"
_END = 0  # the id of end-of-text, and of padding, in the cases of 1.2


def _split(text: str) -> tuple[str, str]:
    end = text.rindex(_MARKER) + len(_MARKER)
    return text[:end], text[end:]


def _split_first(text: str) -> tuple[str, str]:
    end = text.index(_MARKER) + len(_MARKER)
    return text[:end], text[end:]


def _split_before_marker(text: str) -> tuple[str, str]:
    start = text.rindex(_MARKER)
    return text[:start], text[start:]


def _split_around_marker(text: str) -> tuple[str, str]:
    prompt, response = text.rsplit(_MARKER, 1)
    return prompt, response


def _split_stripped(text: str) -> tuple[str, str]:
    prompt, response = _split(text)
    return prompt, response.strip()


def _texts() -> list[tuple[str]]:
    one = "\n\nHuman: How can I grow roses?\n\nAssistant: You can plant them in a sunny bed."
    return [(one,), (one + "\n\nHuman: And then?\n\nAssistant: Water them.",)]


def _between(ids: Tensor, start: int, end: int) -> Tensor:
    position = torch.arange(len(ids))
    return (position >= start) & (position < end)


def _mask(ids: Tensor, prompt_length: int, response_length: int) -> Tensor:
    return _between(ids, prompt_length, prompt_length + response_length)


def _mask_by_id(ids: Tensor, prompt_length: int, response_length: int) -> Tensor:
    return _between(ids, prompt_length, len(ids)) & (ids != _END)


def _mask_padding(ids: Tensor, prompt_length: int, response_length: int) -> Tensor:
    return _between(ids, prompt_length, len(ids))


def _mask_late(ids: Tensor, prompt_length: int, response_length: int) -> Tensor:
    return _between(ids, prompt_length + 1, prompt_length + response_length)


def _mask_early(ids: Tensor, prompt_length: int, response_length: int) -> Tensor:
    return _between(ids, prompt_length - 1, prompt_length + response_length - 1)


def _mask_without_end(ids: Tensor, prompt_length: int, response_length: int) -> Tensor:
    return _between(ids, prompt_length, prompt_length + response_length - 1)


def _mask_prompt(ids: Tensor, prompt_length: int, response_length: int) -> Tensor:
    return _between(ids, 0, prompt_length + response_length)


def _mask_short(ids: Tensor, prompt_length: int, response_length: int) -> Tensor:
    return _between(ids, prompt_length, response_length)


def _padded_rows() -> list[tuple[Tensor, int, int]]:
    """A row with end-of-text and padding; one that was cut, so that it has neither; one without padding."""
    return [
        (torch.tensor([5, 6, 7, 8, 9, _END, _END, _END, _END]), 2, 4),
        (torch.tensor([5, 6, 7, 8, 9, 4]), 2, 4),
        (torch.tensor([5, 6, 7, 8, _END]), 3, 2),
    ]


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _best(gaps: Sequence[float]) -> float:
    return _mean([max(_sigmoid(gap), 1 - _sigmoid(gap)) for gap in gaps])


def _gaps() -> list[tuple[list[float]]]:
    return [([2.0, -1.0, 0.5],), ([0.0],), ([-3.0, 0.0, 1.0, 4.0],)]


EXERCISES = (
    Exercise(
        "1.1", "Cut a dialogue", 1, 5, _split,
        (
            Mistake("You cut at the first Assistant turn",
                    "in a dialogue of several turns the prompt holds the earlier answers too; cut at the last one",
                    _split_first),
            Mistake("The marker is in the response",
                    "the prompt ends with the marker, inclusive: the model is given it and need not write it",
                    _split_before_marker),
            Mistake("The marker is in neither part",
                    "prompt + response must give the text back; without the marker the model is not asked to answer",
                    _split_around_marker),
            Mistake("The leading space is gone",
                    "prompt + response must give the text back; GPT-2's tokens begin with their space",
                    _split_stripped),
        ),
        cases=_texts,
    ),
    Exercise(
        "1.2", "What is scored in a padded row", 2, 8, _mask,
        (
            Mistake("You masked by id",
                    "padding has the id of end-of-text, so the real end is masked too and is never learned; "
                    "go by position",
                    _mask_by_id),
            Mistake("End-of-text is left out",
                    "it is one of the response_length tokens: the end of the response is a token like any other",
                    _mask_without_end),
            Mistake("The first response token is left out",
                    "positions count from 0, so a prompt of n tokens stands at 0 … n − 1 and the response starts at n",
                    _mask_late),
            Mistake("The mask is one too early",
                    "that is where the predictions of these tokens stand; the mask marks the tokens, and whoever "
                    "computes log-probabilities shifts",
                    _mask_early),
            Mistake("Padding is scored",
                    "the mask has to end where the response ends, at prompt_length + response_length",
                    _mask_padding),
            Mistake("The prompt is scored",
                    "it is real text, but given: the model is asked for the response only, which starts at "
                    "prompt_length",
                    _mask_prompt),
            Mistake("You took the length of the response for its end",
                    "the response ends at prompt_length + response_length; a length is no position",
                    _mask_short),
        ),
        cases=_padded_rows,
    ),
    Exercise(
        "1.3", "The best possible accuracy", 2, 8, _best,
        (
            Mistake("You took the chosen one to be the better one",
                    "people err: a judge who knows the reward is wrong wherever the worse response was chosen",
                    lambda gaps: 1.0),
            Mistake("That is the mean probability of the labels as they were drawn",
                    "the judge does not follow the label, it names the better response, and is right with "
                    "probability max(p, 1 − p)",
                    lambda gaps: _mean([_sigmoid(gap) for gap in gaps])),
            Mistake("That is the share of gaps above 0",
                    "it is how often these labels happened to agree with the judge; other labels would give another "
                    "share, and what is asked for is its expectation",
                    lambda gaps: _mean([float(gap > 0) for gap in gaps])),
            Mistake("You took σ of the mean gap",
                    "σ is curved, so that is not the mean of σ: take each pair's probability first, then the mean",
                    lambda gaps: _sigmoid(_mean([abs(gap) for gap in gaps]))),
            Mistake("That is the error of the best judge",
                    "min(p, 1 − p) is the probability to be wrong about a pair; its accuracy is 1 minus that",
                    lambda gaps: 1 - _best(gaps)),
            Mistake("You summed and did not divide",
                    "an accuracy is a share: divide by the number of pairs",
                    lambda gaps: _best(gaps) * len(gaps)),
        ),
        cases=_gaps,
    ),
)  # fmt: skip
