"""The sheet that every figure is drawn on: its look, its labels, its file and its sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from ...untrusted import one_line
from ..files import whole

COLOURS = sns.color_palette("colorblind")
MODEL_COLOUR = {
    "reference": COLOURS[7], "sft": COLOURS[1], "dpo": COLOURS[0], "dpo-from-sft": COLOURS[2],
    "dpo-320": COLOURS[9], "lora-320": COLOURS[5], "hot": (0.15, 0.15, 0.15),
}  # fmt: skip
MODEL_MARKER = {
    "reference": "o", "sft": "s", "dpo": "D", "dpo-from-sft": "P", "dpo-320": ">", "lora-320": "h", "hot": "X",
}  # fmt: skip
SIDE_COLOUR = {"prompt": COLOURS[7], "chosen": COLOURS[2], "rejected": COLOURS[3]}
# The course's β. None has a marker of a model above: both may be in one figure.
BETA_STYLE = {
    0.05: (COLOURS[3], "v"), 0.1: (COLOURS[9], "^"), 0.5: (COLOURS[0], "p"), 1.0: (COLOURS[2], "d"),
    5.0: (COLOURS[4], "*"),
}  # fmt: skip
OTHER_MARKERS = "<8"  # of any other β


def beta_style(beta: float) -> tuple[Any, str]:
    """(Colour, marker) of a β, the same in all figures: it goes by the value, whatever other β are drawn."""
    beta = float(f"{beta:g}")  # as it is named: a run's name gives the same
    if beta in BETA_STYLE:
        return BETA_STYLE[beta]
    colour = plt.get_cmap("viridis")(0.5 + math.atan(math.log10(beta)) / math.pi)
    return colour, OTHER_MARKERS[crc32(f"{beta:g}".encode()) % len(OTHER_MARKERS)]


def run_style(name: str) -> tuple[Any, str]:
    """(Colour, marker) of a run by its name: a model's, or that of the β in "β = 0.1"."""
    if name in MODEL_COLOUR:
        return MODEL_COLOUR[name], MODEL_MARKER[name]
    try:
        return beta_style(float(name.removeprefix("β = ")))
    except ValueError:  # the name of something else
        return COLOURS[5], "H"


def plot_start(axis: Axes, value: float) -> None:
    """The place of π_ref on a plane over the KL, where all runs start."""
    colour, marker = run_style("reference")
    axis.plot([0], [value], color=colour, marker=marker, ls="none", label="π_ref", zorder=3)


def scale_kl(axis: Axes, largest: float) -> None:
    """An x axis for a KL: linear up to 1, then logarithmic, with plain numbers up to the largest."""
    axis.set_xscale("symlog", linthresh=1.0)
    ticks = [tick for tick in (0, 0.5, 1, 3, 10, 30, 100, 300, 1000) if tick <= max(1.0, largest)]
    axis.set(xticks=ticks, xticklabels=[f"{tick:g}" for tick in ticks], xlim=(-0.08, 1.2 * largest + 0.08))
    axis.minorticks_off()


def new(
    columns: int = 1, rows: int = 1, width: float = 4.6, height: float = 3.4, **ratios: Sequence[float]
) -> tuple[Figure, list[Axes]]:
    """A figure of rows × columns axes, each width × height inches; the axes come row by row.

    ratios: width_ratios, height_ratios of columns and rows that are not alike.
    """
    sns.set_theme(style="whitegrid", palette="colorblind", rc={
        "text.usetex": False,  # whatever the reader's configuration says: labels are not for LaTeX
        "figure.facecolor": "white", "savefig.facecolor": "white", "savefig.transparent": False,
        "axes.titlesize": "medium", "legend.frameon": True,
    })  # fmt: skip
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **ratios)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure, list(axes.flat)


def legend(of: Axes | Figure, handles: Sequence[Artist] | None = None, title: str | None = None) -> None:
    """The legend of one axes, or of a whole figure whose axes share it, in as few rows as fit; `finish` puts it below.

    handles: what it explains; without them all that has a label, in a figure that of the first axes.
    """
    if isinstance(of, Figure):
        axis, loc, room = of.axes[0], "outside lower center", of.bbox.width
    else:
        grid: Any = of.get_gridspec()
        axis, loc, room = of, "upper center", 0.9 * of.figure.bbox.width / grid.ncols
    if handles is None:
        handles, _ = axis.get_legend_handles_labels()
    for rows in range(1, len(handles) + 1):
        columns = math.ceil(len(handles) / rows)
        box = of.legend(
            handles=handles, ncols=columns, loc=loc, title=title, fontsize="small", title_fontsize="small",
            columnspacing=1.2,
        )  # fmt: skip
        if columns == 1 or box.get_window_extent().width <= room:
            return
        box.remove()


def _put_legends_below(figure: Figure) -> None:
    """Each axes' legend below its tick labels and label, where nothing is drawn; the sheet grows to hold them all."""
    more = dict[int, float]()  # pixels, by row of axes
    for axis in figure.axes:
        if box := axis.get_legend():
            labels: Any = axis.xaxis.get_tightbbox()
            place: Any = axis.get_subplotspec()
            below = ScaledTranslation(0, (labels.y0 - axis.bbox.y0) / figure.dpi, figure.dpi_scale_trans)
            box.set_bbox_to_anchor((0.5, 0), axis.transAxes + below)
            more[place.rowspan.start] = max(more.get(place.rowspan.start, 0.0), box.get_window_extent().height)
    pixels = sum(more.values()) + sum(box.get_window_extent().height for box in figure.legends)
    figure.set_figheight(figure.get_figheight() + pixels / figure.dpi)


def along(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The points of a run that were measured alike: not the last one, of more prompts, where another has its update."""
    return rows[:-1] if len(rows) > 1 and rows[-2]["step"] == rows[-1]["step"] else rows


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
    """Save the figure as folder/name.png (nowhere without a folder), show it, print its summary.

    Raises ArtefactError, naming the file, where the disk refuses.
    """
    summary = one_line(summary)
    _put_legends_below(figure)
    if folder is not None:
        with whole(folder / f"{name}.png") as temporary:
            metadata = {"Description": summary, "Software": None}
            figure.savefig(temporary, format="png", dpi=120, metadata=metadata)
    if "inline" in plt.get_backend():
        plt.show()
    plt.close(figure)
    print(summary)
    return summary
