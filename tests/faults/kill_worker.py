"""Train, kill with SIGKILL in the middle of an update, go on, compare: `python kill_worker.py tiny|mini FOLDER KILLS`.

Run by test_kill.py in a process of its own, whose forks share one import of torch. Prints a line of JSON per kill.

tiny: a random GPT-2 of 3 blocks on the plain path, dropout on, 30 updates over 6 epochs. mini: the embedded GPT-2 on the
fast path, as `stages.get_dpo` trains it, 30 updates over 2 epochs with evaluations.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from forks import in_a_fork
from test_training import pairs, plan, scored, train_in_parts

from conftest import tiny_gpt2
from dpo_helpers.device import Compute
from dpo_helpers.logprobs import BOTH, PlainScorer
from dpo_helpers.models import freeze
from dpo_helpers.run import stages
from dpo_helpers.run.artefacts import METRICS
from dpo_helpers.run.checkpoints import OPTIMIZER, WEIGHTS, Checkpoints
from dpo_helpers.run.disk import file_hash
from dpo_helpers.run.gradients import InParts
from dpo_helpers.run.watch import RunWatch
from dpo_helpers.settings import load_settings
from dpo_helpers.training import DPOObjective

UPDATES, EVERY = 30, 4


class Noisy(PlainScorer):
    """The plain path with dropout on, which the course never has: the hardest case for going on exactly."""

    def __call__(self, model, at, sides=BOTH):
        model.train()
        try:
            return super().__call__(model, at, sides)
        finally:
            model.eval()


def train_tiny(folder: Path) -> None:
    compute, data, policy = Compute(torch.device("cpu"), "fp32"), pairs(20), tiny_gpt2()
    freeze(policy, 1)
    objective = DPOObjective(scored(policy, data, compute), 0.5)
    short = plan(epochs=6, batch_size=4, micro_batch_size=2)
    watch = RunWatch("tiny", Checkpoints(folder / "tiny", {}, every=EVERY), lambda: 0)
    train_in_parts(policy, data, objective, short, compute, Noisy(data, 0), watch)


def train_mini(folder: Path) -> None:
    settings = load_settings(
        "mini", runs_dir=str(folder), max_pairs=60, held_out_pairs=12, batch_size=4, micro_batch_size=2, epochs=2,
        prompts=4, max_new_tokens=6, curve_points=3, curve_prompts=2, save_every=EVERY,
    )  # fmt: skip
    stages.get_dpo(settings)


def train_and_die(training, folder: Path, update: int) -> None:
    """Train until `update` (from 1), and die in it: before its first or its second part."""
    attempt, calls = InParts.attempt, 0

    def counting(parts):
        nonlocal calls
        calls += 1
        if calls == 2 * update - update % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return attempt(parts)

    InParts.attempt = counting
    training(folder)


def result(kind: str, folder: Path) -> dict[str, object]:
    """Hashes of the trained tensors and the metrics, times apart."""
    if kind == "tiny":
        last = folder / f"tiny.unfinished/step-{UPDATES:06d}"
        rows = [json.loads(line) for line in (last / METRICS).read_text().splitlines()]
        tensors = {name: file_hash(last / name) for name in (WEIGHTS, OPTIMIZER)}
        moved = load_file(last / OPTIMIZER)
        assert all(v.abs().sum() > 0 for v in moved.values()), "the optimiser has a state to lose"
    else:
        rows = [json.loads(line) for line in (folder / "mini/dpo/metrics.jsonl").read_text().splitlines()]
        tensors = {
            name: file_hash(folder / "mini/dpo" / name) for name in ("model.safetensors", "logprobs.safetensors")
        }
        assert not (folder / "mini/dpo.unfinished").exists(), "a finished training leaves no checkpoints"
    for row in rows:
        row.pop("seconds", None)
    return {"tensors": tensors, "rows": rows}


def main(kind: str, folder: Path, kills: list[int]) -> None:
    torch.set_num_threads(1)  # a fork has only one thread: others would be waited for in vain
    training = {"tiny": train_tiny, "mini": train_mini}[kind]
    assert in_a_fork(lambda: training(folder / "whole")) == 0
    whole = result(kind, folder / "whole")
    for update in kills:
        place = folder / f"killed-{update}"
        killed = in_a_fork(lambda at=place, u=update: train_and_die(training, at, u))

        def go_on(at=place, u=update):
            torch.manual_seed(7 * u)  # the global generators are not what they were
            random.seed(u)
            training(at)

        finished = in_a_fork(go_on)
        same = finished == 0 and result(kind, place) == whole
        print(json.dumps({"update": update, "killed": killed, "finished": finished, "same": same}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(n) for n in sys.argv[3].split(",")])
