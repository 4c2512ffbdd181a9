"""How this course scales, alone: `python -m benchmarks.scaling --help`.

One size grows at a time, each measurement in a process of its own: pairs (of HH-RLHF on GPT-2 124M; of the embedded
world up to 20,000), tokens of a prompt (GPT-2 124M), β of a sweep, processes of one training (the embedded model, one
thread each). The time is that of the first pass, which scores the reference, and of one epoch for each β. "exponent" is
the slope of log time (memory) over log size, by least squares: 1 is proportional, 0 is constant.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import linear_regression, median
from typing import Annotated, Any

import torch
import typer

from benchmarks.dpo_vs_trl import RESULTS, _machine, seconds_per_pair
from benchmarks.worker import ours
from benchmarks.workload import BETA, FROZEN, Workload, draw_pairs, make_model, train_dpo
from dpo_helpers.device import Compute
from dpo_helpers.evaluation import score_pairs
from dpo_helpers.fast.engine import FastScorer
from dpo_helpers.fast.flat import tokens_of
from dpo_helpers.models import freeze
from dpo_helpers.run import processes
from dpo_helpers.run.loading import load_model
from dpo_helpers.run.loading import load_tokenizer as mini_tokenizer
from dpo_helpers.run.machine import peak_memory_gb
from dpo_helpers.run.pairs import load_pairs
from dpo_helpers.settings import load_settings
from dpo_helpers.tokens import EncodedPair, encode_pairs
from dpo_helpers.training import TrainPlan


def time_per_pair(work: Workload) -> dict[str, Any]:
    """One epoch with its precomputation on GPT-2 124M: seconds per pair of both."""
    pairs = draw_pairs(work)
    run = ours(work, pairs, [BETA], fast=True)
    first, later = run["precompute_s"] / len(pairs), seconds_per_pair(run)
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) - 2 for p in pairs) / len(pairs)
    return {"pairs": len(pairs), "tokens_a_pair": tokens, "first_s": first, "later_s": later, "total_s": first + later}


def mini_pairs(n: int) -> tuple[Any, list[EncodedPair]]:
    """The embedded model, frozen as in the course, and n pairs of its world."""
    settings = load_settings("mini", max_pairs=n)
    model, tokenizer = load_model(settings), mini_tokenizer(settings)
    freeze(model, FROZEN)
    return model, list(encode_pairs(tokenizer, load_pairs(settings).train, max_length=256, max_prompt_length=128))


def grow(model: Any, pairs: Sequence[EncodedPair], *, betas: int = 1, batch: int = 16) -> dict[str, Any]:
    """Score the pairs and train on them for one epoch at each of so many β: seconds, and peak resident memory."""
    compute = Compute(torch.device("cpu"), "fp32")
    before = peak_memory_gb(compute)
    started = time.perf_counter()
    scorer = FastScorer(model, pairs, FROZEN)
    scores = score_pairs(model, pairs, scorer, compute)
    scored = time.perf_counter() - started
    plan = TrainPlan(
        epochs=1, batch_size=batch, micro_batch_size=batch, learning_rate=1e-6, optimizer="rmsprop", warmup_steps=0,
        schedule="constant", max_grad_norm=10.0, seed=0,
    )  # fmt: skip
    for _ in range(betas):  # the weights go on from β to β, which changes no time
        train_dpo(model, pairs, scorer, scores, BETA, plan, compute)
    seconds = time.perf_counter() - started
    kept = sum(map(tokens_of, pairs)) * model.config.hidden_size * 4 / 1e9
    found = {"seconds": seconds, "first_pass_s": scored, "kept_gb": kept, "before_gb": before}
    return {**found, "peak_gb": peak_memory_gb(compute), "processes": processes.count()}


def with_prompts_of(tokens: int) -> dict[str, Any]:
    """GPT-2 124M on 16 pairs with prompts of so many tokens and responses of 60."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50256, (16, tokens + 120), generator=generator).tolist()
    pairs = [EncodedPair(row[:tokens], row[tokens:-60], row[-60:], index) for index, row in enumerate(ids)]
    return grow(make_model(), pairs, batch=8)


GROWTH: dict[str, tuple[str, Sequence[int], Callable[[int], dict[str, Any]]]] = {
    "pairs": ("pairs, embedded model", (200, 2000, 20000), lambda n: grow(*mini_pairs(n))),
    "prompt": ("tokens of a prompt, GPT-2 124M, 16 pairs", (64, 225, 450, 900), with_prompts_of),
    "betas": ("β of a sweep, embedded model, 640 pairs", (1, 2, 4, 8), lambda n: grow(*mini_pairs(640), betas=n)),
    "processes": ("processes, embedded model, 1,280 pairs", (1, 2), lambda n: grow(*mini_pairs(1280))),
}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log value over log size by least squares."""
    return linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


def main(
    data: Annotated[str, typer.Option(help="HH pairs: a file, or a Hub id")] = "Anthropic/hh-rlhf",
    tokenizer: Annotated[
        str, typer.Option(help="folder with vocab.json and merges.txt, or a Hub id")
    ] = "openai-community/gpt2",
    sizes: Annotated[str, typer.Option(help="numbers of HH pairs on GPT-2; empty for none")] = "100,300,1000",
    growth: Annotated[str, typer.Option(help=f"what grows, of {', '.join(GROWTH)}")] = ",".join(GROWTH),
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure and write the tables into benchmarks/results/."""
    if one:
        kind, n = one.split(":")
        work = Workload(data, tokenizer, int(n), 8, 1, 0, "cpu", "fp32")
        found = time_per_pair(work) if kind == "time" else {"size": int(n), **GROWTH[kind][2](int(n))}
        if processes.is_main():
            print("RESULT " + json.dumps(found))
        return
    result: dict[str, Any] = {"machine": _machine("cpu"), "time": [], **{kind: [] for kind in GROWTH}}
    wanted = {"time": [int(n) for n in filter(None, sizes.split(","))]}
    wanted |= {kind: GROWTH[kind][1] for kind in filter(None, growth.split(","))}
    for kind, n in ((kind, n) for kind, listed in wanted.items() for n in listed):
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "-m"]
        launch = torchrun if kind == "processes" else []
        arguments = ["--data", data, "--tokenizer", tokenizer, "--one", f"{kind}:{n}"]
        done = subprocess.run(
            [sys.executable, "-m", *launch, "benchmarks.scaling", *arguments], capture_output=True, text=True,
            cwd=Path(__file__).parents[1], env=os.environ | ({"OMP_NUM_THREADS": "1"} if kind == "processes" else {}),
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise SystemExit(f"error: {kind} of {n} failed:\n{done.stderr[-3000:]}")
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
    for kind, (what, _, _) in GROWTH.items():
        if rows := result[kind]:
            grown = [r["size"] for r in rows]
            added = [r["peak_gb"] - r["before_gb"] for r in rows]
            lines += [f"| {what} | seconds | kept outputs, GB | peak before, GB | added, GB |", "|---|---|---|---|---|"]
            lines += [
                f"| {r['size']:,} | {r['seconds']:.1f} | {r['kept_gb']:.3f} | {r['before_gb']:.3f} | {more:.3f} |"
                for r, more in zip(rows, added, strict=True)
            ]
            time_grows, memory_grows = (exponent(grown, v) for v in ([r["seconds"] for r in rows], added))
            lines += [f"| exponent | {time_grows:.2f} | | | {memory_grows:.2f} |", ""]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
