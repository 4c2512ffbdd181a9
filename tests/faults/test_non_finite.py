"""7 Non-finite: it stops before the optimiser's step, names step and rows, and the log says NaN."""

import json
import math

import pytest
import torch
from test_training import pairs, plan

from conftest import tiny_gpt2
from dpo_helpers.device import Compute
from dpo_helpers.errors import TrainingError
from dpo_helpers.evaluation import score_pairs
from dpo_helpers.models import weights_hash
from dpo_helpers.resume import Unfinished
from dpo_helpers.tokens import epoch_order
from dpo_helpers.training import DPOObjective, sft_objective, train


def nan_weight(model):
    with torch.no_grad():
        model.transformer.h[2].mlp.c_fc.weight[0, 0] = float("nan")
    return sft_objective


def nan_batch(model):
    reference = torch.zeros(10)
    reference[epoch_order(10, seed=0, epoch=0)[1]] = float("nan")  # met in the first update
    return DPOObjective(reference, torch.zeros(10), 0.5)


def infinite_gradient(model):
    def objective(model, batch, at):
        losses, metrics = sft_objective(model, batch, at)
        bad = model.transformer.ln_f.weight
        return losses + (bad.sum() - bad.sum().detach()).clamp(min=0).sqrt(), metrics  # d√x at 0 is infinite

    return objective


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
    objective = fault(policy)
    before, unfinished = weights_hash(policy), Unfinished(tmp_path / "dpo", {})
    with pytest.raises(TrainingError, match=rf"the {what} is not finite at update (\d+) \(rows 10\d") as caught:
        train(policy, data, objective, plan(micro_batch_size=2), cpu, pad_id=0, unfinished=unfinished)
    log = [json.loads(line) for line in (unfinished.folder / "metrics.jsonl").read_text().splitlines()]
    last = log[-1]
    good = (
        weights_hash(policy) == before
        and math.isnan(last[key])
        and f"at update {last['step']} " in str(caught.value)
        and all(f"{row}" in str(caught.value) for row in last["rows"])
        and len(last["rows"]) == rows
    )
    survived(f"7 {fault.__name__}: stopped before the step, rows named, log says NaN", int(good), 1)


def test_fp16_lowers_its_scale_first_and_stops_when_there_is_nothing_to_lower():
    """A gradient that is never finite would skip every update for ever: 65536 = 2^16 is halved 17 times."""
    compute = Compute(torch.device("cpu"), "fp16")
    policy = tiny_gpt2()
    before = weights_hash(policy)
    with pytest.raises(TrainingError, match="the gradient is not finite at update 18 "):
        train(policy, pairs(4), infinite_gradient(policy), plan(epochs=40), compute, pad_id=0)
    assert weights_hash(policy) == before


def test_an_update_that_fp16_skips_says_so_and_leaves_the_weights():
    """The first two gradients overflow; those after them are finite, and train."""
    seen, hashes = [], []

    def objective(model, batch, at):
        seen.append(at)
        hashes.append(weights_hash(model))
        return (infinite_gradient(model) if len(seen) <= 2 else sft_objective)(model, batch, at)

    rows = train(tiny_gpt2(), pairs(4), objective, plan(epochs=4), Compute(torch.device("cpu"), "fp16"), pad_id=0)
    assert [row.get("skipped", False) for row in rows] == [True, True, False, False]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


def test_a_model_with_nan_weights_cannot_be_scored(cpu):
    """As a reference it would turn every later number into NaN."""
    model = tiny_gpt2()
    nan_weight(model)
    with pytest.raises(
        TrainingError, match=r"10 of 10 pairs have log-probabilities that are not finite \(rows 100, 101"
    ):
        score_pairs(model, pairs(), cpu, pad_id=0)
