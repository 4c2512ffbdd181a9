"""What each process of test_parallel.py runs: `accelerate launch … tests/ddp_worker.py FOLDER`.

Trains a tiny policy, and writes what this process saw into FOLDER/<rank>.json.
"""

import json
import os
import sys
from pathlib import Path

import torch
from test_training import pairs, plan, scored, train_in_parts

from conftest import tiny_gpt2
from dpo_helpers.fast.engine import FastScorer
from dpo_helpers.logprobs import BOTH, PlainScorer
from dpo_helpers.models import freeze, weights_hash
from dpo_helpers.run import processes
from dpo_helpers.run.machine import pick_compute
from dpo_helpers.training import DPOObjective

PLAN = plan(epochs=7, batch_size=5, micro_batch_size=2, learning_rate=1e-3)


def run(fast: bool):
    """21 updates on 11 pairs in batches of 5, 5 and 1, which leaves a process without a share. (rows, seen, policy)"""
    compute = pick_compute("cpu", "fp32")
    data, policy = pairs(11), tiny_gpt2()
    freeze(policy, 1)
    objective = DPOObjective(scored(policy, data, compute), 0.5)
    scorer = FastScorer(policy, data, 1) if fast else PlainScorer(data, 0)
    seen: list[list[int]] = []

    def recording(model, at, sides=BOTH):
        if torch.is_grad_enabled():
            seen.append(list(at))
        return scorer(model, at, sides)

    return train_in_parts(policy, data, objective, PLAN, compute, recording), seen, policy


if __name__ == "__main__":
    out = {}
    for fast in (False, True):
        rows, seen, policy = run(fast)
        out[str(fast)] = {
            "losses": [row["loss"] for row in rows], "margins": [row["reward_margin"] for row in rows],
            "norms": [row["grad_norm"] for row in rows], "seen": seen, "weights": weights_hash(policy),
        }  # fmt: skip
    out["processes"] = processes.count()
    Path(sys.argv[1], f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(out), encoding="utf-8")
