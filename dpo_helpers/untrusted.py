"""Text of data, of models and of other people's files is untrusted: what shows or writes it goes through here."""

from __future__ import annotations

import unicodedata

_ACTIVE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # Unicode's categories of characters that do something unseen


def visible(text: str) -> str:
    """The text with every character written out that acts instead of being seen, so that none takes effect.

    These are control characters (no escape sequence reaches a terminal), format characters (none turns the direction
    of a text), lone surrogates (which cannot be written to a file), private ones, and separators of lines and
    paragraphs. Newlines and tabs stay. It says nothing about HTML, which is escaped where a page is made.
    """
    return text if text.isprintable() else "".join(map(_show, text))


def _show(char: str) -> str:
    if char in "\n\t" or unicodedata.category(char) not in _ACTIVE:
        return char
    number = ord(char)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def one_line(text: str) -> str:
    """`visible` text on one line: for a name or a label, which must not look like several."""
    return visible(text).replace("\n", " ").replace("\t", " ")
