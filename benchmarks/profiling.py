"""Where the time of a later epoch goes, by what each operation serves: `python -m benchmarks.profiling --help`."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.dpo_vs_trl import RESULTS, _machine
from benchmarks.workload import (
    BETA,
    FROZEN,
    VOCABULARY,
    Workload,
    batches,
    draw_pairs,
    floor_seconds,
    make_model,
    train_dpo,
)
from dpo_helpers.device import Compute
from dpo_helpers.evaluation import score_pairs
from dpo_helpers.fast.engine import FastScorer
from dpo_helpers.tokens import epoch_order

GROUPS = {
    "GELU": ("gelu",), "layer norm": ("layer_norm",),
    "attention": ("scaled_dot_product", "_softmax"),
    "optimiser and clipping": ("addcmul", "addcdiv", "sqrt", "linalg_vector_norm", "RMSprop", "aten::mul_"),
    "head: softmax": ("aten::exp_", "aten::amax", "aten::sub_", "aten::log"),
    "gathering, copying, adding": (
        "index", "copy", "cat", "fill", "add", "sum", "clone", "gather", "scatter", "empty", "zero", "mul", "div",
    ),
}  # fmt: skip


def group_of(name: str, shapes: Any) -> str:
    """What an operation serves, by its name and the shapes of its inputs."""
    if name in ("aten::mm", "aten::addmm"):
        return "head: matrix products" if any(VOCABULARY in shape for shape in shapes if shape) else "linear layers"
    return next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "other operations")


def main(
    data: Annotated[str, typer.Option(help="HH pairs: a file, or a Hub id")] = "Anthropic/hh-rlhf",
    tokenizer: Annotated[
        str, typer.Option(help="folder with vocab.json and merges.txt, or a Hub id")
    ] = "openai-community/gpt2",
    pairs: Annotated[int, typer.Option(help="drawn by seed over the whole length range")] = 48,
) -> None:
    """Profile one later epoch and write the shares of its wall time into benchmarks/results/."""
    work = Workload(data, tokenizer, pairs, 8, 1, 0, "cpu", "fp32")
    drawn, compute, model = draw_pairs(work), Compute(torch.device("cpu"), "fp32"), make_model()
    scorer = FastScorer(model, drawn, FROZEN)
    scores = score_pairs(model, drawn, scorer, compute)
    train_dpo(model, drawn[:8], scorer, scores, BETA, work.plan(), compute)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        started = time.perf_counter()
        train_dpo(model, drawn, scorer, scores, BETA, work.plan(), compute)
        wall = time.perf_counter() - started
    shares: dict[str, float] = defaultdict(float)
    for event in found.key_averages(group_by_input_shape=True):
        shares[group_of(event.key, event.input_shapes)] += event.self_cpu_time_total / 1e6 / wall
    shares["Python, and what the profiler does not see"] = max(0.0, 1 - sum(shares.values()))
    ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))
    parts = [
        floor_seconds(batch, work.shape, compute.device, torch.float32)
        for batch in batches(drawn, epoch_order(len(drawn), work.seed, 0), work.batch_size)
    ]
    floor = sum(part["later_s"] for part in parts)
    result = {"machine": _machine("cpu"), "pairs": pairs, "seconds": wall, "shares": ordered, "floor": floor / wall}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "profile.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, share in (ordered | {"all of it": sum(ordered.values()), "the floor": floor / wall}).items():
        print(f"| {name} | {share:.1%} |")


if __name__ == "__main__":
    typer.run(main)
