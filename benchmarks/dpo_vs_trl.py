"""This course against TRL's DPOTrainer, on the same work: `python -m benchmarks.dpo_vs_trl --help`.

Every measurement is a process of its own (`worker`); the rows take turns, and the median over the repeats counts.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.worker import ROWS, SWEEP
from benchmarks.workload import SHAPES, Workload, draw_pairs

RESULTS = Path(__file__).parent / "results"
TUNED, DEFAULTS, OURS, OURS_SWEEP = "TRL tuned (b)", "TRL defaults (a)", "ours", "ours, sweep"


def measure(row: str, work: Workload) -> dict[str, Any]:
    """One row once, in a process of its own."""
    asked = json.dumps({"row": row, "work": asdict(work)})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker", asked],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"error: row {row!r} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def seconds_per_pair(run: dict[str, Any], *, later: bool = False) -> float:
    """Of the training steps without the first one, which warms up; later: of the epochs after the first, if any."""
    steps = run["steps"][1:]
    if later and steps[-1][0] > 0:
        steps = [step for step in steps if step[0] > 0]
    return sum(s for _, _, s in steps) / sum(pairs for _, pairs, _ in steps)


def summarise(runs: dict[str, list[dict[str, Any]]], work: Workload) -> dict[str, dict[str, float]]:
    """Of each row the medians over its repeats: pairs/s over all epochs with precomputation, of later epochs, GB."""
    found: dict[str, dict[str, float]] = {}
    for row, repeats in runs.items():
        if row == "floor":
            continue
        sweep = len(SWEEP) if row == OURS_SWEEP else 1
        all_epochs, later, memory = [], [], []
        for run in repeats:
            precompute = run["precompute_s"] / work.pairs
            trained = work.epochs * sweep
            all_epochs.append(trained / (precompute + trained * seconds_per_pair(run)))
            later.append(1 / seconds_per_pair(run, later=True))
            memory.append(run["peak_gb"])
        found[row] = {
            "pairs_per_s": median(all_epochs), "pairs_per_s_min": min(all_epochs), "pairs_per_s_max": max(all_epochs),
            "later_pairs_per_s": median(later), "peak_gb": median(memory),
            "precompute_s_per_pair": median(run["precompute_s"] / work.pairs for run in repeats),
        }  # fmt: skip
    return found


def ratios(rows: dict[str, dict[str, float]], runs: dict[str, list[dict[str, Any]]], work: Workload) -> list[list[Any]]:
    """[what, measured, goal, whether it is met]; a row whose sides were not both measured is left out."""
    table: list[list[Any]] = []

    def add(what: str, value: float, goal: float, *, at_most: bool = False) -> None:
        table.append([what, value, f"{'≤' if at_most else '≥'} {goal:g}", value <= goal if at_most else value >= goal])

    ours, tuned = rows[OURS], rows.get(TUNED)
    if tuned:
        add(f"pairs/s over {work.epochs} epochs, × TRL tuned (b)", ours["pairs_per_s"] / tuned["pairs_per_s"], 6)
    if DEFAULTS in rows:
        faster = ours["pairs_per_s"] / rows[DEFAULTS]["pairs_per_s"]
        add(f"pairs/s over {work.epochs} epochs, × TRL's defaults (a)", faster, 12)
    if tuned:
        add("pairs/s of later epochs, × TRL tuned (b)", ours["later_pairs_per_s"] / tuned["later_pairs_per_s"], 8)
        if OURS_SWEEP in rows:
            faster = rows[OURS_SWEEP]["pairs_per_s"] / tuned["pairs_per_s"]
            add(f"sweep of {len(SWEEP)} β, × as many runs of TRL tuned", faster, 7)
        add("peak memory, of TRL tuned's", ours["peak_gb"] / tuned["peak_gb"], 0.35, at_most=True)
    if "floor" in runs:
        floor = median(run["later_s"] for run in runs["floor"]) / work.pairs
        add("efficiency: matrix-product floor / time, later epochs", floor * ours["later_pairs_per_s"], 0.6)
        first = median(run["first_s"] for run in runs["floor"]) / work.pairs
        table.append(
            ["efficiency of the first pass (frozen blocks, reference)", first / ours["precompute_s_per_pair"], "", None]
        )
    if tuned and runs[TUNED][0]["steps"]:
        ours_losses, theirs = runs[OURS][0]["losses"], runs[TUNED][0]["losses"]
        apart = max(abs(a - b) for a, b in zip(ours_losses, theirs, strict=False))
        table.append(
            [f"largest difference of the losses of the first {len(theirs)} updates", apart, "≤ 1e-4", apart <= 1e-4]
        )
    return table


def as_markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    shape = SHAPES[result["work"].get("model", "gpt2")]
    work, lines = result["work"], ["# DPO training, this course and TRL", ""]
    lines += [
        f"{shape.name} architecture, seeded random weights, the first {shape.frozen} of {shape.blocks} blocks and the "
        f"embeddings frozen; "
        f"{work['pairs']} pairs of `{work['data']}`, {result['tokens']} (prompt + both responses, tokens); batch "
        f"{work['batch_size']}, {work['epochs']} epochs (TRL's timed over {result['trl_epochs']}), "
        f"{result['repeats']} alternating repeats; {work['precision']} on {result['machine']}; "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        "", f"    {result['command']}", "",
        "| measure | measured | goal | met |", "|---|---|---|---|",
    ]  # fmt: skip
    met = {True: "yes", False: "**no**", None: ""}
    lines += [f"| {what} | {value:.3g} | {goal} | {met[ok]} |" for what, value, goal, ok in result["ratios"]]
    lines += [
        "",
        "| row | pairs/s, all epochs and precomputation (least … most) | later epochs | peak GB |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row} | {r['pairs_per_s']:.3g} ({r['pairs_per_s_min']:.3g} … {r['pairs_per_s_max']:.3g}) "
        f"| {r['later_pairs_per_s']:.3g} | {r['peak_gb']:.2f} |"
        for row, r in result["rows"].items()
    ]
    if "floor_rate" in result:
        lines += [
            "",
            f"Rate of the bare matrix products on their own shapes: {result['floor_rate'] / 1e9:.0f} GFLOP/s.",
        ]
    return "\n".join(lines) + "\n"


def main(
    data: Annotated[str, typer.Option(help="HH pairs: a file, or a Hub id")] = "Anthropic/hh-rlhf",
    tokenizer: Annotated[
        str, typer.Option(help="folder with vocab.json and merges.txt, or a Hub id")
    ] = "openai-community/gpt2",
    pairs: Annotated[int, typer.Option(help="drawn by seed over the whole length range")] = 48,
    batch_size: Annotated[int, typer.Option(help="pairs per update")] = 8,
    epochs: Annotated[int, typer.Option(help="passes over the pairs")] = 3,
    trl_epochs: Annotated[int, typer.Option(help="epochs that TRL is timed over; each does the same work")] = 3,
    repeats: Annotated[int, typer.Option(help="of every row, taking turns")] = 3,
    rows: Annotated[str, typer.Option(help="which, separated by semicolons: " + "; ".join(ROWS))] = ";".join(
        row for row in ROWS if "plain" not in row
    ),
    seed: Annotated[int, typer.Option(help="of the draw and of the order")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    model: Annotated[str, typer.Option(help=f"whose shape: {' or '.join(SHAPES)}")] = "gpt2",
    name: Annotated[str, typer.Option(help="of the two files in benchmarks/results/")] = "dpo_vs_trl",
) -> None:
    """Measure, print one table, and write it as Markdown and JSON into benchmarks/results/."""
    work = Workload(data, tokenizer, pairs, batch_size, epochs, seed, device, precision, model)
    chosen = [row.strip() for row in rows.split(";")]
    if OURS not in chosen or not set(chosen) <= set(ROWS):
        raise typer.BadParameter(f"rows are {'; '.join(ROWS)}, and {OURS!r} must be among them")
    lengths = [len(p.prompt) + len(p.chosen) + len(p.rejected) for p in draw_pairs(work)]
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in chosen}
    for repeat in range(repeats):
        for row in chosen:
            asked = replace(work, epochs=trl_epochs) if row.startswith("TRL") else work
            runs[row].append(measure(row, asked))
            print(f"repeat {repeat + 1} of {repeats}: {row}", file=sys.stderr, flush=True)
    found = summarise(runs, work)
    result = {
        "command": _command(), "work": asdict(work), "trl_epochs": trl_epochs, "repeats": repeats,
        "tokens": f"{min(lengths)} to {max(lengths)}, median {median(lengths):.0f}",
        "machine": _machine(device),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "trl")}},
        "rows": found, "ratios": ratios(found, runs, work), "runs": runs,
    }  # fmt: skip
    if "floor" in runs:
        result["floor_rate"] = median(run["rate"] for run in runs["floor"])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(as_markdown(result), encoding="utf-8")
    print(as_markdown(result))


def _command() -> str:
    def quoted(argument: str) -> str:
        return f"'{argument}'" if " " in argument else argument

    return " ".join(["python -m benchmarks.dpo_vs_trl", *map(quoted, sys.argv[1:])])


def _machine(device: str) -> str:
    """What a measurement ran on; of a CPU also how its threads wait."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models: Sequence[str] = [
        line.split(":")[1].strip()
        for line in (info.read_text(encoding="utf-8").splitlines() if info.is_file() else [])
        if line.startswith("model name")
    ]
    name = models[0] if models else platform.processor() or "a CPU"
    return f"{torch.get_num_threads()} threads of {name}, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', '')}"


if __name__ == "__main__":
    typer.run(main)
