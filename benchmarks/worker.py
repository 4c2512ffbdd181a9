"""One run of one side, in a process of its own, so that its peak memory is its own: `python -m benchmarks.worker`.

Reads a JSON object {"row": …, "work": {…}} from the command line and prints one with what was measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch

from benchmarks.workload import (
    BETA,
    Workload,
    batches,
    draw_pairs,
    floor_seconds,
    load_tokenizer,
    make_model,
    synchronise,
    train_dpo,
)
from dpo_helpers.device import Compute
from dpo_helpers.evaluation import score_pairs
from dpo_helpers.fast.engine import FastScorer
from dpo_helpers.logprobs import PlainScorer, Scorer
from dpo_helpers.run.machine import peak_memory_gb
from dpo_helpers.tokens import EncodedPair, epoch_order

Result = dict[str, Any]
SWEEP = (0.1, 0.5, 1.0, 5.0)


def compute_of(work: Workload) -> Compute:
    """Where and how precisely this run computes."""
    return Compute(torch.device(work.device), work.precision)


def warm_up(model: Any, compute: Compute) -> None:
    """First use of threads and kernels, before any clock runs; the same for all sides."""
    ids = torch.arange(256, device=compute.device).view(2, 128)
    with compute.autocast():
        model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


def timed(compute: Compute, what: Callable[[], Any]) -> tuple[Any, float]:
    """(What it returns, seconds it took)."""
    synchronise(compute.device)
    started = time.perf_counter()
    result = what()
    synchronise(compute.device)
    return result, time.perf_counter() - started


def ours(work: Workload, pairs: Sequence[EncodedPair], betas: Sequence[float], *, fast: bool) -> Result:
    """This course: reference and frozen blocks in one pass, then training, for each β from the same start."""
    compute = compute_of(work)
    model = make_model(work.shape).to(compute.device)
    warm_up(model, compute)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    scorer: Scorer = FastScorer(model, pairs, work.shape.frozen) if fast else PlainScorer(pairs, pad_id=0)
    scores, precompute = timed(compute, lambda: score_pairs(model, pairs, scorer, compute, batch_size=work.batch_size))
    rows: list[dict[str, Any]] = []
    seconds = 0.0
    for beta in betas:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        found, took = timed(compute, lambda b=beta: train_dpo(model, pairs, scorer, scores, b, work.plan(), compute))
        rows += found
        seconds += took
    return {
        "precompute_s": precompute,
        "train_s": seconds,
        "steps": [[r["epoch"], r["pairs"], r["seconds"]] for r in rows],
        "losses": [r["loss"] for r in rows],
        "peak_gb": peak_memory_gb(compute),
    }


def trl(work: Workload, pairs: Sequence[EncodedPair], *, tuned: bool, grouped: bool) -> Result:
    """TRL's DPOTrainer on the same token ids, in the same order (but for `grouped`), the same blocks frozen."""
    import datasets
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    compute = compute_of(work)
    model, reference = make_model(work.shape), None if tuned else make_model(work.shape)
    warm_up(model.to(compute.device), compute)
    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronise(compute.device)
            marks.append(time.perf_counter())

    class SameOrder:
        epoch = 0

        def __len__(self) -> int:
            return len(pairs)

        def __iter__(self) -> Any:
            order = epoch_order(len(pairs), work.seed, self.epoch)
            self.epoch += 1
            return iter(order)

    class Trainer(DPOTrainer):  # type: ignore[misc]
        precompute_s = 0.0
        losses: list[float] = []  # noqa: RUF012  # one run per process

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # token ids already

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            found, took = timed(compute, lambda: super(Trainer, self)._precompute_ref_logps(*args, **kwargs))
            self.precompute_s += took
            return found

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return super()._get_train_sampler(*args, **kwargs) if grouped else SameOrder()

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(loss.item())
            return loss

    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    for row in rows if grouped else ():
        row["length"] = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    options: dict[str, Any] = {"gradient_checkpointing": False, "precompute_ref_log_probs": True} if tuned else {}
    if grouped:
        options |= {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    tokenizer = load_tokenizer(work.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, beta=BETA, max_length=None, per_device_train_batch_size=work.batch_size,
            num_train_epochs=work.epochs, learning_rate=1e-6, lr_scheduler_type="constant", optim="rmsprop",
            max_grad_norm=10.0, seed=work.seed, use_cpu=work.device == "cpu", bf16=work.precision == "bf16",
            fp16=work.precision == "fp16", report_to="none", save_strategy="no", disable_tqdm=True,
            logging_steps=10**6, **options,
        )  # fmt: skip
        trainer = Trainer(
            model, reference, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    n, epochs = len(pairs), work.epochs
    sizes = [min(work.batch_size, n - start) for start in range(0, n, work.batch_size)] * epochs
    took = [b - a for a, b in pairwise(marks)]
    steps = [[i * epochs // len(sizes), size, s] for i, (size, s) in enumerate(zip(sizes, took, strict=True))]
    return {
        "precompute_s": trainer.precompute_s,
        "train_s": sum(took),
        "steps": steps,
        "losses": trainer.losses,
        "peak_gb": peak_memory_gb(compute),
    }


def floors(work: Workload, pairs: Sequence[EncodedPair]) -> Result:
    """Seconds of the matrix products alone, for one pass over the pairs, batch by batch."""
    compute = compute_of(work)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[work.precision]
    found = [
        floor_seconds(batch, work.shape, compute.device, dtype)
        for batch in batches(pairs, epoch_order(len(pairs), work.seed, 0), work.batch_size)
    ]
    total = {key: sum(f[key] for f in found) for key in ("first_s", "later_s", "flop_first", "flop_later")}
    return total | {"rate": total["flop_later"] / total["later_s"]}


ROWS: dict[str, Callable[[Workload, Sequence[EncodedPair]], Result]] = {
    "ours": lambda work, pairs: ours(work, pairs, [BETA], fast=True),
    "ours, plain path": lambda work, pairs: ours(work, pairs, [BETA], fast=False),
    "ours, sweep": lambda work, pairs: ours(work, pairs, SWEEP, fast=True),
    "TRL defaults (a)": lambda work, pairs: trl(work, pairs, tuned=False, grouped=False),
    "TRL tuned (b)": lambda work, pairs: trl(work, pairs, tuned=True, grouped=False),
    "TRL tuned, grouped (c)": lambda work, pairs: trl(work, pairs, tuned=True, grouped=True),
    "floor": floors,
}


def main() -> None:
    """Measure one row."""
    asked = json.loads(sys.argv[1])
    work = Workload(**asked["work"])
    result = ROWS[asked["row"]](work, draw_pairs(work))
    print("RESULT " + json.dumps({"row": asked["row"], "work": asdict(work), **result}))


if __name__ == "__main__":
    main()
