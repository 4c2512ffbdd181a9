"""The loop: warm-up and RMSprop by literals, accumulation by equality, honesty by what must not change."""

import math
from dataclasses import replace

import pytest
import torch

from conftest import tiny_gpt2
from dpo_helpers import training
from dpo_helpers.errors import TrainingError
from dpo_helpers.evaluation import score_pairs
from dpo_helpers.logprobs import PairScores, PlainScorer
from dpo_helpers.models import freeze, weights_hash
from dpo_helpers.run.checkpoints import Checkpoints
from dpo_helpers.run.gradients import InParts
from dpo_helpers.run.watch import RunWatch
from dpo_helpers.tokens import EncodedPair, batch_order
from dpo_helpers.training import (
    DPOObjective,
    SFTObjective,
    TrainPlan,
    make_optimizer,
    rate_factor,
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


def scored(model, data, compute, scorer=None, **how):
    """Log-probabilities of pairs under a model, by default on the plain path."""
    return score_pairs(model, data, scorer or PlainScorer(data, 0), compute, **how)


def sft(data):
    return SFTObjective(torch.tensor([len(pair.chosen) for pair in data]))


def lengths(data):
    return [torch.tensor([len(getattr(pair, side)) for pair in data]) for side in ("chosen", "rejected")]


def train_in_parts(policy, data, objective, plan, compute, scorer=None, watch=None):
    """`training.train` as the course's runs call it: the gradient in parts, by default on the plain path."""
    parts = InParts(plan.micro_batch_size, compute, [p for p in policy.parameters() if p.requires_grad])
    return train(policy, data, scorer or PlainScorer(data, 0), objective, plan, compute, gradient=parts, watch=watch)


def run(compute, objective=None, data=None, seed=0, scorer=None, watch=None, **changes):
    """Train a tiny policy, by default with DPO against its own start; returns (policy, rows)."""
    data = data or pairs()
    policy = tiny_gpt2(seed)
    freeze(policy, 1)
    objective = objective or DPOObjective(scored(policy, data, compute), 0.5)
    return policy, train_in_parts(policy, data, objective, plan(**changes), compute, scorer, watch)


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


@pytest.mark.parametrize(
    ("name", "gradients", "steps"),
    [
        ("rmsprop", (1, 2), 10 + 2 / 0.0499**0.5),  # mean squares 0.01, 0.99 · 0.01 + 0.01 · 4 = 0.0499
        ("rmsprop", (1e-7,), 5),  # the root 1e-8 is as large as what is added to it
        # means 0.1, 0.09, of squares 0.001, 0.000999, corrected by 1 - 0.9², 1 - 0.999²
        ("adamw", (1, 0), 1 + (0.09 / 0.19) / (0.000999 / 0.001999) ** 0.5),
        ("adamw", (1e-8,), 0.5),
    ],
)
def test_optimisers_by_hand(name, gradients, steps):
    """How many learning rates a weight goes under these gradients: RMSprop's first step is ten; no weight decay."""
    weight = torch.nn.Parameter(torch.tensor([10.0], dtype=torch.float64))
    optimizer = make_optimizer(name, [weight], 0.01)
    for gradient in gradients:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    assert (10 - weight.item()) / 0.01 == pytest.approx(steps, rel=1e-6)


def test_the_first_batch_has_loss_ln_2_and_no_reward(cpu):
    _, rows = run(cpu)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["chosen_reward"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["rejected_reward"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["grad_norm"] > 1e-3


def test_dropout_is_off_even_if_the_model_comes_in_training_mode(cpu):
    data = pairs()
    policy = tiny_gpt2()
    objective = DPOObjective(scored(policy, data, cpu), 0.5)
    policy.train()
    rows = train(policy, data, PlainScorer(data, 0), objective, PLAN, cpu)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "loss"),
    [
        ("sigmoid", 0.0, 0.201413),
        ("sigmoid", 0.1, 0.351413),
        ("robust", 0.1, 0.013913),
        ("ipo", 0.0, 0.0),
        ("hinge", 0.0, 0),
        ("sigmoid_norm", 0.0, 0.474077),
        ("apo_zero", 0.0, 0.646482),
    ],
)
def test_the_objective_by_hand(loss_type, smoothing, loss):
    """β = 0.5. Of the pairs at 2 and 0 the first has log-ratios +2 and -1, βh = 1.5, as in `test_losses`; ipo over 4 and
    2 tokens: (0.5 + 0.5 - 1)² = 0; sigmoid_norm: ln(1 + e^-0.5); apo_zero: σ(-1) + σ(-0.5) = 0.268941 + 0.377541. The other one's are 3 and 3, a tie: not right."""
    lengths = torch.tensor([4, 9, 4]), torch.tensor([2, 9, 2])
    reference = PairScores(torch.tensor([-8.0, 0.0, -10.0]), torch.tensor([-7.0, 0.0, -9.0]), *lengths)
    objective = DPOObjective(reference, 0.5, loss_type, smoothing)
    losses, metrics = objective([2, 0], torch.tensor([-8.0, -5.0]), torch.tensor([-10.0, -4.0]))
    assert losses[0].item() == pytest.approx(loss, abs=1e-6)
    assert {key: values.tolist() for key, values in metrics.items()} == {
        "chosen_reward": [1.0, 1.5], "rejected_reward": [-0.5, 1.5], "reward_margin": [1.5, 0.0],
        "reward_accuracy": [1.0, 0.0],
    }  # fmt: skip


def test_a_learned_pair_is_left_out_of_the_gradient():
    """At β = 1 and a margin h the gradient is e^-h for a large h: 1.4e-29 at 66.4, 1.9e-31 at 70.7, against 1e-30."""
    zeros, lengths = torch.zeros(3), torch.ones(3, dtype=torch.int64)
    objective = DPOObjective(PairScores(zeros, zeros, lengths, lengths), 1.0)
    chosen, rejected = torch.tensor([0.0, 66.4, 70.7], requires_grad=True), torch.zeros(3, requires_grad=True)
    losses, _ = objective(range(3), chosen, rejected)
    losses.sum().backward()
    for gradient, sign in ((chosen.grad, -1), (rejected.grad, 1)):
        assert gradient.tolist() == pytest.approx([sign * 0.5, sign * 1.454e-29, 0.0], rel=1e-3, abs=0.0)


def test_leaving_them_out_changes_no_weight(cpu, monkeypatch):
    """Half of the pairs are learned: the policy's rejected responses are 160 nats below the reference's, times β 0.5."""
    data, scores = pairs(), scored(tiny_gpt2(), pairs(), cpu)
    lead = torch.tensor([160.0, 0.0] * 5)
    objective = DPOObjective(replace(scores, rejected=scores.rejected + lead), 0.5)
    left_out, rows = run(cpu, objective, data)
    monkeypatch.setattr(training, "LEARNED", 0.0)
    kept, _ = run(cpu, objective, data)
    assert weights_hash(left_out) == weights_hash(kept) != weights_hash(tiny_gpt2())
    assert rows[0]["loss"] == pytest.approx(math.log(2) / 2, abs=0.2)
    monkeypatch.setattr(training, "LEARNED", 1.0)
    assert weights_hash(run(cpu, objective, data)[0]) != weights_hash(kept), "a larger bound would change them"


def test_the_loop_is_the_one_that_is_said(cpu, monkeypatch):
    """Against updates written out: w - rate · clipped gradient, of the batches' mean loss, the rate by the warm-up."""
    monkeypatch.setattr(training, "make_optimizer", lambda _, parameters, rate: torch.optim.SGD(parameters, lr=0.0))
    data, how = pairs(), plan(learning_rate=0.1, max_grad_norm=0.5, warmup_steps=2, seed=3)
    loop, by_hand = tiny_gpt2(), tiny_gpt2()
    objective = DPOObjective(scored(by_hand, data, cpu), 0.5)
    rows = train(loop, data, PlainScorer(data, 0), objective, how, cpu)
    norms = []
    for step, (_, at) in enumerate(batch_order(10, 4, 2, seed=3)):
        loss = objective(at, *PlainScorer(data, 0)(by_hand, at))[0].mean()
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        norms.append(sum(g.double().pow(2).sum().item() for g in gradients) ** 0.5)
        assert rows[step]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        with torch.no_grad():
            for weight, gradient in zip(by_hand.parameters(), gradients, strict=True):
                weight -= 0.1 * min(1, (step + 1) / 3) * min(1, 0.5 / norms[-1]) * gradient
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > 0.5, "the gradient is clipped"
    assert [row["pairs"] for row in rows] == [4, 4, 2, 4, 4, 2]
    for a, b in zip(loop.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_chance_is_a_function_of_seed_and_step_and_leaves_the_callers_alone(cpu):
    """What a step draws: another number at each step and of each seed, the same twice, whatever was drawn before."""
    data, drawn = pairs(), []

    def drawing(model, at, sides):
        drawn.append(torch.rand(()).item())
        return PlainScorer(data, 0)(model, at, sides)

    for seed in (0, 0, 1):
        policy, _ = tiny_gpt2(), torch.rand(1 + len(drawn))
        before = torch.get_rng_state()
        train(policy, data, drawing, sft(data), plan(seed=seed), cpu)
        assert torch.equal(torch.get_rng_state(), before)
    assert drawn[:6] == drawn[6:12]
    assert len(set(drawn)) == 12


def test_dpo_learns_the_pairs(cpu):
    _, rows = run(cpu, epochs=20)
    assert rows[-1]["loss"] < 0.3
    assert rows[-1]["reward_accuracy"] == 1.0


def test_swapped_sides_teach_the_opposite(cpu):
    data = pairs()
    swapped = [EncodedPair(p.prompt, p.rejected, p.chosen, p.index) for p in data]
    policy, _ = run(cpu, data=swapped, epochs=20)
    before, after = scored(tiny_gpt2(), data, cpu), scored(policy, data, cpu)
    assert ((after.chosen - before.chosen) < (after.rejected - before.rejected)).all()


def test_only_the_unfrozen_blocks_and_the_last_norm_move(cpu):
    policy, _ = run(cpu)
    start = dict(tiny_gpt2().named_parameters())
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, start[name])}
    assert {name.split(".")[1] for name in moved} == {"h", "ln_f"}
    assert {name.split(".")[2] for name in moved if ".h." in name} == {"1", "2"}


