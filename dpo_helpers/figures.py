"""Figures. Each is drawn from a run, saved as PNG, and described in one printed sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .evaluation import Evaluation
from .training import MetricsRow

COLOURS = sns.color_palette("colorblind")
MODEL_COLOUR = {"reference": COLOURS[7], "sft": COLOURS[1], "dpo": COLOURS[0]}
MODEL_MARKER = {"reference": "o", "sft": "s", "dpo": "D"}


def _new(columns: int = 1, rows: int = 1, width: float = 4.6, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    sns.set_theme(style="whitegrid", palette="colorblind", rc={
        "figure.facecolor": "white", "savefig.facecolor": "white", "savefig.transparent": False,
        "axes.titlesize": "medium", "legend.frameon": True,
    })  # fmt: skip
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    return figure, list(axes.flat)


def _finish(figure: Figure, folder: Path | None, name: str, summary: str) -> str:
    """Save the figure as folder/name.png (nowhere without a folder), show it, print its summary."""
    figure.tight_layout()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=120, metadata={"Description": summary, "Software": None})
    if "inline" in plt.get_backend():
        plt.show()
    plt.close(figure)
    print(summary)
    return summary


def plot_lengths(lengths: Mapping[str, Sequence[int]], folder: Path | None = None) -> str:
    """Histograms of token lengths, by name ("prompt", "chosen", "rejected")."""
    figure, (axis,) = _new(width=6)
    for colour, (name, values) in zip(COLOURS, lengths.items(), strict=False):
        sns.histplot(x=list(values), ax=axis, label=name, color=colour, element="step", alpha=0.25, bins=30)
    axis.set(xlabel="tokens", ylabel="pairs", title="Lengths of the training pairs")
    axis.legend()
    means = ", ".join(f"{name} {np.mean(list(values)):.0f}" for name, values in lengths.items())
    return _finish(figure, folder, "01-lengths", f"Histogram of token lengths; mean lengths: {means} tokens.")


def _smooth(values: Sequence[float], window: int) -> np.ndarray[Any, Any]:
    x = np.asarray(values, dtype=float)
    window = max(1, min(window, len(x)))
    return np.convolve(x, np.ones(window) / window, mode="valid")


def _curve(axis: Axes, rows: Sequence[MetricsRow], key: str, label: str, colour: Any) -> None:
    train = [row for row in rows if row["split"] == "train" and key in row]
    held = [row for row in rows if row["split"] == "held_out" and key in row]
    window = max(1, len(train) // 20)
    if train:
        smooth = _smooth([row[key] for row in train], window)
        axis.plot([row["step"] for row in train][window - 1 :], smooth, color=colour, lw=1.2, alpha=0.6)
    if held:
        errors = [row.get(f"{key}_se", 0.0) for row in held]
        axis.errorbar(
            [row["step"] for row in held], [row[key] for row in held], yerr=errors, color=colour, marker="o", ms=4,
            lw=1.5, capsize=2, label=f"{label}, held out",
        )  # fmt: skip


def plot_sft(rows: Sequence[MetricsRow], folder: Path | None = None) -> str:
    """Loss of supervised fine-tuning, training (moving mean) and held-out pairs, over updates."""
    figure, (axis,) = _new(width=6)
    _curve(axis, rows, "loss", "loss", COLOURS[1])
    axis.set(xlabel="update", ylabel="nats a token", title="SFT: negative log-likelihood of chosen responses")
    axis.legend()
    held = [row["loss"] for row in rows if row["split"] == "held_out"]
    return _finish(
        figure, folder, "03-sft",
        f"SFT loss on held-out chosen responses goes from {held[0]:.2f} to {held[-1]:.2f} nats a token.",
    )  # fmt: skip


def plot_gradient_weight(folder: Path | None = None, betas: Sequence[float] = (0.1, 0.5, 1.0, 5.0)) -> str:
    """The DPO loss, and the weight β·σ(−margin) of its gradient, over the log-ratio margin, for several β."""
    figure, (left, right) = _new(2)
    x = np.linspace(-6, 6, 241)
    for colour, beta in zip(COLOURS, betas, strict=False):
        left.plot(x, np.logaddexp(0, -beta * x), color=colour, label=f"β = {beta:g}")
        right.plot(x, beta / (1 + np.exp(beta * x)), color=colour, label=f"β = {beta:g}")
    left.set(xlabel="log-ratio margin", ylabel="loss", title="DPO loss", ylim=(0, 4))
    right.set(xlabel="log-ratio margin", ylabel="β·σ(−reward margin)", title="Weight of the gradient", yscale="log")
    left.legend()
    return _finish(
        figure, folder, "04-gradient-weight",
        "All losses meet at ln 2 where the margin is 0; a larger β is steeper on the wrong side of 0 and flat sooner "
        "on the right side.",
    )  # fmt: skip


def plot_dpo(rows: Sequence[MetricsRow], folder: Path | None = None) -> str:
    """DPO training: loss, chosen and rejected rewards, margin, accuracy; training and held-out pairs."""
    figure, (loss, rewards, margin, accuracy) = _new(2, 2)
    _curve(loss, rows, "loss", "loss", COLOURS[0])
    loss.axhline(np.log(2), color="grey", ls=":", label="ln 2")
    _curve(rewards, rows, "chosen_reward", "chosen", COLOURS[2])
    _curve(rewards, rows, "rejected_reward", "rejected", COLOURS[3])
    _curve(margin, rows, "reward_margin", "margin", COLOURS[0])
    _curve(accuracy, rows, "reward_accuracy", "accuracy", COLOURS[0])
    accuracy.axhline(0.5, color="grey", ls=":", label="coin flip")
    titles = ("DPO loss", "Implicit rewards", "Reward margin", "Reward accuracy")
    for axis, title in zip((loss, rewards, margin, accuracy), titles, strict=True):
        axis.set(title=title, xlabel="update")
        axis.legend(fontsize="small")
    last = [row for row in rows if row["split"] == "held_out"][-1]
    return _finish(
        figure, folder, "05-dpo-training",
        f"On held-out pairs DPO ends at loss {last['loss']:.2f}, reward margin {last['reward_margin']:.2f} and "
        f"accuracy {last['reward_accuracy']:.2f}.",
    )  # fmt: skip


def _point(axis: Axes, evaluation: Evaluation, key: str, label: str, colour: Any, marker: str) -> None:
    m = evaluation.metrics
    axis.errorbar(
        m["kl"], m[key], xerr=m["kl_se"], yerr=m[f"{key}_se"], label=label, color=colour, marker=marker, ms=8,
        capsize=3, ls="none",
    )  # fmt: skip


def plot_reward_kl(evaluations: Mapping[str, Evaluation], folder: Path | None = None) -> str:
    """Models on the reward-KL plane: implicit reward margin, and true reward where it is known, against the KL."""
    known = all("true_reward" in e.metrics for e in evaluations.values())
    figure, axes = _new(2 if known else 1)
    for name, evaluation in evaluations.items():
        colour, marker = MODEL_COLOUR.get(name, COLOURS[0]), MODEL_MARKER.get(name, "o")
        _point(axes[0], evaluation, "reward_margin", name, colour, marker)
        if known:
            _point(axes[1], evaluation, "true_reward", name, colour, marker)
    titles = ("Reward margin on held-out pairs", "True reward of sampled answers")
    for axis, title in zip(axes, titles, strict=False):
        axis.set(xlabel="KL(π_θ‖π_ref), nats a response", ylabel=title.split(" o")[0].lower(), title=title)
        axis.legend()
    key = "true_reward" if known else "reward_margin"
    points = ", ".join(f"{n} ({e.metrics['kl']:.2f}, {e.metrics[key]:.2f})" for n, e in evaluations.items())
    return _finish(figure, folder, "05-reward-kl", f"(KL, {key.replace('_', ' ')}) with standard errors: {points}.")


def plot_sweep(evaluations: Mapping[float, Evaluation], folder: Path | None = None) -> str:
    """The β sweep: rewards, KL, accuracy and, where it is known, the true reward of samples, over β."""
    known = all("true_reward" in e.metrics for e in evaluations.values())
    figure, axes = _new(2, 2)
    betas = sorted(evaluations)
    series: list[tuple[Axes, str, str, Any]] = [
        (axes[0], "chosen_reward", "chosen", COLOURS[2]), (axes[0], "rejected_reward", "rejected", COLOURS[3]),
        (axes[1], "kl", "KL(π_θ‖π_ref)", COLOURS[0]), (axes[1], "chosen_logratio", "chosen log-ratio", COLOURS[4]),
        (axes[2], "reward_accuracy", "accuracy", COLOURS[0]),
        (axes[3], "true_reward" if known else "reward_margin", "mean", COLOURS[2]),
    ]  # fmt: skip
    for axis, key, label, colour in series:
        values = [evaluations[b].metrics[key] for b in betas]
        errors = [evaluations[b].metrics[f"{key}_se"] for b in betas]
        axis.errorbar(betas, values, yerr=errors, label=label, color=colour, marker="o", capsize=3)
    titles = ("Implicit rewards, held out", "Distance from π_ref", "Reward accuracy, held out",
              "True reward of samples" if known else "Reward margin, held out")  # fmt: skip
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", xlabel="β", title=title, xticks=betas, xticklabels=[f"{b:g}" for b in betas])
        axis.minorticks_off()
    axes[0].legend()
    axes[1].legend()
    kls = ", ".join(f"{evaluations[b].metrics['kl']:.2f} at β = {b:g}" for b in betas)
    return _finish(figure, folder, "06-beta-sweep", f"Measured KL to the reference: {kls}.")


def plot_text_measures(evaluations: Mapping[str, Evaluation], folder: Path | None = None) -> str:
    """Bars of length, share of ended responses, repeated 3-grams and distinct-2, a bar a model."""
    figure, axes = _new(4, width=2.6)
    keys = {"length": "length, tokens", "ended": "ended by itself", "repeated_3grams": "repeated 3-grams",
            "distinct_2": "distinct-2"}  # fmt: skip
    names = list(evaluations)
    for axis, (key, title) in zip(axes, keys.items(), strict=True):
        values = [evaluations[n].metrics[key] for n in names]
        errors = [evaluations[n].metrics.get(f"{key}_se", 0.0) for n in names]
        axis.bar(names, values, yerr=errors, color=[MODEL_COLOUR.get(n, COLOURS[0]) for n in names], capsize=3)
        axis.set(title=title)
        axis.tick_params(axis="x", rotation=30)
    lengths = ", ".join(f"{n} {evaluations[n].metrics['length']:.0f}" for n in names)
    return _finish(figure, folder, "07-text-measures", f"Mean length of sampled responses in tokens: {lengths}.")
