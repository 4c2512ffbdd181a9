"""Exercises of the notebooks in beyond/: the places of a packed pair, and the margin that a loss stands for."""

from __future__ import annotations

import math

from .core import Exercise, Mistake


def _margin(loss: float, beta: float) -> float:
    return -math.log(math.exp(loss) - 1) / beta


def _losses() -> list[tuple[float, float]]:
    return [(2.74, 0.5), (0.2, 0.1), (1.0, 5.0)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        "a.1", "The places of a packed pair", 1, 3, 64,
        (
            Mistake("The prompt is in it twice",
                    "both responses read the same prompt, whose tokens do not depend on what follows: run it once",
                    104, (106, 105)),
            Mistake("The last tokens are in it",
                    "nothing is predicted from the last token of a response, so neither of the two is run", 66),
            Mistake("Those are two padded rows",
                    "the plain step pads both rows to the longer one; packed, nothing is padded", 116, (114, 115)),
            Mistake("One last token is still in it", "each of the two responses goes without its last token", 65),
            Mistake("The last token of the prompt is left out",
                    "it predicts the first token of both responses; only the last tokens of the responses "
                    "predict nothing",
                    63, (61, 62)),
            Mistake("Only one response is in it",
                    "both are: the prompt, then the chosen response, then the rejected one",
                    57, (58, 47, 48)),
            Mistake("The prompt is not in it",
                    "it is run, once: both responses read it",
                    24, (25, 26)),
        ),
    ),
    Exercise(
        "b.1", "The margin that a loss stands for", 1, 5, _margin,
        (
            Mistake("That is the reward margin",
                    "log(1 + exp(−m)) holds the reward margin m = β·h; divide by β for the log-ratio margin h",
                    lambda loss, beta: beta * _margin(loss, beta)),
            Mistake("You multiplied by β",
                    "m = β·h, so h = m/β: a small β needs a large log-ratio margin for the same loss",
                    lambda loss, beta: beta**2 * _margin(loss, beta)),
            Mistake("The sign is the other way round",
                    "a loss above ln 2 means that the rejected response is preferred, so its margin is negative",
                    lambda loss, beta: -_margin(loss, beta)),
            Mistake("Only the logarithm is undone",
                    "−loss is log σ(β·h), so it is no margin yet; σ has to be undone too",
                    lambda loss, beta: -loss / beta, (lambda loss, beta: -loss, lambda loss, beta: -loss * beta)),
            Mistake("The 1 is in another place",
                    "e^loss = 1 + e^(−m): undo the logarithm first, then subtract 1, then take the logarithm",
                    lambda loss, beta: -math.log(math.exp(loss) + 1) / beta,
                    (lambda loss, beta: -(loss - 1) / beta, lambda loss, beta: -loss - 1 / beta,
                     lambda loss, beta: -loss / beta - 1, lambda loss, beta: -math.log(1 - math.exp(-loss)) / beta,
                     lambda loss, beta: -math.log(1 + math.exp(-loss)) / beta)),
            Mistake("The logarithm is missing",
                    "e^loss − 1 is e^(−m); m is minus its logarithm",
                    lambda loss, beta: (math.exp(loss) - 1) / beta,
                    (lambda loss, beta: -(math.exp(loss) - 1) / beta, lambda loss, beta: math.exp(loss) - 1)),
            Mistake("That is the probability",
                    "exp(−loss) = σ(β·h) is how likely the policy finds the label; ask which h gives it",
                    lambda loss, beta: math.exp(-loss), (lambda loss, beta: math.exp(-loss) / beta,)),
            Mistake("That is the distance from ln 2",
                    "the loss is no straight line: ln 2 is where the margin is 0, and that is all they share",
                    lambda loss, beta: (math.log(2) - loss) / beta, (lambda loss, beta: math.log(2) - loss,)),
            Mistake("β is in the exponent",
                    "β comes last: the loss gives the reward margin m, and h = m/β",
                    lambda loss, beta: -math.log(math.exp(loss / beta) - 1),
                    (lambda loss, beta: -math.log(math.exp(loss * beta) - 1),
                     lambda loss, beta: -math.log(math.exp(loss / beta) - 1) / beta)),
        ),
        cases=_losses,
    ),
)  # fmt: skip
