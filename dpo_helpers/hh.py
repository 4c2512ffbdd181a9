"""The text format of HH-RLHF: dialogues as turns, pairs of them as (prompt, chosen, rejected).

A dialogue is a string of turns marked "\\n\\nHuman:" and "\\n\\nAssistant:". The prompt ends with the last
"\\n\\nAssistant:", inclusive; the response is the rest, its leading space kept. Cutting at the longest
common prefix of the two texts instead would eat words that both responses start with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import DataError

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"


@dataclass(frozen=True)
class Pair:
    """One preference: two responses to the same prompt. `index` is the row's number in its data set, from 0."""

    prompt: str
    chosen: str
    rejected: str
    index: int = 0


@dataclass(frozen=True)
class Dropped:
    """A row that is well formed but cannot be trained on, with the reason."""

    index: int
    reason: str


def split_prompt(text: str) -> tuple[str, str]:
    """Cut a dialogue into (prompt, response) after its last Assistant marker; DataError if it has none."""
    start = text.rfind(ASSISTANT)
    if start < 0:
        raise DataError("no Assistant turn")
    end = start + len(ASSISTANT)
    return text[:end], text[end:]


def single_turn(question: str) -> str:
    """The prompt of a dialogue with one question: Human marker, question, Assistant marker."""
    return f"{HUMAN} {question}{ASSISTANT}"


def parse_row(row: Mapping[str, object], index: int = 0) -> Pair | Dropped:
    """One HH row {"chosen": text, "rejected": text} as a Pair, or Dropped with the reason.

    Raises DataError, naming the row, where the row is malformed: a column is missing or is not text.
    """
    texts: dict[str, str] = {}
    for side in ("chosen", "rejected"):
        value = row.get(side)
        if value is None:
            raise DataError(f"row {index} has no {side!r}: every row needs 'chosen' and 'rejected' texts")
        if not isinstance(value, str):
            raise DataError(f"row {index}: {side!r} is {type(value).__name__}, not text")
        texts[side] = value
    cut = {}
    for side, text in texts.items():
        if "\0" in text or not _is_unicode(text):
            return Dropped(index, f"{side} holds a NUL or a lone surrogate")
        if ASSISTANT not in text:
            return Dropped(index, f"{side} has no Assistant turn")
        cut[side] = split_prompt(text)
        if not cut[side][1].strip():
            return Dropped(index, f"{side} response is empty")
    (prompt, chosen), (other_prompt, rejected) = cut["chosen"], cut["rejected"]
    if prompt != other_prompt:
        return Dropped(index, "prompts differ")
    if chosen == rejected:
        return Dropped(index, "responses are identical")
    return Pair(prompt, chosen, rejected, index)


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_rows(rows: Iterable[Mapping[str, object]], max_dropped: float = 0.05) -> tuple[list[Pair], list[Dropped]]:
    """All rows as pairs, and those that were dropped.

    max_dropped: largest share of dropped rows that is accepted. Raises DataError for a malformed row, an
    empty data set, one without a usable pair, or more dropped rows than accepted.
    """
    pairs: list[Pair] = []
    dropped: list[Dropped] = []
    for index, row in enumerate(rows):
        result = parse_row(row, index)
        if isinstance(result, Pair):
            pairs.append(result)
        else:
            dropped.append(result)
    total = len(pairs) + len(dropped)
    if total == 0:
        raise DataError("the data set is empty: it needs rows with 'chosen' and 'rejected' texts")
    if len(dropped) > max_dropped * total:
        reason, count = Counter(d.reason for d in dropped).most_common(1)[0]
        raise DataError(
            f"{len(dropped)} of {total} rows cannot be used (most often: {reason}, {count} rows, first row "
            f"{next(d.index for d in dropped if d.reason == reason)}); check the file, or accept it with --max-dropped"
        )
    if not pairs:
        raise DataError(f"none of the {total} rows can be used")
    return pairs, dropped


def count_turns(prompt: str) -> int:
    """How many times the human speaks in a prompt."""
    return prompt.count(HUMAN)
