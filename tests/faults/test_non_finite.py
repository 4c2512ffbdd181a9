"""7 Non-finite: it stops before the optimiser's step, names step and rows, and the log says NaN."""

import json
import math

import pytest
import torch
from test_training import lengths, pairs, plan, scored, sft, train_in_parts

from conftest import tiny_gpt2
from dpo_helpers.device import Compute
from dpo_helpers.errors import TrainingError
from dpo_helpers.logprobs import PairScores
from dpo_helpers.models import weights_hash
from dpo_helpers.run import stages
from dpo_helpers.run.checkpoints import Checkpoints
from dpo_helpers.run.watch import RunWatch
from dpo_helpers.tokens import epoch_order
from dpo_helpers.training import DPOObjective


def nan_weight(model, data):
    with torch.no_grad():
        model.transformer.h[2].mlp.c_fc.weight[0, 0] = float("nan")
    return sft(data)


def nan_batch(model, data):
    reference = torch.zeros(10)
    reference[epoch_order(10, seed=0, epoch=0)[1]] = float("nan")  # met in the first update
    return DPOObjective(PairScores(reference, torch.zeros(10), *lengths(data)), 0.5)


class Infinite:
    """SFT whose first `updates` gradients are infinite, one part each; notes the weights before each of them."""

    sides = ("chosen",)

    def __init__(self, model, data, updates):
        self.model, self.objective, self.updates, self.hashes = model, sft(data), updates, []

    def __call__(self, at, chosen):
        self.hashes.append(weights_hash(self.model))
        losses, metrics = self.objective(at, chosen)
        if len(self.hashes) > self.updates:
            return losses, metrics
        bad = self.model.transformer.ln_f.weight
        return losses + (bad.sum() - bad.sum().detach()).clamp(min=0).sqrt(), metrics  # d√x at 0 is infinite


def infinite_gradient(model, data):
    return Infinite(model, data, updates=math.inf)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("fault", "what", "key", "rows"),
    [
        (nan_weight, "loss", "loss", 2),  # every row of the part that was met first
        (nan_batch, "loss", "loss", 1),
        (infinite_gradient, "gradient", "grad_norm", 4),  # a gradient is of the whole batch
    ],
)
def test_it_stops_before_the_update(cpu, tmp_path, survived, fault, what, key, rows):
    data, policy = pairs(), tiny_gpt2()
    objective = fault(policy, data)
    before, checkpoints = weights_hash(policy), Checkpoints(tmp_path / "dpo", {})
    watch = RunWatch("dpo", checkpoints, lambda: 0)
    with pytest.raises(TrainingError, match=rf"the {what} is not finite at update (\d+) \(rows 10\d") as caught:
        train_in_parts(policy, data, objective, plan(micro_batch_size=2), cpu, watch=watch)
    watch.failed(caught.value)  # as `trained.train_model` does; with it, the test after this one
    last = rows_of(checkpoints.folder)[-1]
    good = (
        weights_hash(policy) == before
        and math.isnan(last[key])
        and f"at update {last['step']} " in str(caught.value)
        and all(f"{row}" in str(caught.value) for row in last["rows"])
        and len(last["rows"]) == rows
    )
    survived(f"7 {fault.__name__}: stopped before the step, rows named, log says NaN", int(good), 1)


def test_a_stage_stops_there_too_and_leaves_the_log_and_no_model(small, monkeypatch):
    """The reference's log-probability of one pair is NaN, which is met in the second of three updates."""
    second = epoch_order(24, seed=0, epoch=0)[8:16]

    def spoilt(settings, beta, reference):
        reference.chosen[second[5]] = float("nan")
        return DPOObjective(reference, beta)

    monkeypatch.setattr(stages, "dpo_objective", spoilt)
    row = stages.get_data(small).train[second[5]].index
    with pytest.raises(TrainingError, match=rf"the loss is not finite at update 2 \(rows {row}\); the weights are"):
        stages.get_dpo(small)
    log = [r for r in rows_of(small.run_dir / "dpo.unfinished") if r["split"] == "train"]
    assert [r["step"] for r in log] == [1, 2]
    assert math.isfinite(log[0]["loss"])
    assert math.isnan(log[1]["loss"])
    assert log[1]["rows"] == [row]
    assert not (small.run_dir / "dpo").exists()


def test_fp16_lowers_its_scale_first_and_stops_when_there_is_nothing_to_lower():
    """A gradient that is never finite would skip every update for ever: 65536 = 2^16 is halved 17 times."""
    compute = Compute(torch.device("cpu"), "fp16")
    policy, data = tiny_gpt2(), pairs(4)
    before = weights_hash(policy)
    with pytest.raises(TrainingError, match="the gradient is not finite at update 18 "):
        train_in_parts(policy, data, infinite_gradient(policy, data), plan(epochs=40), compute)
    assert weights_hash(policy) == before


def test_an_update_that_fp16_skips_says_so_and_leaves_the_weights():
    """The first two gradients overflow; those after them are finite, and train."""
    policy, data = tiny_gpt2(), pairs(4)
    objective = Infinite(policy, data, updates=2)
    rows = train_in_parts(policy, data, objective, plan(epochs=4), Compute(torch.device("cpu"), "fp16"))
    assert [row.get("skipped", False) for row in rows] == [True, True, False, False]
    hashes = objective.hashes
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


def test_a_model_with_nan_weights_cannot_be_scored(cpu):
    """As a reference it would turn every later number into NaN."""
    model = tiny_gpt2()
    nan_weight(model, pairs())
    with pytest.raises(
        TrainingError, match=r"10 of 10 pairs have log-probabilities that are not finite \(rows 100, 101"
    ):
        scored(model, pairs(), cpu)
