"""Pictures that explain what a loss does: to probabilities, at one margin, to trainings, on the reward-KL plane."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from ...evaluation import Evaluation
from ...training import MetricsRow
from ...uncertainty import Interval
from ...worlds.tabular import TabularWorld, dpo_optimum, kl_divergence
from .canvas import COLOURS, along, beta_style, finish, label, legend, new, plot_start, run_style, scale_kl
from .runs import curve

MARGINS = (-2.0, 0.0, 3.0)  # of the version of `explore_loss` that needs no widgets
MARKERS = "oDs^v<>Xp*"
KL_AXIS = "KL(π_θ‖π_ref), nats per response"


def plot_mass(
    histories: Mapping[str, Tensor], responses: Sequence[str], folder: Path | None = None, name: str = "mass"
) -> str:
    """Where the probability goes during a training: stacked areas over updates, a panel a history.

    histories: probabilities [S, K] by name, one row per update, as `tabular.follow` gives them; responses: K names, the
    first at the bottom.
    """
    columns = 2 if len(histories) == 4 else min(3, len(histories))
    rows = math.ceil(len(histories) / columns)
    figure, axes = new(columns, rows, width=9 / columns, height=2.6)
    colours = COLOURS if len(responses) <= len(COLOURS) else sns.color_palette("viridis", len(responses))
    names = [label(response, 28) for response in responses]
    parts = []
    for axis, (title, history) in zip(axes, histories.items(), strict=False):
        shares = history.detach().cpu().double().numpy()
        updates = range(len(shares))
        axis.stackplot(updates, shares.T, labels=names, colors=colours[: len(names)], edgecolor="white", lw=0.6)
        axis.set(xlim=(0, len(shares) - 1), ylim=(0, 1), xlabel="update", title=label(title, 75 // columns))
        axis.locator_params(axis="x", integer=True)
        ways = zip(responses, shares[0], shares[-1], strict=True)
        parts.append(f"{title}: " + ", ".join(f"{response} {a:.2f} → {b:.2f}" for response, a, b in ways))
    for axis in axes[len(histories) :]:
        axis.set_axis_off()
    for axis in axes[::columns]:
        axis.set_ylabel("probability")
    legend(figure)
    return finish(figure, folder, name, f"Probabilities from first to last update. {'; '.join(parts)}.")


def plot_loss_and_weight(margins: Sequence[float], beta: float, folder: Path | None = None) -> str:
    """The DPO loss over the log-ratio margin with its tangents at some margins, and the weight of its gradient there.

    margins: of log-ratios, without β; the weight β·σ(−β·margin) is the slope of a tangent, with its sign turned.
    """
    figure, (left, right) = new(2, height=3.2, width=4.5)
    end = max(6.0, *(abs(margin) + 1 for margin in margins))
    x = np.linspace(-end, end, 241)
    left.plot(x, np.logaddexp(0, -beta * x), color="grey", lw=1.5)
    right.plot(x, _weight(x, beta), color="grey", lw=1.5)
    parts = []
    for colour, marker, margin in zip(COLOURS, MARKERS, margins, strict=False):
        loss, weight = float(np.logaddexp(0, -beta * margin)), float(_weight(margin, beta))
        reach = margin + np.array([-2.0, 2.0])
        left.plot(reach, loss - weight * (reach - margin), color=colour, lw=1.5, ls="--")
        for axis, y in ((left, loss), (right, weight)):
            axis.plot([margin], [y], color=colour, marker=marker, ms=8, ls="none", label=f"margin {margin:g}")
        parts.append(f"at margin {margin:g} the loss is {loss:.2f} and the weight {weight:.2f}")
    top = np.logaddexp(0, end * beta)
    left.set(xlabel="log-ratio margin", ylabel="loss", title=f"DPO loss, β = {beta:g}", ylim=(-0.05 * top, 1.05 * top))
    right.set(xlabel="log-ratio margin", ylabel="steepness of the loss", title="Weight of the gradient")
    right.set_ylim(-0.05 * beta, 1.1 * beta)
    for axis in (left, right):
        axis.set_xlim(-1.05 * end, 1.05 * end)
    legend(figure)
    return finish(figure, folder, "04-loss-and-weight", f"With β = {beta:g}, {'; '.join(parts)}.")


def plot_gradient_weight(folder: Path | None = None, betas: Sequence[float] = (0.1, 0.5, 1.0, 5.0)) -> str:
    """The DPO loss, and the weight β·σ(−margin) of its gradient, over the log-ratio margin, for several β."""
    figure, (left, right) = new(2)
    x = np.linspace(-6, 6, 241)
    for beta in betas:
        colour, marker = beta_style(beta)
        for axis, y in ((left, np.logaddexp(0, -beta * x)), (right, beta / (1 + np.exp(beta * x)))):
            axis.plot(x, y, color=colour, marker=marker, markevery=(20, 40), label=f"β = {beta:g}")
    left.set(xlabel="log-ratio margin", ylabel="loss", title="DPO loss", ylim=(-0.1, 4))
    right.set(xlabel="log-ratio margin", ylabel="β·σ(−reward margin)", title="Weight of the gradient", yscale="log")
    legend(figure)
    return finish(
        figure, folder, "04-gradient-weight",
        "All losses meet at ln 2 where the margin is 0; a larger β is steeper on the wrong side of 0 and flat sooner "
        "on the right side.",
    )  # fmt: skip


def _weight(margin: Any, beta: float) -> Any:
    return beta * np.exp(-np.logaddexp(0, beta * margin))


def explore_loss(beta: float = 0.5, folder: Path | None = None) -> str:
    """`plot_loss_and_weight` at three margins, then with sliders for margin and β, if ipywidgets is there.

    The figure under the sliders is replaced when a slider is let go. Returns the sentence on the first figure.
    """
    summary = plot_loss_and_weight(MARGINS, beta, folder)
    try:
        widgets, display = import_module("ipywidgets"), import_module("IPython.display")
    except ImportError:
        print("The sliders need ipywidgets, which is not installed: pip install ipywidgets.")
        return summary
    look = {"continuous_update": False, "readout_format": ".1f"}

    def draw(margin: float, beta: float) -> None:
        plot_loss_and_weight((margin,), beta)

    sliders = {
        "margin": widgets.FloatSlider(value=0.0, min=-6, max=6, step=0.1, description="margin", **look),
        "beta": widgets.FloatSlider(value=beta, min=0.1, max=5, step=0.1, description="β", **look),
    }
    display.display(widgets.interactive(draw, **sliders))
    return summary


def plot_puzzles(runs: Mapping[str, Sequence[MetricsRow]], folder: Path | None = None) -> str:
    """The curves of several DPO trainings to tell apart: loss, rewards and accuracy, a row of panels a run."""
    figure, axes = new(3, len(runs), width=3, height=2 + 0.6 / len(runs))
    parts = []
    for i, (name, rows) in enumerate(runs.items()):
        loss, rewards, accuracy = axes[3 * i : 3 * i + 3]
        curve(loss, rows, "loss", "loss", COLOURS[0])
        loss.axhline(np.log(2), color="grey", ls=":", label="ln 2")
        curve(rewards, rows, "chosen_reward", "chosen", COLOURS[2])
        curve(rewards, rows, "rejected_reward", "rejected", COLOURS[3])
        curve(accuracy, rows, "reward_accuracy", "accuracy", COLOURS[0])
        accuracy.set(ylim=(0, 1.02), xlim=loss.get_xlim())  # it begins later: before the first update all pairs tie
        loss.set_ylabel(label(name, 16), fontweight="bold", fontsize="small")
        held = [row for row in rows if row["split"] == "held_out"] or list(rows)
        parts.append(
            f"{name}: loss {held[-1]['loss']:.2f}, rewards {held[-1]['chosen_reward']:.2f} and "
            f"{held[-1]['rejected_reward']:.2f}, "
            + ("all pairs tie" if held[-1].get("ties", 0) == 1 else f"accuracy {held[-1]['reward_accuracy']:.2f}")
        )
    for axis, title in zip(axes, ("DPO loss", "Implicit rewards", "Reward accuracy"), strict=False):
        axis.set_title(title)
    for axis in axes[-3:]:
        axis.set_xlabel("update")
    handles = [
        Line2D([], [], color="grey", lw=1.2, alpha=0.6, label="training pairs"),
        Line2D([], [], color="grey", lw=1.5, marker="o", ms=4, label="held-out pairs"),
        Line2D([], [], color=COLOURS[2], lw=4, label="chosen"),
        Line2D([], [], color=COLOURS[3], lw=4, label="rejected"),
        Line2D([], [], color="grey", ls=":", label="ln 2"),
    ]
    legend(figure, handles)
    return finish(figure, folder, "05-puzzles", f"At the end (chosen before rejected): {'; '.join(parts)}.")


def plot_optimum_frontier(world: TabularWorld, betas: Sequence[float], folder: Path | None = None) -> str:
    """What is possible in a tabular world: the mean reward of π* over its KL to π_ref, for β from 20 down to 0.05.

    No policy lies above the line. betas: those that get a point.
    """

    def place(beta: float) -> tuple[float, float]:
        best = dpo_optimum(world, beta)
        return kl_divergence(best, world.reference), (best * world.reward).sum().item()

    figure, (axis,) = new(width=6.5, height=4)
    line = [place(beta) for beta in np.geomspace(20, 0.05, 200)]
    axis.plot(*zip(*line, strict=True), color="grey", lw=1.5, label="π*, β from 20 to 0.05")
    start = (world.reference * world.reward).sum().item()
    plot_start(axis, start)
    points = {beta: place(beta) for beta in sorted(betas, reverse=True)}
    for beta, (kl, reward) in points.items():
        colour, marker = beta_style(beta)
        axis.plot([kl], [reward], color=colour, marker=marker, ms=8, ls="none", label=f"β = {beta:g}")
    axis.axhline(world.reward.max().item(), color="grey", ls=":", label="reward of the best response")
    axis.set(xlabel="KL(π*‖π_ref), nats", ylabel="mean reward", title="The best policy at each distance from π_ref")
    legend(axis)
    text = ", ".join(f"{reward:.2f} at KL {kl:.2f} with β = {beta:g}" for beta, (kl, reward) in points.items())
    return finish(figure, folder, "06-optimum-frontier", f"Mean reward of π*: {text}; π_ref has {start:.2f}.")


def plot_plane_filling(
    frontier: Mapping[str, Sequence[MetricsRow]], reference: Evaluation, folder: Path | None = None
) -> str:
    """The reward-KL plane after each quarter of the trainings: the path of each run so far, on the same axes.

    frontier: points of each run by name, as `run.measures.get_frontier` gives them; reference: where all start.
    The reward is the true one where it is known, otherwise the implicit margin.
    """
    key = "true_reward" if "true_reward" in reference.metrics else "reward_margin"
    runs = {name: along([row for row in rows if key in row]) for name, rows in frontier.items()}
    runs = {name: rows for name, rows in runs.items() if rows}
    start = reference.metrics[key]
    figure, axes = new(2, 2, width=4.5, height=3)
    parts = []
    for quarter, axis in enumerate(axes, 1):
        best = (start, "the reference", 0.0)
        for name, rows in runs.items():
            colour, marker = run_style(name)
            so_far = [row for row in rows if row["step"] <= math.ceil(rows[-1]["step"] * quarter / 4)]
            x, y = [0.0, *(row["kl"] for row in so_far)], [start, *(row[key] for row in so_far)]
            axis.plot(x, y, color=colour, lw=1.2, marker=".", ms=5)
            if so_far:
                axis.plot(x[-1:], y[-1:], color=colour, lw=1.2, marker=marker, ms=7, label=label(name))
            best = max([best, *((row[key], name, row["kl"]) for row in so_far)])
        parts.append(f"after {quarter}/4 {best[0]:.2f} ({best[1]}, KL {best[2]:.2f})")
        plot_start(axis, start)
        axis.set_title(f"After {quarter}/4 of each training")
    _same_plane(axes, start, [row for rows in runs.values() for row in rows], key)
    legend(figure, axes[-1].get_legend_handles_labels()[0])  # in the others a run may not have begun
    summary = f"Highest {key.replace('_', ' ')} so far: {', '.join(parts)}."
    return finish(figure, folder, "06-plane-filling", summary)


def _same_plane(axes: Sequence[Axes], start: float, rows: Sequence[MetricsRow], key: str) -> None:
    """The same scales and limits on four axes: room for all points."""
    xs, ys = [0.0, *(row["kl"] for row in rows)], [start, *(row[key] for row in rows)]
    room = 0.06 * (max(ys) - min(ys) or 1.0)
    for axis in axes:
        scale_kl(axis, max(xs))
        axis.set_ylim(min(ys) - room, max(ys) + room)
    for axis in axes[2:]:
        axis.set_xlabel(KL_AXIS)
    for axis in axes[::2]:
        axis.set_ylabel(key.replace("_", " "))


def plot_win_rates(rates: Mapping[str, Interval], folder: Path | None = None) -> str:
    """Win rates by name, from top to bottom, with their intervals; the line at 1/2 is where no model wins."""
    figure, (axis,) = new(width=7, height=0.9 + 0.36 * len(rates))
    axis.axvline(0.5, color="black", lw=0.8)
    for y, rate in enumerate(rates.values()):
        reach = [[rate.estimate - rate.low], [rate.high - rate.estimate]]
        axis.errorbar([rate.estimate], [y], xerr=reach, color=COLOURS[0], marker="o", capsize=3, ls="none")
    axis.set(ylim=(len(rates) - 0.5, -0.5), yticks=range(len(rates)), yticklabels=[label(of) for of in rates])
    axis.set(xlabel=f"win rate, {next(iter(rates.values())).level:.0%} interval")
    axis.grid(False, axis="y")
    said = "; ".join(f"{of} {rate}" for of, rate in rates.items())
    return finish(figure, folder, "07-win-rates", f"Win rates: {said}.")
