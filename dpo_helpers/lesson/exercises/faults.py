"""The bugs to find of notebook 5: which faulty run has which fault, and what speaks against every other guess.

`lesson.faulty` makes the runs. Numbers in the sentences are those of the mini profile; tests compare them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import CourseError
from .core import Verdict
from .running import safely_shown

AVERAGED = "averaged log-probabilities"
DROPOUT = "dropout on"
EMPTY = "empty response mask"
SHUFFLED = "labels shuffled"
OVERFLOW = "overflow in fp16"
BY_HEART = "pairs learned by heart"
OWN = "policy is its own reference"
HOT = "rate too high, no warm-up"
COLD = "rate too low"
SWAPPED = "sides swapped"
WRONG = "wrong reference"

FAULTS: dict[str, str] = {
    AVERAGED: "in training a response's log-probability is the mean over its tokens, not the sum",
    DROPOUT: "the policy trains with dropout on; the reference was scored with dropout off",
    EMPTY: "the mask holds no response token, so that nothing is scored",
    SHUFFLED: "which response of a pair counts as chosen was decided by a coin",
    OVERFLOW: "numbers grow beyond what 16 bits hold",
    BY_HEART: "the policy remembers the training pairs instead of what they have in common",
    OWN: "the reference is the policy itself, as it is at each step, where a copy of the start was meant",
    HOT: "the learning rate is ten times too high from the first update on",
    COLD: "the learning rate is ten times too low",
    SWAPPED: "in training the rejected responses are taken for the chosen ones",
    WRONG: "the policy starts from one model, and the reference is another one",
}

WITH_IT: dict[str, str] = {  # what curves show with a fault
    AVERAGED: "the first gradient would be some thirty times smaller than the healthy run's, and the rewards of the "
    "training batches far smaller than those of held-out pairs, which are measured with sums",
    DROPOUT: "the very first training batch would be off ln 2, with rewards that are not 0, while the held-out points, "
    "measured with dropout off, start at ln 2",
    EMPTY: "every log-probability would be 0: the loss ln 2 and the gradient exactly 0, at every update",
    SHUFFLED: "nothing could be learned that holds for other pairs: the held-out accuracy would stay near one half",
    OVERFLOW: "a loss or a gradient would be no number any more, and the loop stops there; all numbers here are finite",
    BY_HEART: "training pairs would have to come back: here each is seen once, so a training batch is as new to the "
    "policy as the held-out pairs",
    OWN: "both rewards would be exactly 0 and the loss exactly ln 2, at every update and every held-out point",
    HOT: "the loss would be ln 2 at update 1 and far above it at update 2, with both rewards far below 0",
    COLD: "the run would be the healthy one in slow motion: the same first gradient, training and held-out pairs alike",
    SWAPPED: "training would look healthy, while the held-out accuracy falls far below one half",
    WRONG: "the rewards would not be 0 before the first update, neither in training nor on held-out pairs",
}


@dataclass(frozen=True)
class Puzzle:
    """A faulty run: its fault, what in the curves shows it, what to do, and what rules a guess out here."""

    fault: str
    shown_by: str
    remedy: str
    against: Mapping[str, str]


PUZZLES: dict[str, Puzzle] = {
    "A": Puzzle(
        OWN,
        "loss exactly ln 2 and rewards exactly 0 at every update, although the gradient's norm is above 1: the policy "
        "does move, and the reference moves with it",
        "make the reference a copy and freeze it, or score it once before training as this course does; check that the "
        "two share no tensor, and that the loss has left ln 2 after a few updates",
        {
            EMPTY: "the gradient would be exactly 0; here its norm is above 1, so the policy moves",
            COLD: "rewards would be small, but not exactly 0, from update 2 on",
            SHUFFLED: "rewards would scatter around 0; here they are exactly 0 in every batch",
            AVERAGED: "rewards would be small, not exactly 0, and the first gradient's norm about 0.05, where it is "
            "above 1",
            WRONG: "a reference that is another model gives rewards that are not 0; here they are 0 always, so policy "
            "and reference are the same at every step",
        },
    ),
    "B": Puzzle(
        SWAPPED,
        "in training the accuracy rises to about 0.8 and the loss falls; on held-out pairs the accuracy falls to about "
        "0.2 and the loss rises: the policy learns the opposite of what is measured",
        "print one pair, decoded, with its two rewards, at the place where the loss is computed",
        {
            BY_HEART: "each pair is seen once, so a training batch is as new to the policy as the held-out pairs; and "
            "who only remembers is right on one half of other pairs, not on a fifth",
            SHUFFLED: "the training accuracy would stay near one half too; here it rises to about 0.8",
            WRONG: "the loss would not be ln 2 before the first update; here it is, for training and held-out pairs",
            HOT: "the training loss would jump at update 2; here it falls as in the healthy run",
            DROPOUT: "the training batches would look worse than the held-out points; here they look far better",
            OWN: "all rewards would be exactly 0; here they grow",
        },
    ),
    "C": Puzzle(
        HOT,
        "loss ln 2 at update 1, above 10 at update 2, both rewards below -20 soon after, the gradient's norm above 20: "
        "the first update did it, which RMSprop makes ten times the learning rate in every weight",
        "a warm-up and a lower rate; clipping does not help at the first update, where RMSprop divides the norm out",
        {
            OVERFLOW: "an overflow ends in a loss or gradient that is no number, and in an error; here all are finite",
            WRONG: "the loss would be off ln 2 before the first update; here it is ln 2 at update 1, and the first "
            "update does the harm",
            DROPOUT: "the first training batch would be off ln 2; here it is on it, and held-out pairs are as bad",
            AVERAGED: "the first gradient would be far smaller than the healthy run's; here it is the same",
            BY_HEART: "the training loss would be low; here it is as bad as the held-out one",
            SWAPPED: "training would look healthy; here the training loss rises above 10",
            SHUFFLED: "labels cannot make the loss jump at update 2: it would stay near ln 2",
        },
    ),
    "D": Puzzle(
        DROPOUT,
        "the very first training batch has a loss above ln 2 and rewards far below 0, before any update; the held-out "
        "points, measured with dropout off, start at ln 2, get better, and on the whole look better than training",
        "model.eval() for every log-probability that enters the loss; this course's loop calls it, and its fast path "
        "refuses a model in training mode",
        {
            WRONG: "the held-out rewards would not be 0 before the first update either; here only training's are off",
            HOT: "the first batch would have a loss of ln 2; here it is off before any update was made",
            SHUFFLED: "the training accuracy looks like it, but the held-out accuracy rises to about 0.7",
            SWAPPED: "the held-out accuracy would fall below one half; here it rises to about 0.7",
            BY_HEART: "training would look better than the held-out points; here it looks worse",
            AVERAGED: "the first training rewards would be exactly 0, and the gradient small; here it is well "
            "above the healthy run's",
            OWN: "all rewards would be exactly 0; here they are not 0 in any training batch",
        },
    ),
    "E": Puzzle(
        AVERAGED,
        "the first gradient's norm is about 0.05, where the healthy run has 1.5: divided by some thirty tokens. The "
        "training rewards look tame, but held-out pairs, measured with sums, have margins over ten times as large: "
        "as if β were divided by the length, so nothing holds the policy back",
        "sum the log-probabilities: the β of the paper is for sums",
        {
            COLD: "the first gradient would be that of the healthy run, and held-out rewards would stay small; here "
            "they run away",
            HOT: "the training loss would jump at update 2; here it falls smoothly, and only the held-out rewards run "
            "away",
            SWAPPED: "the held-out accuracy would fall below one half; here it rises along with training's",
            EMPTY: "the gradient would be exactly 0; here it is small, and the training loss falls",
            OWN: "all rewards would be exactly 0; here they grow, on held-out pairs most of all",
            DROPOUT: "the first training batch would be off ln 2; here it is on it",
            BY_HEART: "each pair is seen once; and the held-out accuracy rises along with training's",
            WRONG: "the rewards would not be 0 before the first update; here they are",
        },
    ),
    "F": Puzzle(
        WRONG,
        "before the first update the loss is already below ln 2 and the chosen reward above 0, for training and "
        "held-out pairs alike: the policy starts from SFT, and the reference is the plain model",
        "start the policy from the reference, or take the start for the reference; keep its hash, and look at the "
        "first loss",
        {
            DROPOUT: "the held-out points would start at ln 2, and dropout makes training worse, not better; here both "
            "start below ln 2",
            SWAPPED: "the held-out accuracy would fall below one half; here it is above it from the start",
            HOT: "update 1 would have a loss of ln 2; here the loss is off ln 2 before any update was made",
            OWN: "all rewards would be exactly 0; here they are not even 0 at the start",
            AVERAGED: "policy and reference would be averaged alike, with first rewards of 0; here they are not",
            COLD: "the first loss would be ln 2; here it is below it, and the rewards move",
            BY_HEART: "nothing has been learned yet at the point before the first update, which is off already",
        },
    ),
}


def judge_fault(run: str, guess: Any) -> Verdict:
    """The verdict on a guess for one run: right, with sign and remedy, or what in the curves speaks against it.

    CourseError if there is no such run.
    """
    if run not in PUZZLES:
        raise CourseError(f"there is no run {run!r}; there are {', '.join(PUZZLES)}")
    if guess is None or guess is ...:
        return Verdict("unanswered", "not answered yet")
    name = " ".join(guess.lower().split()) if isinstance(guess, str) else ""
    if name not in FAULTS:
        return Verdict("wrong", f"{safely_shown(guess)} is not in the list; choose from: {'; '.join(FAULTS)}")
    puzzle = PUZZLES[run]
    if name == puzzle.fault:
        return Verdict("right", f"right\n  seen in the curves: {puzzle.shown_by}\n  remedy: {puzzle.remedy}")
    return Verdict("wrong", f'not yet\n  with "{name}" {puzzle.against.get(name, WITH_IT[name])}', name)
