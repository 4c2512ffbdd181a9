"""The frozen trunk, stored and replayed, against the plain step that runs the whole model."""

from dataclasses import replace

import pytest
import torch
from test_training import PLAN, pairs, plan
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import tiny_gpt2
from dpo_helpers.device import Compute
from dpo_helpers.engine import FrozenTrunk, pack
from dpo_helpers.evaluation import score_pairs
from dpo_helpers.logprobs import pair_logprobs
from dpo_helpers.models import blocks, freeze
from dpo_helpers.tokens import EncodedPair, collate
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
    for step in (objective, replace(objective, trunk=trunk)):
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
            objective = replace(objective, trunk=FrozenTrunk(trunk_of, 2, data, cpu, pad_id=0))
        rows = train(model, data, objective, plan(epochs=7, micro_batch_size=2), cpu, pad_id=0)
        runs.append(torch.tensor([row["loss"] for row in rows]))
    assert len(runs[0]) >= 20
    torch.testing.assert_close(runs[1], runs[0], atol=1e-4, rtol=0)
    assert (runs[2] - runs[0]).abs().max() > 0.1


def test_memory_is_counted(cpu):
    """10 pairs, d = 16, float32: 64 bytes a token of prompt + chosen + rejected."""
    data = pairs()
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in data)
    assert FrozenTrunk.bytes_needed(data, 16) == 64 * tokens
    assert FrozenTrunk(tiny_gpt2(), 1, data, cpu, pad_id=0)._stored.numel() * 4 == 64 * tokens


def test_evaluation_between_updates_runs_the_whole_model(cpu):
    """Held-out pairs are not in the trunk: while the policy is evaluated its own blocks are in place."""
    data, model = pairs(), tiny_gpt2()
    freeze(model, 2)
    objective = replace(objectives(model, data, cpu)["dpo"], trunk=FrozenTrunk(model, 2, data, cpu, pad_id=0))
    other = pairs(seed=5)
    before = score_pairs(model, other, cpu, pad_id=0).chosen.mean().item()
    rows = train(
        model, data, objective, PLAN, cpu, pad_id=0,
        evaluate=lambda: {"score": score_pairs(model, other, cpu, pad_id=0).chosen.mean().item()},
    )  # fmt: skip
    assert rows[0]["score"] == pytest.approx(before, abs=1e-6)


def test_packing_literals():
    """Prompt 5 6, chosen 7 0, rejected 8 9 0; beside it a shorter pair, so the second row is padded by two."""
    batch = pack([EncodedPair([5, 6], [7, 0], [8, 9, 0]), EncodedPair([4], [3, 0], [2, 0])], pad_id=0)
    assert batch.ids.tolist() == [[5, 6, 7, 0, 8, 9, 0], [4, 3, 0, 2, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 2, 1, 2, 0, 0]]
    assert batch.visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 1, 1, 1],
    ]
    assert batch.row.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.source.tolist() == [1, 2, 1, 4, 5, 0, 1, 0, 3]
    assert batch.target.tolist() == [7, 0, 8, 9, 0, 3, 0, 2, 0]
    assert batch.side.tolist() == [0, 0, 2, 2, 2, 1, 1, 3, 3]


def test_responses_do_not_see_each_other(cpu):
    """Another chosen response leaves the rejected one's log-probability bit-equal, and the other way round."""
    model = tiny_gpt2()
    one, two = EncodedPair([3, 4], [5, 6, 0], [7, 8, 0]), EncodedPair([3, 4], [9, 2, 0], [7, 8, 0])
    with torch.no_grad():
        scored = [FrozenTrunk(model, 1, [pair], cpu, pad_id=0).pair_logprobs(model, [0]) for pair in (one, two)]
    assert scored[0][1].item() == scored[1][1].item()
    assert scored[0][0].item() != scored[1][0].item()


def test_sixteen_bits_follow_the_plain_path(cpu):
    """bf16 inside autocast: both paths run, and are as close to each other as to float32."""
    data, model = pairs(), tiny_gpt2()
    half = Compute(torch.device("cpu"), "bf16")
    batch = collate(data, 0)
    with torch.no_grad():
        truth = torch.cat(pair_logprobs(model, batch))
        trunk = FrozenTrunk(model, 2, data, half, pad_id=0)
        with half.autocast():
            plain = torch.cat(pair_logprobs(model, batch))
            fast = torch.cat(trunk.pair_logprobs(model, range(len(data))))
    assert fast.dtype == plain.dtype == torch.float32
    assert not torch.equal(fast, truth)
    assert (fast - truth).abs().max() < 2 * (plain - truth).abs().max() + 0.05