def test_micro_batches_give_the_same_run(cpu, monkeypatch):
    """A batch of 4 in one pass, or sorted by length in parts of 1 and 3: same losses, weights within rounding.

    Under SGD: RMSprop and AdamW make a full step of a gradient that is rounding and nothing else.
    """
    monkeypatch.setattr("dpo_helpers.training.make_optimizer", lambda _, p, rate: torch.optim.SGD(p, lr=10 * rate))
    whole, rows = run(cpu)
    assert abs(rows[-1]["loss"] - rows[0]["loss"]) > 0.01, "it learns"
    for size in (1, 3):
        parts, other = run(cpu, micro_batch_size=size)
        assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in rows], abs=1e-4)
        assert [r["grad_norm"] for r in other] == pytest.approx([r["grad_norm"] for r in rows], rel=1e-3)
        for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_the_whole_batch_at_once_is_the_same_run(cpu, monkeypatch):
    """`train` as the notebook calls it, without a way of its own to make the gradient, against parts of 3 of 4 pairs."""
    monkeypatch.setattr("dpo_helpers.training.make_optimizer", lambda _, p, rate: torch.optim.SGD(p, lr=10 * rate))
    _, parts = run(cpu, micro_batch_size=3)
    data, policy = pairs(), tiny_gpt2()
    freeze(policy, 1)
    whole = train(policy, data, PlainScorer(data, 0), DPOObjective(scored(policy, data, cpu), 0.5), PLAN, cpu)
    assert [sorted(row) for row in whole] == [sorted(row) for row in parts]
    for key in ("loss", "chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy", "grad_norm"):
        assert [row[key] for row in whole] == pytest.approx([row[key] for row in parts], abs=1e-4, rel=1e-3), key
    for key in ("step", "epoch", "split", "learning_rate", "pairs"):
        assert [row[key] for row in whole] == [row[key] for row in parts], key


