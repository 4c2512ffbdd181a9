"""The text format of HH-RLHF: dialogues as turns, pairs of them as (prompt, chosen, rejected).

A dialogue is a string of turns marked "\\n\\nHuman:" and "\\n\\nAssistant:". The prompt ends with the last
"\\n\\nAssistant:", inclusive; the response is the rest, its leading space kept. Cutting at the longest
common prefix of the two texts instead would eat words that both responses start with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .errors import DataError

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
MAX_DROPPED = 0.05  # share of the rows that may be unusable without --allow-dropped
_HTML = re.compile(r"</?[a-zA-Z][^<>]*>|<!--")


@dataclass(frozen=True)
class Pair:
    """One preference: two responses to the same prompt. `index` is the row's number in its data set, from 0."""

    prompt: str
    chosen: str
    rejected: str
    index: int = 0


@dataclass(frozen=True)
class Finding:
    """What is wrong with a row, and what was done: "dropped" from the data, "cut" to the limits, or "kept" as it is."""

    index: int
    reason: str
    action: str = "dropped"
    split: str = "train"


class Unreadable(str):
    """What a reader gives in place of a row that it could not read: the reason."""

    __slots__ = ()


class RowsError(DataError):
    """Too many rows cannot be used; `findings` has them all."""

    def __init__(self, message: str, findings: list[Finding]):
        super().__init__(message)
        self.findings = findings


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


def parse_row(row: object, index: int = 0) -> Pair | Finding:
    """One HH row {"chosen": text, "rejected": text} as a Pair, or a Finding with the reason why it cannot be one."""
    if isinstance(row, Unreadable):
        return Finding(index, str(row))
    if not isinstance(row, Mapping):
        return Finding(index, f"it is {type(row).__name__}, not an object with 'chosen' and 'rejected'")
    cut = {}
    for side in ("chosen", "rejected"):
        text = row.get(side)
        if text is None:
            return Finding(index, f"no {side!r}: every row needs 'chosen' and 'rejected' texts")
        if not isinstance(text, str):
            return Finding(index, f"{side!r} is {type(text).__name__}, not text")
        if "\0" in text or not _is_unicode(text):
            return Finding(index, f"{side} holds a NUL or a lone surrogate")
        if ASSISTANT not in text:
            return Finding(index, f"{side} has no Assistant turn")
        cut[side] = split_prompt(text)
        if not cut[side][1].strip():
            return Finding(index, f"{side} response is empty")
    (prompt, chosen), (other_prompt, rejected) = cut["chosen"], cut["rejected"]
    if prompt != other_prompt:
        return Finding(index, "prompts differ")
    if chosen == rejected:
        return Finding(index, "responses are identical")
    return Pair(prompt, chosen, rejected, index)


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_rows(
    rows: Iterable[object], *, allow_dropped: bool = False, split: str = "train"
) -> tuple[list[Pair], list[Finding]]:
    """All rows as pairs, and what was found wrong with the others, in the order of the rows.

    A pair that stands in the data both ways round, A preferred to B and B to A, says nothing: all rows of it are
    dropped. Text with HTML in it is kept, since it is data like any other, and reported. allow_dropped: accept it when
    more than MAX_DROPPED of the rows are dropped. Raises DataError for an empty data set, RowsError for one without a
    usable pair or with more dropped rows than accepted.
    """
    parsed = [parse_row(row, index) for index, row in enumerate(rows)]
    if not parsed:
        raise DataError("the data set is empty: it needs rows with 'chosen' and 'rejected' texts")
    first_row = {(p.prompt, p.chosen, p.rejected): p.index for p in reversed(parsed) if isinstance(p, Pair)}
    pairs: list[Pair] = []
    findings: list[Finding] = []
    for found in parsed:
        if isinstance(found, Pair):
            opposite = first_row.get((found.prompt, found.rejected, found.chosen))
            if opposite is not None:
                found = Finding(found.index, f"contradicts row {opposite}, which prefers the other response")
            elif _HTML.search(found.prompt + found.chosen + found.rejected):
                findings.append(Finding(found.index, "holds HTML, which is kept as text", "kept", split))
        if isinstance(found, Pair):
            pairs.append(found)
        else:
            findings.append(replace(found, split=split))
    check_dropped([f for f in findings if f.action == "dropped"], len(parsed), allow_dropped)
    return pairs, findings


def check_dropped(dropped: Sequence[Finding], total: int, allow_dropped: bool) -> None:
    """RowsError, naming the commonest reason and its first row, if more of `total` rows are dropped than accepted."""
    if len(dropped) <= (total - 1 if allow_dropped else MAX_DROPPED * total):
        return
    reason, count = Counter(d.reason for d in dropped).most_common(1)[0]
    first = next(d.index for d in dropped if d.reason == reason)
    way_out = "check the file" if allow_dropped else "check the file, or go on without them with --allow-dropped"
    raise RowsError(
        f"{len(dropped)} of {total} rows cannot be used (most often: {reason}; {count} rows, first row {first}); "
        + way_out,
        list(dropped),
    )


def count_turns(prompt: str) -> int:
    """How many times the human speaks in a prompt."""
    return prompt.count(HUMAN)
