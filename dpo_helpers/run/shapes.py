"""The shapes in which preference pairs are published, told apart by a row's columns and turned into HH's text.

- HH text: chosen, rejected: whole dialogues with Human and Assistant markers
- texts: prompt (or question), chosen, rejected: the prompt with HH's markers or without; perhaps a system text
- messages: chosen, rejected: lists of {"role", "content"}; prompt: a list, a text, or their common beginning
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError
from ..hh import ASSISTANT, HUMAN

_LISTED = re.compile(r"\s*\[\s*\{\s*.(role|content).\s*:")
Turn = tuple[str, str]  # role, content
MARKERS = {"user": HUMAN, "assistant": ASSISTANT}
WANTED = (
    "wanted are 'chosen' and 'rejected' dialogues with Human and Assistant markers; or 'prompt', 'chosen' and "
    "'rejected' texts; or 'chosen' and 'rejected' lists of messages with 'role' and 'content'"
)


class ShapeError(DataError):
    """Why a row cannot be turned into HH's text."""


def as_hh(row: object) -> tuple[object, str]:
    """A row as {"chosen": text, "rejected": text} with HH's markers, and the name of its shape.

    What is no object with both sides comes back as it is, for `hh.parse_row` to say. Raises ShapeError with the reason
    where turns are out of order, empty, or hold a marker, where a response does not follow its prompt, or where the
    columns are of none of the shapes.
    """
    if not isinstance(row, Mapping):
        return row, "no objects"
    prompt = row.get("prompt") or row.get("question") or None
    sides: dict[str, Any] = {side: row.get(side) for side in ("chosen", "rejected")}
    if None in sides.values():
        named = [str(key) for key in row]
        if {"completion", "label"} <= row.keys():
            raise ShapeError("single responses with a label, as for KTO, are no pairs: DPO needs two to each prompt")
        if not any(side in row for side in sides):
            raise ShapeError(f"its columns are {', '.join(named[:12]) or 'none'}; {WANTED}")
        return row, "HH text"
    system = turns_of(row.get("system"), "system")
    if any(isinstance(side, str) and _LISTED.match(side) for side in sides.values()):
        raise ShapeError("its messages are written as one text: give lists, in a .jsonl or .parquet file")
    are_lists = {isinstance(side, Sequence) and not isinstance(side, str) for side in sides.values()}
    if are_lists == {True}:
        first = turns_of(prompt, "user")
        turns = {side: _after(system, first, turns_of(value, "assistant")) for side, value in sides.items()}
        return {side: as_text(value) for side, value in turns.items()}, "messages"
    if prompt is None or not all(isinstance(side, str) for side in sides.values()):
        return row, "HH text"
    marked = isinstance(prompt, str) and ASSISTANT in f"\n\n{prompt.lstrip()}"
    begin = as_text(system) + _marked(prompt) if marked else as_text([*system, *_asked(prompt)]) + ASSISTANT
    return {side: _continued(begin, value) for side, value in sides.items()}, "texts"


def turns_of(value: Any, role: str) -> list[Turn]:
    """Messages as turns; a text is one turn of that role, nothing is none. ShapeError for what is no message."""
    if value is None or value == "":
        return []
    if not isinstance(value, Sequence):
        raise ShapeError(f"its {role} text is {type(value).__name__}, neither text nor a list of messages")
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    turns = []
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ShapeError("a message is no object with 'role' and 'content'")
        role, content = message["role"], message["content"]
        if role not in ("system", *MARKERS):
            raise ShapeError(f"a message has the role {str(role)[:40]!r}: known are system, user and assistant")
        if role == "system" and not str(content or "").strip():
            continue
        if not isinstance(content, str) or not content.strip():
            raise ShapeError(f"an empty turn of the {role}")
        if any(marker in f"\n\n{content}" for marker in MARKERS.values()):
            raise ShapeError(f"a turn of the {role} holds a Human or Assistant marker")
        turns.append((role, content.strip()))
    return turns


def as_text(turns: Sequence[Turn]) -> str:
    """Turns with HH's markers; a system turn, which HH does not know, stands before the first one, as it is."""
    roles = [role for role, _ in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"] * (len(spoken) % 2):
        raise ShapeError(f"roles are out of order: {', '.join(roles[:8])}")
    return "".join(f"{MARKERS[role]} {text.strip()}" if role in MARKERS else text.strip() for role, text in turns)


def _after(system: list[Turn], first: list[Turn], turns: list[Turn]) -> list[Turn]:
    """The turns of one side behind the prompt's, which it may begin with."""
    turns = turns if {*first} <= {*turns[:-1]} else [*first, *turns]
    return turns if turns[:1] and turns[0][0] == "system" else [*system, *turns]


def _asked(prompt: Any) -> list[Turn]:
    turns = turns_of(prompt, "user")
    if not turns or turns[-1][0] != "user":
        raise ShapeError("its prompt does not end with a turn of the user")
    return turns


def _marked(prompt: str) -> str:
    """A prompt that has HH's markers: from its first one to its last, with which it must end."""
    text = f"\n\n{prompt.strip()}" if not prompt.startswith("\n\n") else prompt.rstrip()
    if not text.endswith(ASSISTANT):
        raise ShapeError("its prompt has Human and Assistant markers, but does not end with the Assistant's")
    return text


def _continued(prompt: str, response: str) -> str:
    """The whole dialogue. response: what follows the prompt, or the whole dialogue already."""
    if response.startswith(prompt):
        return response
    if any(marker in f"\n\n{response.lstrip()}" for marker in MARKERS.values()):
        raise ShapeError("a response holds a Human or Assistant marker")
    return prompt + (response if response[:1].isspace() else f" {response}")
