"""Figures of notebook c: calibration, RLOO along its training, methods on one plane, over-optimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ...training import MetricsRow
from .canvas import COLOURS, MODEL_COLOUR, finish, label, legend, new, plot_start, scale_kl
from .runs import curve

KL_AXIS = "KL(π_θ‖π_ref), nats per response"
FAMILIES = {  # colour and marker of each kind of method, and where a name stands beside it, in points
    "DPO": (MODEL_COLOUR["dpo"], "D", (5, -11)), "RLOO": (COLOURS[1], "s", (5, -11)),
    "best of n": (COLOURS[2], "^", (-6, 5)), "on-policy DPO": (COLOURS[4], "P", (5, -12)),
}  # fmt: skip


def _with_errors(axis: Axes, rows: Sequence[Mapping[str, Any]], x: str, y: str, **look: Any) -> None:
    """Points of rows with the standard errors that they have."""
    across, up = ([row.get(f"{key}_se", 0.0) for row in rows] for key in (x, y))
    axis.errorbar([row[x] for row in rows], [row[y] for row in rows], xerr=across, yerr=up, capsize=2, **look)


def plot_calibration(models: Mapping[str, Sequence[Mapping[str, float]]], folder: Path | None = None) -> str:
    """Agreement with the labels, observed over predicted, of models by name: rows of `run.measures.calibration`."""
    figure, (axis,) = new(width=5, height=4)
    axis.plot([0.5, 1], [0.5, 1], color="grey", ls=":", label="as often as predicted")
    for colour, marker, (name, rows) in zip(COLOURS, "Dso^v", models.items(), strict=False):
        _with_errors(axis, rows, "predicted", "observed", color=colour, marker=marker, ms=6, label=label(name))
    axis.set(xlabel="agreement predicted", ylabel="agreement observed", title="Calibration on held-out pairs")
    legend(axis)
    surest = {name: rows[-1] for name, rows in models.items()}
    ends = "; ".join(f"{name} {row['observed']:.2f} ({row['predicted']:.2f})" for name, row in surest.items())
    return finish(figure, folder, "c-calibration", f"Agreement in the surest bin, observed (predicted): {ends}.")


def plot_rlhf_run(rows: Sequence[MetricsRow], folder: Path | None = None) -> str:
    """RLOO along its training: the reward model's score, the KL and, where it is known, the true reward.

    rows: of `training.train` with a `run.watch.Points`: score and k1 of the training samples, and held-out points with
    score, kl and true_reward, each with its standard error.
    """
    held = [row for row in rows if row["split"] == "held_out"]
    keys = [key for key in ("score", "true_reward", "kl") if all(key in row for row in held)]
    figure, axes = new(len(keys), width=3.8, height=3)
    train = [row | {"kl": row["k1"]} for row in rows if row["split"] == "train"]
    titles = {"score": "Score by the reward model", "true_reward": "True reward", "kl": "KL(π_θ‖π_ref), nats"}
    for axis, key, colour in zip(axes, keys, COLOURS, strict=False):
        curve(axis, [*train, *held], key, "KL" if key == "kl" else key.replace("_", " "), colour)
        axis.set(xlabel="update", title=titles[key])
        legend(axis)
    ways = ", ".join(f"{key.replace('_', ' ')} {held[0][key]:.2f} → {held[-1][key]:.2f}" for key in keys)
    return finish(figure, folder, "c-rlhf-run", f"On held-out prompts, from first to last point: {ways}.")


def plot_rlhf_plane(points: Sequence[Mapping[str, Any]], start: float, folder: Path | None = None) -> str:
    """Methods on the reward-KL plane: true reward of held-out answers over the KL, with standard errors.

    points: name, family (of FAMILIES), short (what stands beside the marker), kl, true_reward, each with _se. A line
    joins the points of a family. start: the true reward of π_ref.
    """
    figure, (axis,) = new(width=8, height=4.6)
    for family, (colour, marker, beside) in FAMILIES.items():
        rows = sorted((point for point in points if point["family"] == family), key=lambda point: point["kl"])
        if rows:
            line = "none" if family == "on-policy DPO" else "-"
            look = {"color": colour, "marker": marker, "ms": 7, "lw": 1, "ls": line, "elinewidth": 1}
            _with_errors(axis, rows, "kl", "true_reward", label=family, **look)
            for row in rows:
                place: dict[str, Any] = {"xytext": beside, "textcoords": "offset points"}
                place["ha"] = "left" if beside[0] > 0 else "right"
                at = row["kl"], row["true_reward"]
                axis.annotate(label(row["short"], 24), at, fontsize="x-small", color=colour, **place)
    plot_start(axis, start)
    axis.set(xlabel=KL_AXIS, ylabel="true reward", title="True reward against KL, from the same reference and pairs")
    scale_kl(axis, max(point["kl"] for point in points))
    legend(figure)
    text = ", ".join(f"{point['name']} {point['true_reward']:.2f} at {point['kl']:.2f}" for point in points)
    return finish(figure, folder, "c-rlhf-plane", f"True reward at KL: π_ref {start:.2f} at 0, {text}.")


def plot_parting(rows: Sequence[MetricsRow], scores: Mapping[str, str], folder: Path | None = None) -> str:
    """Over-optimisation (Gao et al. 2022, figure 1): what the reward models see and what is true, over the KL.

    rows: points along a training, the first one at its start, with kl, the scores and, where it is known, true_reward,
    each with its _se.
    scores: keys of scores in the rows, with their names. Drawn is the gain over the start: a score has no zero.
    """
    figure, (axis,) = new(width=6.5, height=4)
    parts = []
    drawn = {**scores, "true_reward": "true reward"} if "true_reward" in rows[0] else scores
    for colour, marker, (key, name) in zip(COLOURS[1:4], "svD", drawn.items(), strict=False):
        gains = [{**row, "gain": row[key] - rows[0][key], "gain_se": row[f"{key}_se"]} for row in rows]
        _with_errors(axis, gains, "kl", "gain", color=colour, marker=marker, ms=6, label=label(name))
        best = max(gains, key=lambda row: row["gain"])
        parts.append(f"{name} {gains[-1]['gain']:.2f} (highest {best['gain']:.2f} at KL {best['kl']:.2f})")
    axis.set(xlabel=KL_AXIS, ylabel="gain over the reference", title="What is optimised, and what is meant")
    scale_kl(axis, max(row["kl"] + row.get("kl_se", 0.0) for row in rows))
    legend(axis)
    return finish(figure, folder, "c-parting", f"Gain at the end, at KL {rows[-1]['kl']:.2f}: {', '.join(parts)}.")
