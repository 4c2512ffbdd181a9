"""How this course scales, alone: `python -m benchmarks.scaling --help`.

Time per pair from 100 to 1,000 pairs (GPT-2 124M), and resident memory from 200 to 20,000 pairs (the embedded model).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.dpo_vs_trl import RESULTS, _machine, seconds_per_pair
from benchmarks.worker import ours
from benchmarks.workload import BETA, FROZEN, Workload, draw_pairs, train_dpo
from dpo_helpers.device import Compute
from dpo_helpers.evaluation import score_pairs
from dpo_helpers.fast.engine import FastScorer
from dpo_helpers.models import freeze
from dpo_helpers.run.loading import load_model
from dpo_helpers.run.loading import load_tokenizer as mini_tokenizer
from dpo_helpers.run.machine import peak_memory_gb
from dpo_helpers.run.pairs import load_pairs
from dpo_helpers.settings import load_settings
from dpo_helpers.tokens import encode_pairs
from dpo_helpers.training import TrainPlan


def time_per_pair(work: Workload) -> dict[str, Any]:
    """One epoch with its precomputation on GPT-2 124M: seconds per pair of both."""
    pairs = draw_pairs(work)
    run = ours(work, pairs, [BETA], fast=True)
    first, later = run["precompute_s"] / len(pairs), seconds_per_pair(run)
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) - 2 for p in pairs) / len(pairs)
    return {"pairs": len(pairs), "tokens_a_pair": tokens, "first_s": first, "later_s": later, "total_s": first + later}


def memory(n: int) -> dict[str, Any]:
    """Peak resident memory of scoring n pairs of the embedded world and training on them for one epoch."""
    settings = load_settings("mini", max_pairs=n)
    model, tokenizer = load_model(settings), mini_tokenizer(settings)
    freeze(model, FROZEN)
    pairs = list(encode_pairs(tokenizer, load_pairs(settings).train, max_length=256, max_prompt_length=128))
    compute = Compute(torch.device("cpu"), "fp32")
    ids_gb = peak_memory_gb(compute)
    scorer = FastScorer(model, pairs, FROZEN)
    scores = score_pairs(model, pairs, scorer, compute)
    plan = TrainPlan(
        epochs=1, batch_size=16, micro_batch_size=16, learning_rate=1e-5, optimizer="rmsprop", warmup_steps=0,
        schedule="constant", max_grad_norm=10.0, seed=0,
    )  # fmt: skip
    train_dpo(model, pairs, scorer, scores, BETA, plan, compute)
    return {
        "pairs": n, "kept_gb": scorer.store.used * model.config.hidden_size * 4 / 1e9, "before_gb": ids_gb,
        "peak_gb": peak_memory_gb(compute),
    }  # fmt: skip


def main(
    data: Annotated[str, typer.Option(help="HH pairs: a file, or a Hub id")] = "Anthropic/hh-rlhf",
    tokenizer: Annotated[
        str, typer.Option(help="folder with vocab.json and merges.txt, or a Hub id")
    ] = "openai-community/gpt2",
    sizes: Annotated[str, typer.Option(help="numbers of pairs whose time is measured")] = "100,300,1000",
    memory_sizes: Annotated[str, typer.Option(help="numbers of pairs whose memory is measured")] = "200,2000,20000",
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure both and write them into benchmarks/results/."""
    if one:
        kind, n = one.split(":")
        work = Workload(data, tokenizer, int(n), 8, 1, 0, "cpu", "fp32")
        print("RESULT " + json.dumps(time_per_pair(work) if kind == "time" else memory(int(n))))
        return
    result: dict[str, Any] = {"machine": _machine("cpu"), "time": [], "memory": []}
    for kind, wanted in (("memory", memory_sizes), ("time", sizes)):
        for n in filter(None, wanted.split(",")):
            arguments = ["--data", data, "--tokenizer", tokenizer, "--one", f"{kind}:{n}"]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.scaling", *arguments], capture_output=True, text=True,
                cwd=Path(__file__).parents[1],
            )  # fmt: skip
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise SystemExit(f"error: {kind} of {n} pairs failed:\n{done.stderr[-3000:]}")
            result[kind].append(json.loads(lines[-1].removeprefix("RESULT ")))
            print(kind, result[kind][-1], file=sys.stderr, flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scaling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "scaling.md").write_text(as_markdown(result), encoding="utf-8")
    print(as_markdown(result))


def as_markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    lines = ["# Scaling, this course alone", "", f"On {result['machine']}.", ""]
    if result["time"]:
        lines += [
            "| pairs (124M, batch 8) | tokens per pair | first pass, s per pair | later, s per pair | both |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['pairs']} | {r['tokens_a_pair']:.0f} | {r['first_s']:.3f} | {r['later_s']:.3f} "
            f"| {r['total_s']:.3f} |"
            for r in result["time"]
        ]
        totals = [r["total_s"] for r in result["time"]]
        lines += ["", f"Largest distance from the median: {max(abs(t / median(totals) - 1) for t in totals):.1%}.", ""]
    if result["memory"]:
        lines += ["| pairs (embedded model) | kept outputs, GB | peak before, GB | peak, GB |", "|---|---|---|---|"]
        lines += [
            f"| {r['pairs']} | {r['kept_gb']:.3f} | {r['before_gb']:.3f} | {r['peak_gb']:.3f} |"
            for r in result["memory"]
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