def test_same_settings_twice_are_bit_equal_and_another_seed_is_not(cpu):
    first, rows = run(cpu)
    torch.manual_seed(99)
    second, other = run(cpu)
    assert weights_hash(first) == weights_hash(second)
    assert [r["loss"] for r in rows] == [r["loss"] for r in other]
    assert weights_hash(run(cpu, batch_size=3)[0]) != weights_hash(first)


def test_gradients_are_clipped(cpu, monkeypatch):
    """After clipping no gradient is longer than max_grad_norm; the logged norm is the one before."""
    norm, seen, clip = 1e-3, [], training.clip_grad_norm_

    def spy(parameters, max_norm):
        total = clip(parameters, max_norm)
        seen.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())
        return total

    monkeypatch.setattr(training, "clip_grad_norm_", spy)
    data = pairs()
    no_reference = PairScores(torch.zeros(10), torch.zeros(10), *lengths(data))
    rows = train_in_parts(tiny_gpt2(), data, DPOObjective(no_reference, 5.0), plan(max_grad_norm=norm), cpu)
    assert len(seen) == len(rows) == 6
    assert max(seen) <= norm * 1.001
    assert rows[0]["grad_norm"] > 10 * norm


def test_sft_runs_on_chosen_rows_only(cpu):
    """Other tokens in every rejected response leave an SFT run bit-equal; its loss falls."""
    data = pairs()
    other = [EncodedPair(p.prompt, p.chosen, [49 for _ in p.rejected], p.index) for p in data]
    policy, rows = run(cpu, sft(data), data, epochs=10)
    assert weights_hash(policy) == weights_hash(run(cpu, sft(other), other, epochs=10)[0])
    assert rows[-1]["loss"] < rows[0]["loss"] - 1


def test_evaluation_points(cpu, tmp_path):
    calls, data = [], pairs()

    def evaluate(model, step):
        calls.append(step)
        return {"loss": 0.0}

    watch = RunWatch("x", Checkpoints(tmp_path / "x", {}), lambda: 0, evaluate, evaluations=3)
    _, rows = run(cpu, sft(data), data, watch=watch, epochs=4)
    assert [row["step"] for row in rows if row["split"] == "held_out"] == [0, 4, 8, 12]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 13))
    assert calls == [0, 4, 8, 12]


def test_only_the_rows_at_fault_are_named(cpu):
    """NaN in one pair's loss: that row, not its batch."""
    data = pairs(4)
    reference = PairScores(torch.tensor([0.0, 0.0, float("nan"), 0.0]), torch.zeros(4), *lengths(data))
    with pytest.raises(TrainingError, match=r"loss is not finite at update 1 \(rows 102\)"):
        train_in_parts(tiny_gpt2(), data, DPOObjective(reference, 0.5), PLAN, cpu)
