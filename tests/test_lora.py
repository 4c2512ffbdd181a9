"""LoRA by PEFT, as beyond/d_real_models_and_data uses it: what trains, what the adapter off gives, what merging gives."""

import pytest
import torch
from test_training import PLAN, pairs, scored

from conftest import tiny_gpt2
from dpo_helpers.logprobs import PlainScorer
from dpo_helpers.models import count_parameters, weights_hash
from dpo_helpers.training import DPOObjective, train

peft = pytest.importorskip("peft", reason="PEFT is optional")


def adapted(rank=2):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=True)
    return peft.get_peft_model(tiny_gpt2(), config)


def test_what_trains_is_r_times_inputs_plus_outputs_of_each_matrix():
    """16 wide, 3 blocks, r = 2: 2·(16+48) + 2·(16+16) + 2·(16+64) + 2·(64+16) = 512 a block. The head has none."""
    policy = adapted()
    assert count_parameters(policy).trainable == 3 * 512
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)


def test_with_the_adapter_off_it_is_the_reference_before_and_after_training(cpu):
    data, policy = pairs(), adapted()
    reference = scored(tiny_gpt2(), data, cpu)
    assert torch.equal(scored(policy, data, cpu).chosen, reference.chosen), "B starts at 0, so the adapter adds nothing"
    rows = train(policy, data, PlainScorer(data, 0), DPOObjective(reference, 0.5), PLAN, cpu)
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert not torch.equal(scored(policy, data, cpu).chosen, reference.chosen)
    with policy.disable_adapter():
        off = scored(policy, data, cpu)
    assert torch.equal(off.chosen, reference.chosen)
    assert torch.equal(off.rejected, reference.rejected)


def test_merged_it_is_a_plain_model_with_the_same_log_probabilities(cpu):
    data, policy = pairs(), adapted()
    train(policy, data, PlainScorer(data, 0), DPOObjective(scored(policy, data, cpu), 0.5), PLAN, cpu)
    before = scored(policy, data, cpu)
    merged = policy.merge_and_unload()
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in tiny_gpt2().named_parameters()}
    assert weights_hash(merged) != weights_hash(tiny_gpt2())
    assert torch.allclose(scored(merged, data, cpu).chosen, before.chosen, atol=1e-4)
