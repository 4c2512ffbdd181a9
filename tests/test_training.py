"""The loop: warm-up and RMSprop by literals, accumulation by equality, honesty by what must not change."""

import math

import pytest
import torch

from conftest import tiny_gpt2
from dpo_helpers.errors import TrainingError
from dpo_helpers.evaluation import score_pairs
from dpo_helpers.models import freeze, weights_hash
from dpo_helpers.tokens import EncodedPair
from dpo_helpers.training import (
    DPOObjective,
    TrainPlan,
    make_optimizer,
    rate_factor,
    sft_objective,
    train,
    warmup_factor,
)


def pairs(n=10, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        return torch.randint(1, 50, (length,), generator=generator).tolist()

    return [EncodedPair(draw(2 + i % 3), [*draw(1 + i % 5), 0], [*draw(2 + i % 4), 0], index=100 + i) for i in range(n)]


PLAN = TrainPlan(
    epochs=2, batch_size=4, micro_batch_size=4, learning_rate=1e-3, optimizer="rmsprop", warmup_steps=2,
    schedule="constant", max_grad_norm=10.0, seed=0,
)  # fmt: skip


def plan(**changes):
    return TrainPlan(**{**vars(PLAN), **changes})


def run(compute, objective_of=None, data=None, seed=0, **changes):
    """Train a tiny policy against its own start; returns (policy, rows)."""
    data = data or pairs()
    policy = tiny_gpt2(seed)
    freeze(policy, 1)
    scores = score_pairs(policy, data, compute, pad_id=0)
    objective = objective_of or DPOObjective(scores.chosen, scores.rejected, 0.5)
    return policy, train(policy, data, objective, plan(**changes), compute, pad_id=0)


def test_warmup_literals():
    """(step + 1) / (warm-up + 1): with 4 steps 1/5, 2/5, 3/5, 4/5, then 1."""
    assert [warmup_factor(s, 4) for s in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert warmup_factor(0, 0) == 1.0


def test_linear_schedule_literals():
    """10 updates, 2 of warm-up: 1/3, 2/3, then 8/8, 7/8 … 1/8 of the rate."""
    linear = plan(schedule="linear")
    got = [rate_factor(step, 10, linear) for step in range(10)]
    assert got == pytest.approx([1 / 3, 2 / 3, *(k / 8 for k in range(8, 0, -1))])


def test_learning_rates_of_a_run(cpu):
    _, rows = run(cpu)
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3, 1e-3])


def test_first_rmsprop_step_is_ten_learning_rates():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer("rmsprop", [weight], 0.01)
    weight.grad = torch.tensor([7.0])
    optimizer.step()
    assert weight.item() == pytest.approx(-0.1, rel=1e-4)


def test_the_first_batch_has_loss_ln_2_and_no_reward(cpu):
    _, rows = run(cpu)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["chosen_reward"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["rejected_reward"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["grad_norm"] > 1e-3


def test_dropout_is_off_even_if_the_model_comes_in_training_mode(cpu):
    data = pairs()
    policy = tiny_gpt2()
    scores = score_pairs(policy, data, cpu, pad_id=0)
    policy.train()
    rows = train(policy, data, DPOObjective(scores.chosen, scores.rejected, 0.5), PLAN, cpu, pad_id=0)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_dpo_learns_the_pairs(cpu):
    _, rows = run(cpu, epochs=20)
    assert rows[-1]["loss"] < 0.3
    assert rows[-1]["reward_accuracy"] == 1.0


def test_swapped_sides_teach_the_opposite(cpu):
    data = pairs()
    swapped = [EncodedPair(p.prompt, p.rejected, p.chosen, p.index) for p in data]
    policy, _ = run(cpu, data=swapped, epochs=20)
    before, after = score_pairs(tiny_gpt2(), data, cpu, pad_id=0), score_pairs(policy, data, cpu, pad_id=0)
    assert ((after.chosen - before.chosen) < (after.rejected - before.rejected)).all()


def test_only_the_unfrozen_blocks_and_the_last_norm_move(cpu):
    policy, _ = run(cpu)
    start = dict(tiny_gpt2().named_parameters())
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, start[name])}
    assert {name.split(".")[1] for name in moved} == {"h", "ln_f"}
    assert {name.split(".")[2] for name in moved if ".h." in name} == {"1", "2"}


