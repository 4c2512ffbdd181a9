"""The sheet that every figure is drawn on: its look, its labels, its file and its sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...untrusted import one_line

COLOURS = sns.color_palette("colorblind")
MODEL_COLOUR = {"reference": COLOURS[7], "sft": COLOURS[1], "dpo": COLOURS[0], "dpo-from-sft": COLOURS[2]}
MODEL_MARKER = {"reference": "o", "sft": "s", "dpo": "D", "dpo-from-sft": "P"}


def new(
    columns: int = 1,
    rows: int = 1,
    width: float = 4.6,
    height: float = 3.4,
    *,
    layout: str | None = None,
    **ratios: Sequence[float],
) -> tuple[Figure, list[Axes]]:
    """A figure of rows × columns axes, each width × height inches; the axes come row by row.

    layout: "constrained" makes room for legends and colour bars beside the axes; without it, `finish` tightens.
    ratios: width_ratios, height_ratios of columns and rows that are not alike.
    """
    sns.set_theme(style="whitegrid", palette="colorblind", rc={
        "text.usetex": False,  # whatever the reader's configuration says: labels are not for LaTeX
        "figure.facecolor": "white", "savefig.facecolor": "white", "savefig.transparent": False,
        "axes.titlesize": "medium", "legend.frameon": True,
    })  # fmt: skip
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout=layout, **ratios)
    return figure, list(axes.flat)


def label(name: str, length: int = 40) -> str:
    """A name of data or of a model as a label, shortened: matplotlib would read $…$ in it as a formula."""
    return shorten(one_line(name), length).replace("$", r"\$")


def shorten(text: str, length: int) -> str:
    """At most `length` characters of a text, the last of them "…" where it goes on."""
    return text if len(text) <= length else text[: length - 1] + "…"


def token_text(token: str) -> str:
    """A token as it is shown: a newline and a tab as signs, since in a token they are what counts."""
    return one_line(token.replace("\n", "↵").replace("\t", "⇥"))


def quoted(token: str, length: int = 24) -> str:
    """A token in a sentence: in quotation marks, with its leading space."""
    return f"“{shorten(token_text(token), length)}”"


def finish(figure: Figure, folder: Path | None, name: str, summary: str) -> str:
    """Save the figure as folder/name.png (nowhere without a folder), show it, print its summary."""
    summary = one_line(summary)
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=120, metadata={"Description": summary, "Software": None})
    if "inline" in plt.get_backend():
        plt.show()
    plt.close(figure)
    print(summary)
    return summary
