"""Exercise 1.1: where the prompt ends."""

from __future__ import annotations

from .core import Exercise, Mistake

_HUMAN, _MARKER = "\n\nHuman:", "\n\nAssistant:"
Parts = tuple[str, ...]


def _split(text: str, marker: str = _MARKER, *, more: int = 0) -> Parts:
    """The two parts, cut behind the last marker; `more`: so many characters further on."""
    end = text.rindex(marker) + len(marker) + more
    return text[:end], text[end:]


def _split_first(text: str) -> Parts:
    end = text.index(_MARKER) + len(_MARKER)
    return text[:end], text[end:]


def _split_before(text: str, marker: str = _MARKER) -> Parts:
    start = text.rindex(marker)
    return text[:start], text[start:]


def _split_last_turn(text: str) -> Parts:
    prompt, response = _split(text)
    return prompt[prompt.rindex(_HUMAN) :], response


def _split_last_piece(text: str) -> Parts:
    pieces = text.split(_MARKER)
    return pieces[-2] + _MARKER, pieces[-1]


def _texts() -> list[tuple[str]]:
    """One turn; two; and three with all that may stand in a response: the marker's word, a line break, end spaces."""
    one = "\n\nHuman: How can I grow roses?\n\nAssistant: You can plant them in a sunny bed."
    two = one + "\n\nHuman: And then?\n\nAssistant: Water them. "
    play = "\n\nHuman: In two lines.\n\nAssistant:\nHuman: Is the Assistant: there?\nAssistant: I am. "
    return [(one,), (two,), ("\n\nHuman: Write a play.\n\nAssistant: How long?" + play,)]


EXERCISES = (
    Exercise(
        "1.1", "Cut a dialogue", 1, 5, _split,
        (
            Mistake("You cut at the first Assistant turn",
                    "in a dialogue of several turns the prompt holds the earlier answers too; cut at the last one",
                    _split_first, (lambda text: text.split(_MARKER, 1), lambda text: text.split(_MARKER)[:2])),
            Mistake("You cut at every Assistant turn",
                    "there are two parts: what stands before the last response, marker included, and the response",
                    lambda text: text.split(_MARKER), (lambda text: text.split(_HUMAN),)),
            Mistake("The marker is in the response",
                    "the prompt ends with the marker, inclusive: the model is given it and need not write it",
                    _split_before, (lambda text: (_split_before(text)[0], _split_before(text)[1].lstrip()),)),
            Mistake("The marker is in neither part",
                    "prompt + response must give the text back; without the marker the model is not asked to answer",
                    lambda text: text.rsplit(_MARKER, 1),
                    (lambda text: [text.rsplit(_MARKER, 1)[0], _split(text)[1].strip()],
                     lambda text: [text.rsplit(_MARKER, 1)[0], _split(text)[1].lstrip()])),
            Mistake("You cut one character too early",
                    "the marker ends with its colon, and the prompt with the marker",
                    lambda text: _split(text, more=-1)),
            Mistake("The marker is a part of its own",
                    "there are two parts, and the marker is the end of the first one",
                    lambda text: text.rpartition(_MARKER), (lambda text: text.partition(_MARKER),)),
            Mistake("The leading space is gone",
                    "prompt + response must give the text back; GPT-2's tokens begin with their space",
                    lambda text: (_split(text)[0], _split(text)[1].strip()),
                    (lambda text: (_split(text)[0], _split(text)[1].lstrip()),
                     lambda text: tuple(part.strip() for part in _split(text)),
                     lambda text: tuple(part.lstrip() for part in _split(text)),
                     lambda text: (_split(text)[0], _split(text)[1][1:]),
                     lambda text: (_split(text)[0], _split(text)[1].removeprefix(" ")))),
            Mistake("The space is in the prompt",
                    "the prompt ends with the colon; the space belongs to the first word of the response, as in "
                    "GPT-2's tokens",
                    lambda text: _split(text, more=1),
                    (lambda text: _split(text, _MARKER + " "),
                     lambda text: (_split(text)[0] + " ", _split(text)[1]),
                     lambda text: (_split(text)[0] + " ", _split(text)[1].lstrip()),
                     lambda text: (_split(text)[0] + " ", _split(text)[1].strip()))),
            Mistake("Something of the text is stripped",
                    "prompt + response must give the text back, with every space and line break at its ends and behind "
                    "the marker",
                    lambda text: _split(text.strip()),
                    (lambda text: _split(text.lstrip()), lambda text: _split(text.rstrip()),
                     lambda text: (_split(text)[0].strip(), _split(text)[1]),
                     lambda text: (_split(text)[0], _split(text)[1].rstrip()),
                     lambda text: (_split(text)[0], _split(text)[1].strip("\n")))),
            Mistake("The parts are swapped",
                    "the prompt comes first, as it does in the text",
                    lambda text: _split(text)[::-1], (lambda text: text.rsplit(_MARKER, 1)[::-1],)),
            Mistake("Any “Assistant:” is taken for the marker",
                    "a response may hold that word, or begin a line with it; the marker has a blank line before it",
                    lambda text: _split(text, "Assistant:"),
                    (lambda text: _split(text, "\nAssistant:"), lambda text: _split(text, "Assistant: "),
                     lambda text: text.rsplit("Assistant:", 1))),
            Mistake("The earlier turns are missing",
                    "the prompt is all that stands before the response; earlier questions and answers belong to it",
                    _split_last_turn, (_split_last_piece,)),
            Mistake("You cut at the last question",
                    "the question is part of the prompt, and so is the marker behind it",
                    lambda text: _split_before(text, _HUMAN), (lambda text: _split(text, _HUMAN),)),
            Mistake("One part is missing",
                    "return both, (prompt, response)",
                    lambda text: _split(text)[1], (lambda text: _split(text)[0],)),
        ),
        cases=_texts,
    ),
)  # fmt: skip