def test_micro_batches_give_the_same_run(cpu):
    """A batch of 4 in one pass, or sorted by length in parts of 1 and 3: same losses, weights within rounding."""
    whole, rows = run(cpu, optimizer="adamw")
    for size in (1, 3):
        parts, other = run(cpu, optimizer="adamw", micro_batch_size=size)
        assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in rows], abs=1e-4)
        assert [r["grad_norm"] for r in other] == pytest.approx([r["grad_norm"] for r in rows], rel=1e-2)
        for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_same_settings_twice_are_bit_equal_and_another_seed_is_not(cpu):
    first, rows = run(cpu)
    torch.manual_seed(99)
    second, other = run(cpu)
    assert weights_hash(first) == weights_hash(second)
    assert [r["loss"] for r in rows] == [r["loss"] for r in other]
    assert weights_hash(run(cpu, seed=0, **{"batch_size": 3})[0]) != weights_hash(first)


def test_gradients_are_clipped(cpu):
    """After clipping no gradient is longer than max_grad_norm; the logged norm is the one before."""
    norm = 1e-3
    data = pairs()
    policy = tiny_gpt2()
    seen = []
    objective = DPOObjective(torch.zeros(10), torch.zeros(10), 5.0)
    hook = torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        total = hook(parameters, max_norm)
        seen.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())
        return total

    torch.nn.utils.clip_grad_norm_ = spy
    try:
        rows = train(policy, data, objective, plan(max_grad_norm=norm), cpu, pad_id=0)
    finally:
        torch.nn.utils.clip_grad_norm_ = hook
    assert max(seen) <= norm * 1.001
    assert rows[0]["grad_norm"] > 10 * norm


def test_a_non_finite_loss_stops_before_the_update_and_names_the_rows(cpu):
    data = pairs(4)
    policy = tiny_gpt2()
    before = weights_hash(policy)
    reference = torch.tensor([0.0, float("nan"), 0.0, 0.0])
    with pytest.raises(TrainingError, match=r"the loss is not finite at update 1 \(rows .*101"):
        train(policy, data, DPOObjective(reference, torch.zeros(4), 0.5), PLAN, cpu, pad_id=0)
    assert weights_hash(policy) == before


def test_a_non_finite_gradient_stops_before_the_update(cpu):
    policy = tiny_gpt2()
    before = weights_hash(policy)

    def objective(model, batch, at):
        losses, metrics = sft_objective(model, batch, at)
        bad = model.transformer.ln_f.weight
        return losses + (bad.sum() - bad.sum().detach()).clamp(min=0).sqrt(), metrics  # d√x at 0 is infinite

    with pytest.raises(TrainingError, match="the gradient is not finite at update 1"):
        train(policy, pairs(4), objective, PLAN, cpu, pad_id=0)
    assert weights_hash(policy) == before


def test_sft_runs_on_chosen_rows_only(cpu):
    """Other tokens in every rejected response leave an SFT run bit-equal; its loss falls."""
    data = pairs()
    other = [EncodedPair(p.prompt, p.chosen, [49 for _ in p.rejected], p.index) for p in data]
    policy, rows = run(cpu, sft_objective, data, epochs=10)
    assert weights_hash(policy) == weights_hash(run(cpu, sft_objective, other, epochs=10)[0])
    assert rows[-1]["loss"] < rows[0]["loss"] - 1


def test_evaluation_points(cpu):
    calls = []

    def evaluate():
        calls.append(1)
        return {"loss": 0.0}

    rows = train(tiny_gpt2(), pairs(), sft_objective, plan(epochs=4), cpu, pad_id=0, evaluate=evaluate, evaluations=3)
    held = [row["step"] for row in rows if row["split"] == "held_out"]
    assert (held[0], held[-1]) == (0, 12)
    assert held == sorted(set(held))
    assert held == [0, 4, 8, 12]
    assert len(calls) == 4


