"""Exercises 1.2 and 1.3: what is scored in a row, and what a judge can reach."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .core import Exercise, Mistake

# 1.2

_END = 0  # the id of end-of-text, and of padding, in the cases of 1.2


def _between(ids: Tensor, start: int, end: int) -> Tensor:
    position = torch.arange(len(ids))
    return (position >= start) & (position < end)


def _mask(ids: Tensor, prompt: int, response: int) -> Tensor:
    return _between(ids, prompt, prompt + response)


def _mask_to_first_end(ids: Tensor, prompt: int, response: int) -> Tensor:
    ends = (ids == _END).nonzero().flatten().tolist()
    return _between(ids, prompt, ends[0] + 1 if ends else len(ids))


def _padded_rows() -> list[tuple[Tensor, int, int]]:
    """End-of-text and padding; cut, so that it has neither; without padding; cut, and padded."""
    return [
        (torch.tensor([5, 6, 7, 8, 9, _END, _END, _END, _END]), 2, 4),
        (torch.tensor([5, 6, 7, 8, 9, 4]), 2, 4),
        (torch.tensor([5, 6, 7, 8, _END]), 3, 2),
        (torch.tensor([5, 6, 7, 8, 9, _END, _END]), 2, 3),
    ]


# 1.3


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _best(gaps: Sequence[float]) -> float:
    return _mean([max(_sigmoid(gap), 1 - _sigmoid(gap)) for gap in gaps])


def _gaps() -> list[tuple[list[float]]]:
    return [([2.0, -1.0, 0.5],), ([0.0],), ([-3.0, 0.0, 1.0, 4.0],), ([-2.0, 0.5],)]


EXERCISES = (
    Exercise(
        "1.2", "What is scored in a padded row", 2, 8, _mask,
        (
            Mistake("You masked by id",
                    "padding has the id of end-of-text, so the real end is masked too and is never learned; "
                    "go by position",
                    lambda ids, p, r: _between(ids, p, len(ids)) & (ids != _END), (lambda ids, p, r: ids != _END,)),
            Mistake("The first id of end-of-text is taken for the end",
                    "a response that was cut has none, and the first one is then padding; the length says where it "
                    "ends",
                    _mask_to_first_end),
            Mistake("End-of-text is left out",
                    "it is one of the response_length tokens: the end of the response is a token like any other",
                    lambda ids, p, r: _between(ids, p, p + r - 1)),
            Mistake("The first response token is left out",
                    "positions count from 0, so a prompt of n tokens stands at 0 … n − 1 and the response starts at n",
                    lambda ids, p, r: _between(ids, p + 1, p + r)),
            Mistake("The mask is one too early",
                    "that is where the predictions of these tokens stand; the mask marks the tokens, and whoever "
                    "computes log-probabilities shifts",
                    lambda ids, p, r: _between(ids, p - 1, p + r - 1), (lambda ids, p, r: _mask(ids, p, r)[1:],)),
            Mistake("The mask is one too late",
                    "positions count from 0: the response stands at n … n + m − 1 for a prompt of n and a response of "
                    "m tokens",
                    lambda ids, p, r: _between(ids, p + 1, p + r + 1)),
            Mistake("One position too many is scored",
                    "the last response token is at prompt_length + response_length − 1: use < for the end",
                    lambda ids, p, r: _between(ids, p, p + r + 1), (lambda ids, p, r: _between(ids, p - 1, p + r),)),
            Mistake("Padding is scored",
                    "the mask has to end where the response ends, at prompt_length + response_length",
                    lambda ids, p, r: _between(ids, p, len(ids))),
            Mistake("The prompt is scored",
                    "it is real text, but given: the model is asked for the response only, which starts at "
                    "prompt_length",
                    lambda ids, p, r: _between(ids, 0, p + r)),
            Mistake("One of the two borders is enough for you",
                    "a response token is behind the one border and before the other: join them with &, not with |",
                    lambda ids, p, r: _between(ids, 0, len(ids)), (lambda ids, p, r: ~_between(ids, p, p + r),)),
            Mistake("You counted from the end of the row",
                    "behind the response there may be padding; count from the prompt on",
                    lambda ids, p, r: _between(ids, len(ids) - r, len(ids))),
            Mistake("You took the length of the response for its end",
                    "the response ends at prompt_length + response_length; a length is no position",
                    lambda ids, p, r: _between(ids, p, r)),
            Mistake("That is the mask of the prompt",
                    "True marks what is scored, and that is the response",
                    lambda ids, p, r: _between(ids, 0, p)),
            Mistake("Those are numbers, not True and False",
                    "0 and 1 do in a product, but an index takes them for positions; compare positions, and the "
                    "result is of bool",
                    lambda ids, p, r: _mask(ids, p, r).float()),
            Mistake("Those are the tokens, not where they are",
                    "the result has T entries, True or False for each position",
                    lambda ids, p, r: ids[p : p + r],
                    (lambda ids, p, r: ids * _mask(ids, p, r), lambda ids, p, r: torch.arange(p, p + r))),
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
                    lambda gaps: _mean([_sigmoid(gap) for gap in gaps]),
                    (lambda gaps: _mean([_sigmoid(-gap) for gap in gaps]),)),
            Mistake("That is the share of gaps above 0",
                    "it is how often these labels happened to agree with the judge; other labels would give another "
                    "share, and what is asked for is its expectation",
                    lambda gaps: _mean([float(gap > 0) for gap in gaps]),
                    (lambda gaps: _mean([float(gap >= 0) for gap in gaps]),
                     lambda gaps: _mean([(gap > 0) + 0.5 * (gap == 0) for gap in gaps]))),
            Mistake("You averaged too early",
                    "σ is curved, so σ of a mean gap is not the mean of σ, and a maximum of means is not the mean of "
                    "maxima: take each pair's probability first, then the mean",
                    lambda gaps: _sigmoid(_mean([abs(gap) for gap in gaps])),
                    (lambda gaps: _sigmoid(abs(_mean(gaps))), lambda gaps: _sigmoid(_mean(gaps)),
                     lambda gaps: max(p := _mean([_sigmoid(gap) for gap in gaps]), 1 - p))),
            Mistake("That is the error of the best judge",
                    "min(p, 1 − p) is the probability to be wrong about a pair; its accuracy is 1 minus that",
                    lambda gaps: 1 - _best(gaps)),
            Mistake("You summed and did not divide",
                    "an accuracy is a share: divide by the number of pairs",
                    lambda gaps: _best(gaps) * len(gaps)),
            Mistake("Pairs with a gap below 0 are left out, or count for nothing",
                    "there the judge names the other response, and is right with probability 1 − p",
                    lambda gaps: _mean([_sigmoid(gap) for gap in gaps if gap > 0]),
                    (lambda gaps: _mean([_sigmoid(gap) for gap in gaps if gap >= 0]),
                     lambda gaps: _mean([_sigmoid(gap) * (gap > 0) for gap in gaps]),
                     lambda gaps: _mean([_sigmoid(gap) * (gap >= 0) for gap in gaps]),
                     lambda gaps: _mean([_sigmoid(max(gap, 0)) for gap in gaps]))),
            Mistake("That is how often two people agree",
                    "p² + (1 − p)² compares two draws; the judge is no draw, it always names the better response",
                    lambda gaps: _mean([_sigmoid(gap) ** 2 + _sigmoid(-gap) ** 2 for gap in gaps])),
            Mistake("That is one pair, the easiest or the hardest",
                    "the accuracy is the mean over all pairs; max is for p and 1 − p of each",
                    lambda gaps: max(_best([gap]) for gap in gaps),
                    (lambda gaps: max(_sigmoid(gap) for gap in gaps), lambda gaps: min(_best([gap]) for gap in gaps))),
            Mistake("One probability for each pair",
                    "the result is one number: their mean",
                    lambda gaps: [_best([gap]) for gap in gaps]),
        ),
        cases=_gaps,
    ),
)  # fmt: skip
