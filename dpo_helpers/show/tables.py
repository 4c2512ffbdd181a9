"""Show tables and text in a notebook. Data and model text is untrusted: it is escaped, never rendered."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from IPython.display import HTML, display

from ..generation import Response
from ..tokens import EncodedPair
from ..untrusted import one_line, visible


def show_text(title: str, text: str) -> None:
    """Print a text under a title, indented, as it is."""
    print(f"{one_line(title)}:")
    for line in visible(text).strip("\n").split("\n"):
        print(f"    {line}")


def html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table as HTML, every cell escaped; line breaks in cells are kept. Numbers get three decimals at most.

    The classes keep MathJax, which JupyterLab and nbconvert run over a page, from reading $…$ in a cell as a formula:
    it would mangle prices, and a formula can be a link to anywhere, whatever it says.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{html.escape(visible(str(column)))}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(row.get(column, ''))}</td>" for column in columns) + "</tr>" for row in rows
    )
    return (
        f'<table class="dpo mathjax_ignore tex2jax_ignore"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def _cell(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return html.escape(visible(text)).replace("\n", "<br>")


def show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Display rows as a table: a column for each key, text to the left."""
    cells = "table.dpo.mathjax_ignore"  # two classes: JupyterLab's own rule, text to the right, has two
    style = f"<style>{cells} td, {cells} th {{text-align: left; vertical-align: top}}</style>"
    display(HTML(style + html_table(rows)))  # type: ignore[no-untyped-call]


def show_masks(pair: EncodedPair, tokenizer: Any, side: str = "chosen") -> None:
    """One side of a pair three ways, one token per line: id, text, and whether it is scored (response) or not."""
    response = pair.chosen if side == "chosen" else pair.rejected
    print("position      id  scored  token")
    for position, token in enumerate(pair.prompt + response):
        scored = "yes" if position >= len(pair.prompt) else "-"
        print(f"{position:8d} {token:7d}  {scored:6s}  {visible(tokenizer.decode([token]))!r}")


def show_side_by_side(prompts: Sequence[str], by_model: Mapping[str, Sequence[Response]]) -> None:
    """The responses of several models to the same prompts, one row per prompt, one column per model."""
    rows = []
    for i, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": prompt}
        for name, responses in by_model.items():
            row[name] = responses[i].text.strip() + ("" if responses[i].ended else " …")
        rows.append(row)
    show_table(rows)