class OutOfMemory:
    """DPO losses, but a micro-batch of more than `limit` pairs runs out of memory from update 3 on, halfway through."""

    def __init__(self, objective, limit, error):
        self.objective, self.limit, self.error, self.sizes = objective, limit, error, []

    def __call__(self, model, batch, at):
        self.sizes.append(len(at))
        if sum(self.sizes) > 8 and len(at) > self.limit:
            raise self.error
        return self.objective(model, batch, at)


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")


def limited(cpu, limit, error, **changes):
    data = pairs(12)
    scores = score_pairs(tiny_gpt2(), data, cpu, pad_id=0)
    objective = OutOfMemory(DPOObjective(scores.chosen - 1, scores.rejected, 0.5), limit, error)
    return objective, *run(cpu, objective, data, **changes)


@pytest.mark.parametrize("error", [CUDA, CPU])
def test_out_of_memory_halves_the_micro_batch_and_nothing_else(cpu, capsys, error, monkeypatch):
    """Batches of 4 in one part; from update 3 on one pair fits: 4 fails, 2 fails, then four parts of 1.

    Under SGD, whose weights show the gradients; RMSprop would amplify their rounding.
    """
    monkeypatch.setattr("dpo_helpers.training.make_optimizer", lambda _, p, rate: torch.optim.SGD(p, lr=rate))
    _, expected_policy, expected = limited(cpu, 4, error)
    objective, policy, rows = limited(cpu, 1, error)
    assert objective.sizes[:5] == [4, 4, 4, 2, 1]
    assert set(objective.sizes[4:]) == {1}, "the smaller size stays"
    said = capsys.readouterr().out
    assert "out of memory at update 3 with 2 pairs a forward pass: from here on 1" in said
    for key in ("loss", "grad_norm", "reward_margin"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], abs=1e-5), key
    for (name, parameter), other in zip(policy.named_parameters(), expected_policy.parameters(), strict=True):
        assert (parameter - other).abs().max() <= 1e-5, name


def test_out_of_memory_with_a_single_pair_is_an_error_that_names_rows(cpu):
    with pytest.raises(TrainingError, match=r"update 3 with a single pair a forward pass \(rows 10\d") as caught:
        limited(cpu, 0, CUDA)
    assert "--max-length" in str(caught.value)


def test_other_runtime_errors_are_not_taken_for_it(cpu):
    with pytest.raises(RuntimeError, match="shapes"):
        limited(cpu, 1, RuntimeError("shapes do not match"))


def test_only_the_rows_at_fault_are_named(cpu):
    """NaN in one pair's loss: that row, not its batch."""
    data = pairs(4)
    reference = torch.tensor([0.0, 0.0, float("nan"), 0.0])
    with pytest.raises(TrainingError, match=r"loss is not finite at update 1 \(rows 102\)"):
        train(tiny_gpt2(), data, DPOObjective(reference, torch.zeros(4), 0.5), PLAN, cpu, pad_id=0)


def test_out_of_memory_after_part_of_a_gradient_counts_nothing_twice(cpu):
    """Parts of two: the second part of update 2 fails, when the first one's gradient is there already."""

    class Once(OutOfMemory):
        def __call__(self, model, batch, at):
            self.sizes.append(len(at))
            if len(self.sizes) == self.limit:
                raise self.error
            return self.objective(model, batch, at)

    data = pairs(12)
    scores = score_pairs(tiny_gpt2(), data, cpu, pad_id=0)
    runs = []
    for call in (4, -1):
        objective = Once(DPOObjective(scores.chosen - 1, scores.rejected, 0.5), call, CUDA)
        runs.append((objective, run(cpu, objective, data, micro_batch_size=2)[1]))
    assert runs[0][0].sizes[:8] == [2, 2, 2, 2, 1, 1, 1, 1]
    for key in ("loss", "grad_norm"):
        failed, whole = ([row[key] for row in rows[:2]] for _, rows in runs)
        assert failed == pytest.approx(whole, rel=1e-5, abs=1e-5), key
