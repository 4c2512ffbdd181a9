"""9 Out of memory: the micro-batch halves, the passes double, the update stays; at the floor a clear error."""

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from test_training import pairs, run, scored

from conftest import tiny_gpt2
from dpo_helpers.errors import TrainingError
from dpo_helpers.logprobs import BOTH, PlainScorer
from dpo_helpers.run import trained
from dpo_helpers.training import DPOObjective


class OutOfMemory(PlainScorer):
    """The plain path, but more than `limit` pairs at once run out of memory, by default from update 3 of 4 pairs on."""

    def __init__(self, data, limit, error, after=8):
        super().__init__(data, 0)
        vars(self).update(limit=limit, error=error, after=after, sizes=[])

    def __call__(self, model, at, sides=BOTH):
        self.sizes.append(len(at))
        if self.is_too_much(len(at)):
            raise self.error
        return super().__call__(model, at, sides)

    def is_too_much(self, size):
        return sum(self.sizes) > self.after and size > self.limit


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")


def limited(cpu, limit, error, kind=OutOfMemory, **changes):
    """(The scorer, the policy, the rows) of a training whose reference is not the policy's start."""
    data = pairs(12)
    scores = scored(tiny_gpt2(), data, cpu)
    objective = DPOObjective(replace(scores, chosen=scores.chosen - 1), 0.5)
    scorer = kind(data, limit, error)
    return scorer, *run(cpu, objective, data, scorer=scorer, **changes)


@pytest.mark.parametrize("error", [CUDA, CPU])
def test_out_of_memory_halves_the_micro_batch_and_nothing_else(cpu, capsys, error, monkeypatch, survived):
    """Batches of 4 in one part; from update 3 on one pair fits: 4 fails, 2 fails, then four parts of 1.

    Under SGD, whose weights show the gradients; RMSprop would amplify their rounding.
    """
    monkeypatch.setattr("dpo_helpers.training.make_optimizer", lambda _, p, rate: torch.optim.SGD(p, lr=rate))
    _, expected_policy, expected = limited(cpu, 4, error)
    scorer, policy, rows = limited(cpu, 1, error)
    assert scorer.sizes[:5] == [4, 4, 4, 2, 1]
    assert set(scorer.sizes[4:]) == {1}, "the smaller size stays"
    said = capsys.readouterr().out
    assert "out of memory at update 3 with 2 pairs per forward pass: from here on 1" in said
    for key in ("loss", "grad_norm", "reward_margin"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], abs=1e-5), key
    both = list(zip(policy.parameters(), expected_policy.parameters(), strict=True))
    same = sum((ours - other).abs().max().item() <= 1e-5 for ours, other in both)
    survived(f"9 out of memory ({type(error).__name__}): parameters as without it, to 1e-5", same, len(both))


def test_out_of_memory_with_a_single_pair_is_an_error_that_names_rows(cpu):
    with pytest.raises(TrainingError, match=r"single pair per forward pass, at update 3 \(rows 10\d") as caught:
        limited(cpu, 0, CUDA)
    assert "--max-length" in str(caught.value)


def test_other_runtime_errors_are_not_taken_for_it(cpu):
    with pytest.raises(RuntimeError, match="shapes"):
        limited(cpu, 1, RuntimeError("shapes do not match"))


def test_out_of_memory_after_part_of_a_gradient_counts_nothing_twice(cpu):
    """Parts of two: the second part of update 2 fails, when the first one's gradient is there already."""

    class Once(OutOfMemory):
        def is_too_much(self, size):
            return len(self.sizes) == self.limit

    runs = [limited(cpu, call, CUDA, Once, micro_batch_size=2) for call in (4, -1)]
    assert runs[0][0].sizes[:8] == [2, 2, 2, 2, 1, 1, 1, 1]
    for key in ("loss", "grad_norm"):
        failed, whole = ([row[key] for row in rows[:2]] for _, _, rows in runs)
        assert failed == pytest.approx(whole, rel=1e-5, abs=1e-5), key


def test_a_backward_pass_that_ran_out_of_memory_leaves_nothing_of_its_graph(cpu):
    """It would take the room that the smaller parts need."""

    class FailsBackward(PlainScorer):
        graphs: ClassVar[list] = []

        def __call__(self, model, at, sides=BOTH):
            assert not any(graph() is not None for graph in self.graphs)
            found = super().__call__(model, at, sides)
            self.graphs += map(weakref.ref, found)
            if len(self.graphs) == 2:
                found[0].register_hook(self.fail)
            return found

        def fail(self, _):
            raise CUDA

    scorer = FailsBackward(data := pairs(12), 0)
    run(cpu, DPOObjective(scored(tiny_gpt2(), data, cpu), 0.5), data, scorer=scorer)
    assert len(scorer.graphs) == 2 * (1 + 2 * 6), "4 pairs, then two parts of 2 for each of six updates"


@pytest.mark.parametrize("error", [CUDA, CPU])
def test_scoring_makes_its_batches_smaller_and_gives_the_same_scores(cpu, small, monkeypatch, error):
    data = SimpleNamespace(train=pairs(12))
    scorer = OutOfMemory(data.train, 3, error, after=0)
    monkeypatch.setattr(trained, "scorer_of", lambda *_: scorer)
    found, expected = trained.score_part(small, data, tiny_gpt2(), "train"), scored(tiny_gpt2(), data.train, cpu)
    assert scorer.sizes == [12, 6, 3, 3, 3, 3]
    torch.testing.assert_close(found.chosen, expected.chosen, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.rejected, expected.rejected, atol=1e-5, rtol=0)
    scorer = OutOfMemory(data.train, 0, error, after=0)
    with pytest.raises(TrainingError, match="single pair per forward pass, at scoring train pairs: lower --max-length"):
        trained.score_part(small, data, tiny_gpt2(), "train")
    assert scorer.sizes == [12, 6, 3, 2, 1]


def test_out_of_memory_in_the_optimiser_is_an_error_that_says_how_to_go_on(cpu, monkeypatch):
    def full(*arguments, **more):
        raise CUDA

    monkeypatch.setattr(torch.optim.RMSprop, "step", full)
    with pytest.raises(
        TrainingError, match="in the optimiser's step of update 1: run the same again to go on from the"
    ):
        run(cpu)
