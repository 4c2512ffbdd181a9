"""The table and the figure of `benchmarks.real_run`, from its results: `python -m benchmarks.real_report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.dpo_vs_trl import RESULTS
from dpo_helpers.show.figures.canvas import beta_style, finish, legend, new
from dpo_helpers.uncertainty import paired_difference

HEADER = ("run", "updates", "loss", "reward accuracy", "reward margin", "chosen log-ratio", "KL, nats", "length")


def changes(run: dict[str, Any], base: dict[str, Any]) -> str:
    """What a run has that the base has not, in words."""
    words = {"beta": "β = {:g}", "rate": "rate {:g}", "seed": "seed {}", "epochs": "{} epochs",
             "template": "--template {}", "max_length": "max_length {}", "frozen": "{} blocks frozen"}  # fmt: skip
    said = [text.format(run[key]) for key, text in words.items() if key == "beta" or run[key] != base[key]]
    return ", ".join(said)


def table(results: dict[str, Any]) -> str:
    """All runs as Markdown: means ± one standard error, accuracy with its 95 % interval."""
    base = results["runs"][min(results["runs"])]["run"] | {"rate": results["rate"], "template": "auto"}
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for found in sorted(results["runs"].values(), key=lambda found: not found["run"]["validate"]):
        run, metrics, sampled = found["run"], found["metrics"], found.get("sampled", {})
        accuracy = found["intervals"]["reward_accuracy"]
        where = f"rate {run['rate']:g}, on the validation split" if run["validate"] else changes(run, base)
        lines.append(
            f"| {where} | {found['updates']} | {_mean(metrics, 'loss', 3)} "
            f"| {accuracy['estimate']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}] "
            f"| {_mean(metrics, 'reward_margin', 3)} | {_mean(metrics, 'chosen_logratio', 2)} "
            f"| {_mean(sampled, 'kl', 2)} | {_mean(sampled, 'length', 0)} |"
        )
    return "\n".join(lines)


def _mean(metrics: dict[str, float], key: str, digits: int) -> str:
    if key not in metrics:
        return "–"
    return f"{metrics[key]:.{digits}f} ± {metrics[f'{key}_se']:.{digits}f}"


def against_longer(results: dict[str, Any]) -> str:
    """Each run's accuracy beside that of always preferring the longer response, paired by held-out pair."""
    lines = []
    for found in results["runs"].values():
        run = found["run"]
        what = results["data"][str((run["template"], run["max_length"], run["frozen"]))]
        if not run["validate"]:
            right, longer = (torch.tensor(x, dtype=torch.float64) for x in (found["right"], what["longer_right"]))
            lines.append(f"{run}: {paired_difference(right, longer)}, longer wins {what['longer_wins']:.3f}")
    return "\n".join(lines)


def draw(results: dict[str, Any], folder: Path) -> str:
    """Held-out accuracy and log-ratio margin along the trainings, and the plane of log-ratio margin and measured KL."""
    figure, axes = new(3, width=4.0, height=3.4)
    runs = [found for found in results["runs"].values() if not found["run"]["validate"]]
    plain = [f for f in runs if f["run"]["rate"] == results["rate"] and f["run"]["template"] == "auto"
             and f["run"]["epochs"] == 1 and f["run"]["max_length"] == 512]  # fmt: skip
    for found in plain:
        beta, seed = found["run"]["beta"], found["run"]["seed"]
        colour, marker = beta_style(beta)
        look: dict[str, Any] = {"color": colour, "marker": marker, "ls": "-" if seed == 0 else ":", "capsize": 2}
        steps = [0] + [row["step"] for row in found["curve"]]
        for axis, key, start, scale in ((axes[0], "reward_accuracy", 0.5, 1.0), (axes[1], "reward_margin", 0.0, beta)):
            values = [start] + [row[key] / scale for row in found["curve"]]
            errors = [0.0] + [row[f"{key}_se"] / scale for row in found["curve"]]
            axis.errorbar(steps, values, yerr=errors, label=f"β = {beta:g}, seed {seed}", **look)
    what = results["data"][str(("auto", 512, plain[0]["run"]["frozen"]))]
    axes[0].axhline(what["longer_wins"], color="0.4", ls="--", label="longer wins")
    axes[0].set(title="Reward accuracy, held out", xlabel="update", ylabel="share of pairs")
    axes[1].set(title="Log-ratio margin, held out", xlabel="update", ylabel="nats")
    for found in runs:
        if "sampled" in found:
            run, metrics, sampled = found["run"], found["metrics"], found["sampled"]
            colour, marker = beta_style(run["beta"])
            is_plain = found in plain
            said = f"β = {run['beta']:g}" + (
                "" if is_plain else f", {run['epochs']} epochs" if run["epochs"] > 1 else f", rate {run['rate']:g}"
            )
            axes[2].errorbar(
                sampled["kl"], metrics["reward_margin"] / run["beta"], xerr=sampled["kl_se"],
                yerr=metrics["reward_margin_se"] / run["beta"], color=colour, marker=marker, ls="none",
                mfc=colour if is_plain else "white", capsize=2, label=said,
            )  # fmt: skip
    axes[2].plot([0], [0], "o", color="0.4", label="π_ref")
    axes[2].set(title="Margin against measured KL", xlabel="KL(π_θ‖π_ref), nats", ylabel="log-ratio margin, nats")
    for axis in axes:
        legend(axis)
    return finish(figure, folder, "real-run", "Accuracy, margin and KL of DPO on real pairs.")


def main(out: Path = RESULTS / "real_run.json", figure: Path = Path("docs")) -> None:
    """Print the table and draw the figure."""
    results = json.loads(out.read_text(encoding="utf-8"))
    print(table(results), against_longer(results), draw(results, figure), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
