"""6 Reference identity and 10 determinism: π_ref is what the policy starts from, and it never moves."""

import math

import pytest
import torch
from test_training import pairs, plan, scored, sft, train_in_parts

from conftest import tiny_gpt2
from dpo_helpers.errors import ArtefactError
from dpo_helpers.models import freeze, weights_hash
from dpo_helpers.run import stages, trained
from dpo_helpers.run.disk import file_hash
from dpo_helpers.training import DPOObjective, train


def tuned(cpu):
    """A policy that was changed in memory, unlike anything on disk."""
    model = tiny_gpt2()
    train_in_parts(model, pairs(), sft(pairs()), plan(), cpu)
    return model


def test_a_policy_tuned_in_memory_starts_at_ln_2_against_itself(cpu, survived):
    """TRL reloads a reference that is not given by the policy's name, and so takes another one (trl#872, #1193)."""
    policy, data = tuned(cpu), pairs()
    scores, before = scored(policy, data, cpu), weights_hash(policy)
    rows = train_in_parts(policy, data, DPOObjective(scores, 0.5), plan(), cpu)
    survived("6 tuned in memory: loss at step 0 is ln 2 ± 1e-6", int(abs(rows[0]["loss"] - math.log(2)) <= 1e-6), 1)
    assert weights_hash(policy) != before, "the policy learns"


def test_the_same_object_as_policy_and_reference(cpu, survived):
    """The reference's log-probabilities are taken once, before the policy moves: its moving does not move them."""
    model, data = tiny_gpt2(), pairs()
    freeze(model, 1)
    reference = scored(model, data, cpu)
    rows = train_in_parts(model, data, DPOObjective(reference, 0.5), plan(epochs=10), cpu)
    good = abs(rows[0]["loss"] - math.log(2)) <= 1e-6 and rows[-1]["loss"] < 0.5
    survived("6 same object twice: ln 2 at step 0, and it learns", int(good), 1)
    again = scored(tiny_gpt2(), data, cpu)
    assert torch.equal(again.chosen, reference.chosen)


def test_the_stored_reference_is_the_same_after_training_and_is_watched(small, monkeypatch, survived):
    reference = stages.get_reference(small)
    weights = reference.folder / "model.safetensors"
    before = file_hash(weights)
    dpo = stages.get_dpo(small)
    same = dpo.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and file_hash(weights) == before
    survived("6 stored reference: ln 2 at step 0, its hash unchanged at the end", int(same), 1)

    def meddling(*arguments, **more):
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
        return train(*arguments, **more)

    monkeypatch.setattr(trained, "train", meddling)
    with pytest.raises(ArtefactError, match=r"reference/model\.safetensors is damaged"):
        stages.get_dpo(small, beta=5.0)
    assert not (small.run_dir / "sweep/beta-5").exists()


def test_a_stage_that_was_made_again_is_not_taken_for_the_old_one(small):
    from dataclasses import replace

    held = stages.get_sft(small)
    stages.get_sft(replace(small, sft_learning_rate=1e-5))
    for use in (held.load, lambda: held.scores("held_out")):
        with pytest.raises(ArtefactError, match="sft was made again since it was opened: open it again"):
            use()


def test_two_runs_of_the_same_settings_are_bit_equal(small, tmp_path, survived):
    from dataclasses import replace

    first, second = (stages.get_dpo(replace(small, runs_dir=str(tmp_path / name))) for name in ("a", "b"))
    same = first.weights_sha256 == second.weights_sha256 and [r["loss"] for r in first.metrics] == [
        r["loss"] for r in second.metrics
    ]
    survived("10 same settings twice: weights and losses bit-equal", int(same), 1)
