"""The text format of HH-RLHF: dialogues as turns, pairs of them as (prompt, chosen, rejected).

A dialogue is a string of turns marked "\\n\\nHuman:" and "\\n\\nAssistant:". The prompt ends with the last
"\\n\\nAssistant:", inclusive; the response is the rest, its leading space kept. Cutting at the longest
common prefix of the two texts instead would eat words that both responses start with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
class Finding:
    """What is wrong with a row, and what was done: "dropped" from the data, "cut" to the limits, or "kept" as it is."""

    index: int
    reason: str
    action: str = "dropped"
    split: str = "train"


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


def as_messages(prompt: str) -> list[dict[str, str]]:
    """A prompt as a chat template takes it: its turns so far; a text before the first marker is the system's."""
    system, *turns = re.split(f"({HUMAN}|{ASSISTANT})", prompt.removesuffix(ASSISTANT))  # text, mark, text, mark, …
    spoken = [
        ("user" if mark == HUMAN else "assistant", text) for mark, text in zip(turns[::2], turns[1::2], strict=True)
    ]
    first = [("system", system)] if system.strip() else []
    return [{"role": role, "content": text.strip()} for role, text in (*first, *spoken)]


def parse_row(row: object, index: int = 0) -> Pair | Finding:
    """One HH row {"chosen": text, "rejected": text} as a Pair, or a Finding with the reason why it cannot be one."""
    if not isinstance(row, Mapping):
        return Finding(index, f"it is {type(row).__name__}, not an object with 'chosen' and 'rejected'")
    cut = {}
    for side in ("chosen", "rejected"):
        text = row.get(side)
        if text is None:
            return Finding(index, f"no {side!r}: every row needs 'chosen' and 'rejected' texts")
        if not isinstance(text, str):
            return Finding(index, f"{side!r} is {type(text).__name__}, not text")
        if "\0" in text or text != text.encode(errors="ignore").decode():
            return Finding(index, f"{side} holds a NUL or a lone surrogate")
        text = f"\n\n{text.lstrip()}" if text.lstrip().startswith(HUMAN.lstrip()) else text  # may be stripped
        if ASSISTANT not in text:
            return Finding(index, f"{side} has no Assistant turn")
        cut[side] = split_prompt(text)
        if not cut[side][1].strip():
            return Finding(index, f"{side} response is empty")
        if HUMAN in cut[side][1]:
            return Finding(index, f"{side} goes on with a Human turn after its last Assistant turn")
    (prompt, chosen), (other_prompt, rejected) = cut["chosen"], cut["rejected"]
    if prompt != other_prompt:
        return Finding(index, "prompts differ")
    if chosen == rejected:
        return Finding(index, "responses are identical")
    return Pair(prompt, chosen, rejected, index)
