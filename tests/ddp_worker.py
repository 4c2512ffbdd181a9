"""What each process of test_parallel.py runs: `accelerate launch … tests/ddp_worker.py FOLDER`.

Trains a tiny policy, and writes what this process saw into FOLDER/<rank>.json.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from test_training import pairs, plan

from conftest import tiny_gpt2
from dpo_helpers import parallel
from dpo_helpers.device import pick_compute
from dpo_helpers.engine import FastPath
from dpo_helpers.evaluation import score_pairs
from dpo_helpers.models import freeze, weights_hash
from dpo_helpers.training import DPOObjective, train

PLAN = plan(epochs=7, batch_size=5, micro_batch_size=2, learning_rate=1e-3)


def run(fast: bool):
    """21 updates on 11 pairs in batches of 5, 5 and 1, which leaves a process without a share. (rows, seen, policy)"""
    compute = pick_compute("cpu", "fp32")
    data, policy = pairs(11), tiny_gpt2()
    freeze(policy, 1)
    scores = score_pairs(policy, data, compute, pad_id=0)
    objective = DPOObjective(scores.chosen, scores.rejected, 0.5)
    if fast:
        objective = replace(objective, fast=FastPath(policy, data, 1))
    seen: list[list[int]] = []

    def recording(model, batch, at):
        if torch.is_grad_enabled():
            seen.append(list(at))
        return objective(model, batch, at)

    rows = train(policy, data, recording, PLAN, compute, pad_id=0)
    return rows, seen, policy


if __name__ == "__main__":
    out = {}
    for fast in (False, True):
        rows, seen, policy = run(fast)
        out[str(fast)] = {
            "losses": [row["loss"] for row in rows], "margins": [row["reward_margin"] for row in rows],
            "norms": [row["grad_norm"] for row in rows], "seen": seen, "weights": weights_hash(policy),
        }  # fmt: skip
    out["processes"] = parallel.processes()
    Path(sys.argv[1], f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(out), encoding="utf-8")
