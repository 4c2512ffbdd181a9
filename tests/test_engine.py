"""The frozen trunk, stored and replayed, against the plain step that runs the whole model."""

import pytest
import torch
from test_training import PLAN, pairs, plan
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import tiny_gpt2
from dpo_helpers.engine import FrozenTrunk
from dpo_helpers.evaluation import score_pairs
from dpo_helpers.models import blocks, freeze
from dpo_helpers.tokens import collate
from dpo_helpers.training import DPOObjective, sft_objective, train


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def objectives(model, data, compute):
    scores = score_pairs(model, data, compute, pad_id=0)
    return {"dpo": DPOObjective(scores.chosen - 1, scores.rejected + 1, 0.5), "sft": sft_objective}


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("name", ["dpo", "sft"])
@pytest.mark.parametrize("first_blocks", [1, 2, 3])
def test_losses_and_gradients_are_those_of_the_plain_step(cpu, make, name, first_blocks):
    data, model = pairs(), make()
    freeze(model, first_blocks)
    objective = objectives(model, data, cpu)[name]
    trunk = FrozenTrunk(model, first_blocks, data, cpu, pad_id=0)
    at = [7, 2, 9, 4]
    batch = collate([data[i] for i in at], 0)
    found = []
    for step in (objective, trunk.wrap(objective)):
        model.zero_grad()
        losses, _ = step(model, batch, at)
        losses.mean().backward()
        found.append((losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (plain, plain_grads), (fast, fast_grads) = found
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    assert set(fast_grads) == set(plain_grads) != set()
    for key, grad in plain_grads.items():
        torch.testing.assert_close(fast_grads[key], grad, atol=1e-5, rtol=1e-4)
    assert len(blocks(model)) == 3, "the model's own blocks are back in place"


def test_a_whole_run_is_that_of_the_plain_loop(cpu):
    """20 updates in small parts: the losses agree; the outputs of another trunk do not give them."""
    data = pairs()
    runs = []
    for trunk_of in (None, tiny_gpt2(), tiny_gpt2(seed=1)):
        model = tiny_gpt2()
        freeze(model, 2)
        objective = objectives(model, data, cpu)["dpo"]
        if trunk_of is not None:
            objective = FrozenTrunk(trunk_of, 2, data, cpu, pad_id=0).wrap(objective)
        rows = train(model, data, objective, plan(epochs=7, micro_batch_size=2), cpu, pad_id=0)
        runs.append(torch.tensor([row["loss"] for row in rows]))
    assert len(runs[0]) >= 20
    torch.testing.assert_close(runs[1], runs[0], atol=1e-4, rtol=0)
    assert (runs[2] - runs[0]).abs().max() > 0.1


def test_memory_is_counted(cpu):
    """10 pairs, d = 16, float32: 64 bytes a token of prompt + chosen and of prompt + rejected."""
    data = pairs()
    tokens = sum(len(p.prompt) * 2 + len(p.chosen) + len(p.rejected) for p in data)
    assert FrozenTrunk.bytes_needed(data, 16) == 64 * tokens
    assert FrozenTrunk(tiny_gpt2(), 1, data, cpu, pad_id=0)._stored.numel() * 4 == 64 * tokens


def test_evaluation_between_updates_runs_the_whole_model(cpu):
    """Held-out pairs are not in the trunk: while the policy is evaluated its own blocks are in place."""
    data, model = pairs(), tiny_gpt2()
    freeze(model, 2)
    objective = FrozenTrunk(model, 2, data, cpu, pad_id=0).wrap(objectives(model, data, cpu)["dpo"])
    other = pairs(seed=5)
    before = score_pairs(model, other, cpu, pad_id=0).chosen.mean().item()
    rows = train(
        model, data, objective, PLAN, cpu, pad_id=0,
        evaluate=lambda: {"score": score_pairs(model, other, cpu, pad_id=0).chosen.mean().item()},
    )  # fmt: skip
    assert rows[0]["score"] == pytest.approx(before, abs=1e-6)
