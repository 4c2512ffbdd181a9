"""Figures of a run: its data, its trainings, and what was measured of its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from torch import Tensor

from ...evaluation import Evaluation
from ...training import MetricsRow
from ...worlds.tabular import TabularWorld
from .. import study
from .canvas import (
    COLOURS,
    MODEL_COLOUR,
    MODEL_MARKER,
    SIDE_COLOUR,
    along,
    beta_style,
    finish,
    label,
    legend,
    new,
    plot_start,
    run_style,
    scale_kl,
)


def plot_lengths(lengths: Mapping[str, Sequence[int]], folder: Path | None = None) -> str:
    """Histograms of token lengths, by name ("prompt", "chosen", "rejected")."""
    figure, (axis,) = new(width=6)
    for name, values in lengths.items():
        colour = SIDE_COLOUR.get(name, COLOURS[0])
        sns.histplot(x=list(values), ax=axis, label=label(name), color=colour, element="step", alpha=0.25, bins=30)
    axis.set(xlabel="tokens", ylabel="pairs", title="Lengths of the training pairs")
    legend(axis)
    means = ", ".join(f"{name} {np.mean(list(values)):.0f}" for name, values in lengths.items())
    return finish(figure, folder, "01-lengths", f"Histogram of token lengths; mean lengths: {means} tokens.")


def _smooth(values: Sequence[float], window: int) -> np.ndarray[Any, Any]:
    x = np.asarray(values, dtype=float)
    window = max(1, min(window, len(x)))
    return np.convolve(x, np.ones(window) / window, mode="valid")


def curve(axis: Axes, rows: Sequence[MetricsRow], key: str, name: str, colour: Any) -> None:
    """One metric over updates: training (moving mean) as a line, held-out pairs as points with standard errors."""
    train = [row for row in rows if row["split"] == "train" and key in row]
    held = [row for row in rows if row["split"] == "held_out" and key in row]
    if key == "reward_accuracy":
        held = [row for row in held if row["ties"] < 1]  # before the first update all pairs tie: there is none yet
    window = max(1, len(train) // 20)
    if train:
        smooth = _smooth([row[key] for row in train], window)
        axis.plot(
            [row["step"] for row in train][window - 1 :],
            smooth,
            color=colour,
            lw=1.2,
            alpha=0.6,
            label=f"{name}, training",
        )
    if held:
        errors = [row.get(f"{key}_se", 0.0) for row in held]
        axis.errorbar(
            [row["step"] for row in held], [row[key] for row in held], yerr=errors, color=colour, marker="o", ms=4,
            lw=1.5, capsize=2, label=f"{name}, held out",
        )  # fmt: skip


def plot_sft(rows: Sequence[MetricsRow], folder: Path | None = None) -> str:
    """Loss of supervised fine-tuning, training (moving mean) and held-out pairs, over updates."""
    figure, (axis,) = new(width=6)
    curve(axis, rows, "loss", "loss", COLOURS[1])
    axis.set(xlabel="update", ylabel="nats per token", title="SFT: negative log-likelihood of chosen responses")
    legend(axis)
    held = [row["loss"] for row in rows if row["split"] == "held_out"]
    return finish(
        figure, folder, "03-sft",
        f"SFT loss on held-out chosen responses goes from {held[0]:.2f} to {held[-1]:.2f} nats per token.",
    )  # fmt: skip


def _baselines(axis: Axes, baselines: Mapping[str, float]) -> None:
    for style, (name, value) in zip((":", "--", "-."), baselines.items(), strict=False):
        axis.axhline(value, color="grey", ls=style, lw=1.2, label=f"{label(name)}: {value:.2f}")


def plot_dpo(rows: Sequence[MetricsRow], baselines: Mapping[str, float], folder: Path | None = None) -> str:
    """DPO training: loss, chosen and rejected rewards, margin, accuracy; training and held-out pairs.

    baselines: accuracies to compare with, by name ("longer wins", "best possible").
    """
    figure, (loss, rewards, margin, accuracy) = new(2, 2)
    curve(loss, rows, "loss", "loss", COLOURS[0])
    loss.axhline(np.log(2), color="grey", ls=":", label="ln 2")
    curve(rewards, rows, "chosen_reward", "chosen", COLOURS[2])
    curve(rewards, rows, "rejected_reward", "rejected", COLOURS[3])
    curve(margin, rows, "reward_margin", "margin", COLOURS[0])
    curve(accuracy, rows, "reward_accuracy", "accuracy", COLOURS[0])
    _baselines(accuracy, baselines)
    titles = ("DPO loss", "Implicit rewards", "Reward margin", "Reward accuracy")
    for axis, title in zip((loss, rewards, margin, accuracy), titles, strict=True):
        axis.set(title=title, xlabel="update")
        legend(axis)
    last = [row for row in rows if row["split"] == "held_out"][-1]
    return finish(
        figure, folder, "05-dpo-training",
        f"On held-out pairs DPO ends at loss {last['loss']:.2f}, reward margin {last['reward_margin']:.2f} and "
        f"accuracy {last['reward_accuracy']:.2f} ({', '.join(f'{n}: {v:.2f}' for n, v in baselines.items())}).",
    )  # fmt: skip


def _point(axis: Axes, m: MetricsRow, key: str, name: str, colour: Any, marker: str) -> None:
    axis.errorbar(
        m["kl"], m[key], xerr=m["kl_se"], yerr=m[f"{key}_se"], label=label(name), color=colour, marker=marker, ms=8,
        capsize=3, ls="none",
    )  # fmt: skip


def plot_reward_kl(
    evaluations: Mapping[str, Evaluation], folder: Path | None = None, name: str = "05-reward-kl"
) -> str:
    """Models on the reward-KL plane: implicit reward margin, and true reward where it is known, against the KL."""
    known = all("true_reward" in e.metrics for e in evaluations.values())
    figure, axes = new(2 if known else 1)
    for model, evaluation in evaluations.items():
        colour, marker = MODEL_COLOUR.get(model, COLOURS[0]), MODEL_MARKER.get(model, "o")
        _point(axes[0], evaluation.metrics, "reward_margin", model, colour, marker)
        if known:
            _point(axes[1], evaluation.metrics, "true_reward", model, colour, marker)
    titles = ("Reward margin on held-out pairs", "True reward of sampled answers")
    for axis, title in zip(axes, titles, strict=False):
        axis.set(xlabel="KL(π_θ‖π_ref), nats per response", ylabel=title.split(" o")[0].lower(), title=title)
    legend(figure)
    key = "true_reward" if known else "reward_margin"
    points = ", ".join(f"{n} ({e.metrics['kl']:.2f}, {e.metrics[key]:.2f})" for n, e in evaluations.items())
    return finish(figure, folder, name, f"(KL, {key.replace('_', ' ')}) with standard errors: {points}.")


def _over_beta(axis: Axes, points: Mapping[float, tuple[float, float]], name: str, colour: Any, style: str) -> None:
    """A line over β through (value, standard error); each point has the marker of its β, in the colour of the line."""
    axis.plot(list(points), [value for value, _ in points.values()], color=colour, ls=style, label=name)
    for beta, (value, error) in points.items():
        axis.errorbar([beta], [value], yerr=[error], color=colour, marker=beta_style(beta)[1], ms=8, capsize=3)


def _beta_axis(axis: Axes, betas: Sequence[float], title: str) -> None:
    ticks = {"xticks": betas, "xticklabels": [f"{beta:g}" for beta in betas]}
    axis.set(xscale="log", xlabel="β", title=title, **ticks)
    axis.minorticks_off()


def _measured(sweep: Mapping[float, Evaluation], key: str) -> dict[float, tuple[float, float]]:
    """(Value, standard error) by β, the smallest first."""
    return {beta: (sweep[beta].metrics[key], sweep[beta].metrics[f"{key}_se"]) for beta in sorted(sweep)}


def plot_sweep(
    evaluations: Mapping[float, Evaluation], baselines: Mapping[str, float], folder: Path | None = None
) -> str:
    """The β sweep: rewards, KL, accuracy and, where it is known, the true reward of samples, over β."""
    known = all("true_reward" in e.metrics for e in evaluations.values())
    figure, axes = new(2, 2)
    betas = sorted(evaluations)
    series: list[tuple[Axes, str, str, Any]] = [
        (axes[0], "chosen_reward", "chosen", COLOURS[2]), (axes[0], "rejected_reward", "rejected", COLOURS[3]),
        (axes[1], "kl", "KL(π_θ‖π_ref)", COLOURS[0]),
        (axes[2], "reward_accuracy", "accuracy", COLOURS[0]),
        (axes[3], "true_reward" if known else "reward_margin", "mean", COLOURS[2]),
    ]  # fmt: skip
    for axis, key, name, colour in series:
        _over_beta(axis, _measured(evaluations, key), name, colour, "-")
    titles = ("Implicit rewards, held out", "Distance from π_ref", "Reward accuracy, held out",
              "True reward of samples" if known else "Reward margin, held out")  # fmt: skip
    for axis, title in zip(axes, titles, strict=True):
        _beta_axis(axis, betas, title)
    _baselines(axes[2], baselines)
    for axis in axes[:3]:
        legend(axis)
    kls = ", ".join(f"{evaluations[b].metrics['kl']:.2f} at β = {b:g}" for b in betas)
    return finish(figure, folder, "06-beta-sweep", f"Measured KL to the reference: {kls}.")


def plot_frontier(runs: Mapping[str, Sequence[MetricsRow]], reference: Evaluation, folder: Path | None = None) -> str:
    """Runs along their training on the reward-KL plane (paper, figure 2): true reward, and implicit margin, over KL.

    runs: points of each run by name, as `run.measures.get_frontier` gives them; a line joins those that were measured
    alike, the large marker is the last one. reference: measured; it is where all runs start. Without a known true
    reward only the margin is drawn.
    """
    keys = ("true_reward", "reward_margin") if "true_reward" in reference.metrics else ("reward_margin",)
    figure, axes = new(len(keys), width=5.2, height=4)
    for axis, key in zip(axes, keys, strict=True):
        for name, rows in runs.items():
            _path(axis, [row for row in rows if key in row], key, reference.metrics[key], name)
        title = {"true_reward": "True reward of samples", "reward_margin": "Implicit reward margin, held out"}[key]
        axis.set(xlabel="KL(π_θ‖π_ref), nats per response", ylabel=key.replace("_", " "), title=title)
        scale_kl(axis, max(row["kl"] + np.nan_to_num(row.get("kl_se", 0.0)) for rows in runs.values() for row in rows))
        plot_start(axis, reference.metrics[key])
    legend(figure)
    ends = ", ".join(f"{name} {rows[-1][keys[0]]:.2f} at KL {rows[-1]['kl']:.2f}" for name, rows in runs.items())
    summary = f"{keys[0].replace('_', ' ').capitalize()} at the end of each training: {ends}."
    return finish(figure, folder, "06-frontier", summary)


def _path(axis: Axes, points: Sequence[MetricsRow], key: str, start: float, name: str) -> None:
    colour, marker = run_style(name)
    x, y = ([at_start, *(row[of] for row in along(points))] for at_start, of in ((0.0, "kl"), (start, key)))
    axis.plot(x, y, color=colour, lw=1, marker=".", ms=5)
    _point(axis, points[-1], key, name, colour, marker)


def plot_study(
    rows: Sequence[MetricsRow],
    comparison: Mapping[str, Evaluation],
    sweep: Mapping[float, Evaluation],
    folder: Path | None = None,
) -> str:
    """The source study's three figures from our runs with its estimator, its published points beside them.

    Loss by epoch (ours: by fifth of the run), reward against "KL" (both from the chosen log-ratio), "KL" over β; in the
    last also the measured KL.
    """
    figure, (loss, plane, by_beta) = new(3, width=4.2)
    ours, theirs = COLOURS[0], COLOURS[3]
    epochs = range(1, len(study.LOSS_BY_EPOCH) + 1)
    loss.plot(epochs, study.LOSS_BY_EPOCH, color=theirs, marker="s", label="study, by epoch")
    parts = study.loss_by_part(rows, len(epochs))
    loss.plot(epochs[: len(parts)], parts, color=ours, marker="o", label="ours, by fifth of the run")
    loss.axhline(np.log(2), color="grey", ls=":", label="ln 2")
    loss.set(xlabel="epoch (ours: fifth)", ylabel="DPO loss", title="Training loss")
    for name, (reward, kl) in study.REWARD_AND_KL.items():
        plane.scatter(kl, reward, color=theirs, marker=MODEL_MARKER[name], label=f"study, {name}")
    for name in study.REWARD_AND_KL:
        reward, kl = study.study_point(comparison[name])
        plane.scatter(kl, reward, color=ours, marker=MODEL_MARKER[name], label=f"ours, {name}")
    line = np.array(plane.get_xlim())
    plane.plot(line, comparison["dpo"].beta * line, color="grey", lw=1, ls="--", label="β × “KL”")
    plane.set(xlabel="“KL” = chosen log-ratio", ylabel="“reward”", title="Reward against “KL”")
    betas = sorted(sweep)
    _over_beta(by_beta, {beta: (kl, 0.0) for beta, kl in study.SWEEP_KL.items()}, "study, “KL”", theirs, "-")
    for key, name, style in (("chosen_logratio", "ours, “KL”", "-"), ("kl", "ours, measured KL", "--")):
        _over_beta(by_beta, _measured(sweep, key), name, ours, style)
    _beta_axis(by_beta, sorted({*study.SWEEP_KL, *betas}), "“KL” and measured KL")
    for axis in (loss, plane, by_beta):
        legend(axis)
    low, high = sweep[betas[0]].metrics, sweep[betas[-1]].metrics
    summary = (
        f"From β = {betas[0]:g} to {betas[-1]:g} the chosen log-ratio goes from {low['chosen_logratio']:.2f} to "
        f"{high['chosen_logratio']:.2f}, the measured KL from {low['kl']:.2f} to {high['kl']:.2f}."
    )
    return finish(figure, folder, "06-study", summary)


def plot_tabular(
    world: TabularWorld, policies: Mapping[str, Tensor], gaps: Mapping[int, float], folder: Path | None = None
) -> str:
    """The tabular laboratory: probabilities of the responses, by falling reward, and the gap by number of preferences.

    policies: probabilities [K] by name; gaps: total variation distance to π* by number of preferences.
    """
    figure, (left, right) = new(2, width=5.2)
    order = world.reward.argsort(descending=True)
    x = np.arange(len(order))
    left.bar(x, world.reference[order].numpy(), color="lightgrey", label="π_ref")
    for colour, marker, (name, policy) in zip(COLOURS, "ox+s^", policies.items(), strict=False):
        left.plot(x, policy[order].numpy(), color=colour, marker=marker, ls="none", label=label(name))
    left.set(xlabel="response, best first", ylabel="probability", title="Where the losses end", xticks=x[::2])
    n, gap = np.array(list(gaps)), np.array(list(gaps.values()))
    right.plot(n, gap, color=COLOURS[0], marker="o", label="DPO")
    right.plot(n, gap[0] * np.sqrt(n[0] / n), color="grey", ls=":", label="1/√n")
    right.set(xscale="log", yscale="log", xlabel="preferences", ylabel="total variation to π*")
    right.set_title("What finite data costs")
    for axis in (left, right):
        legend(axis)
    text = ", ".join(f"{gap:.3f} with {n:,}" for n, gap in gaps.items())
    return finish(figure, folder, "04-tabular", f"Total variation distance to π* by number of preferences: {text}.")


def plot_text_measures(evaluations: Mapping[str, Evaluation], folder: Path | None = None) -> str:
    """Bars of length, share of ended responses, repeated 3-grams, loops and distinct-2, a bar a model."""
    figure, axes = new(5, width=2.5)
    keys = {"length": "length, tokens", "ended": "ended by itself", "repeated_3grams": "repeated 3-grams",
            "looping": "ends in a loop", "distinct_2": "distinct-2"}  # fmt: skip
    names = list(evaluations)
    for axis, (key, title) in zip(axes, keys.items(), strict=True):
        values = [evaluations[n].metrics[key] for n in names]
        errors = [evaluations[n].metrics.get(f"{key}_se", float("nan")) for n in names]
        colours = [MODEL_COLOUR.get(n, COLOURS[0]) for n in names]
        axis.bar(list(map(label, names)), values, yerr=errors, color=colours, capsize=3)
        axis.set(title=title)
        for text in axis.get_xticklabels():
            text.set(rotation=30, ha="right", rotation_mode="anchor")
    lengths = ", ".join(f"{n} {evaluations[n].metrics['length']:.0f}" for n in names)
    return finish(figure, folder, "07-text-measures", f"Mean length of sampled responses in tokens: {lengths}.")
