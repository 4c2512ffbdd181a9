"""The fast path against the plain step that runs two padded rows per pair through the whole model."""

import gc
import math
from dataclasses import replace

import pytest
import torch
from test_training import pairs, plan, scored, sft, train_in_parts
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from conftest import tiny_gpt2
from dpo_helpers.device import Compute
from dpo_helpers.errors import DataError, TrainingError
from dpo_helpers.fast.engine import FastScorer
from dpo_helpers.fast.flat import flatten, tokens_of
from dpo_helpers.fast.store import TrunkStore, room
from dpo_helpers.logprobs import PlainScorer
from dpo_helpers.models import freeze
from dpo_helpers.run.checkpoints import Checkpoints
from dpo_helpers.run.loading import with_float32_head
from dpo_helpers.run.watch import RunWatch
from dpo_helpers.tokens import EncodedPair
from dpo_helpers.training import DPOObjective


def tiny_llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def objectives(model, data, compute):
    scores = scored(model, data, compute)
    moved = replace(scores, chosen=scores.chosen - 1, rejected=scores.rejected + 1)
    return {"dpo": DPOObjective(moved, 0.5), "sft": sft(data)}


def losses_and_gradients(model, objective, scorer, at):
    model.zero_grad()
    losses, _ = objective(at, *scorer(model, at, objective.sides))
    losses.mean().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, relative):
    """Losses, and each gradient tensor in L2 norm, to this relative difference."""
    (losses, grads), (expected_losses, expected_grads) = found, expected
    assert ((losses - expected_losses).abs() <= relative * expected_losses.abs().clamp_min(1)).all()
    assert set(grads) == set(expected_grads) != set()
    for key, grad in expected_grads.items():
        assert (grads[key] - grad).norm() <= relative * grad.norm(), key


@pytest.mark.parametrize("name", ["dpo", "sft"])
@pytest.mark.parametrize("first_blocks", [0, 1, 2, 3])
def test_float64_to_12_digits(cpu, name, first_blocks):
    """The first step of the ladder: tiny GPT-2, the second use reads what the first one stored."""
    data, model = pairs(), tiny_gpt2().double()
    freeze(model, first_blocks)
    objective = objectives(model, data, cpu)[name]
    fast = FastScorer(model, data, first_blocks)
    at = [7, 2, 9, 4]
    expected = losses_and_gradients(model, objective, PlainScorer(data, 0), at)
    for _ in range(2):
        assert_close(losses_and_gradients(model, objective, fast, at), expected, 1e-12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_llama(cpu, name, tied):
    """Grouped keys and values, rotary positions; a head of its own is not frozen, so it gets its gradient too."""
    data, model = pairs(), tiny_llama(tie_word_embeddings=tied)
    freeze(model, 2)
    objective = objectives(model, data, cpu)[name]
    at = [7, 2, 9, 4]
    expected = losses_and_gradients(model, objective, PlainScorer(data, 0), at)
    found = losses_and_gradients(model, objective, FastScorer(model, data, 2), at)
    assert_close(found, expected, 1e-4)
    assert ("lm_head.weight" in found[1]) is not tied


@pytest.mark.parametrize(
    "changes",
    [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"activation_function": "relu"}],
    ids=str,
)
def test_gpt2s_that_are_configured_otherwise(cpu, changes):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**tiny_gpt2().config.to_dict(), **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        found, plain = (s(model, range(10)) for s in (FastScorer(model, pairs(), 1), PlainScorer(pairs(), 0)))
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("first_blocks", [0, 1])
def test_the_rotation_is_computed_once_for_all_blocks(first_blocks):
    """Once for the frozen blocks, once for the others; one token more is run to find what lies below them."""
    model, lengths = tiny_llama(), []
    freeze(model, first_blocks)
    model.model.rotary_emb.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[-2]))
    data = pairs()[:4]
    FastScorer(model, data, first_blocks)(model, range(4))
    tokens = sum(map(tokens_of, data))
    assert [n for n in lengths if n > 1] == [tokens] * (1 + bool(first_blocks))


SHAPES = {
    "a single pair": [(3, 2, 2)],
    "equal lengths": [(4, 3, 3)] * 4,
    "one token each": [(1, 1, 1), (1, 1, 1)],
    "one long row among short ones": [(40, 10, 12), (2, 1, 3), (3, 2, 1)],
    "one long response": [(2, 50, 1), (2, 1, 1)],
    "one row of 1,024 tokens": [(1000, 24, 12), (2, 1, 3), (5, 7, 2)],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_batches_of_any_shape(cpu, shape):
    """GPT-2's longest row, 1,024 tokens, among them."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(1, 50, (n,), generator=generator).tolist()

    data = [EncodedPair(ids(p), ids(c), ids(r), i) for i, (p, c, r) in enumerate(SHAPES[shape])]
    model = tiny_gpt2(positions=1024)
    freeze(model, 1)
    objective = objectives(model, data, cpu)["dpo"]
    at = range(len(data))
    expected = losses_and_gradients(model, objective, PlainScorer(data, 0), at)
    assert_close(losses_and_gradients(model, objective, FastScorer(model, data, 1), at), expected, 1e-4)


@pytest.mark.parametrize("budget", [4e9, 64 * (sum(map(tokens_of, pairs())) - 1), 1000, 0])
def test_what_finds_no_room_is_run_again(cpu, budget):
    """d = 16 in float32 is 64 bytes per token: 1,000 bytes hold 15 tokens, one or two pairs of ten. Or one too few."""
    data, model = pairs(), tiny_gpt2()
    freeze(model, 2)
    objective = objectives(model, data, cpu)["dpo"]
    fast = FastScorer(model, data, 2, budget=budget)
    expected = losses_and_gradients(model, objective, PlainScorer(data, 0), range(10))
    for _ in range(2):
        assert_close(losses_and_gradients(model, objective, fast, range(10)), expected, 1e-4)
    kept = [i for i in range(10) if fast.store.has(i)]
    assert len(kept) == 10 if budget == 4e9 else 0 < len(kept) < 10 if budget else not kept
    assert 64 * sum(tokens_of(data[i]) for i in kept) <= budget


def test_pairs_meet_the_frozen_blocks_in_the_same_company_whichever_comes_first(cpu, monkeypatch):
    """A matrix product rounds a row by what else is in the matrix: a resumed training would not go on bit for bit."""
    run, met = FastScorer._run_frozen, []
    monkeypatch.setattr(FastScorer, "_run_frozen", lambda self, *a: met[-1].add(tuple(a[2])) or run(self, *a))
    model = tiny_gpt2()
    for order in ([3, 1], [1], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]), ([0, 9], [4, 1, 3], range(10)):
        met.append({()})
        fast = FastScorer(model, pairs(), 1)
        with torch.no_grad():
            for at in order:
                fast(model, at)
    assert met[0] == met[1]
    assert sorted(map(len, met[0])) == [0, 2, 8]


def stores_of(tmp_path, dtype=torch.float32):
    """A store with rows for pairs 5, 2 and 7, of which 5 and 2 are there, what they are, and how to open it again."""
    rows = torch.arange(24.0).view(6, 4).to(dtype)

    def opened():
        return TrunkStore({5: 4, 2: 2, 7: 1}, 4, torch.device("cpu"), dtype=dtype, file=tmp_path / "new" / "kept.rows")

    store = opened()
    store.put(5, rows[:4])
    store.put(2, rows[4:])
    return store, rows, opened


def here(store):
    return [pair for pair in (5, 2, 7, 3) if store.has(pair)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_a_file_are_there_for_the_next_process(tmp_path, dtype):
    """Also for one that has the file open: what it did not find, it finds as soon as another has put it there."""
    first, rows, opened = stores_of(tmp_path, dtype)
    second = opened()
    assert here(second) == [5, 2]
    assert torch.equal(second.get(5, 3), rows[:3])
    assert torch.equal(second.get(2, 2), rows[4:])
    first.put(7, torch.full((1, 4), 9.0))
    assert here(second) == [5, 2, 7]
    assert second.get(7, 1).tolist() == [[9.0] * 4]


def test_rows_that_are_not_what_was_written_are_not_there(tmp_path):
    """A file of 7 rows of 16 bytes and 3 checksums of 8: its bytes 64 to 95 are pair 2's."""
    store, rows, opened = stores_of(tmp_path)
    file = tmp_path / "new" / "kept.rows"
    del store
    gc.collect()
    content = bytearray(file.read_bytes())
    assert len(content) == 7 * 16 + 3 * 8
    for change, expected in ((lambda c: c[95] ^ 1, [5]), (lambda c: c[95], [5, 2])):
        damaged = bytearray(content)
        damaged[95] = change(content)
        file.write_bytes(damaged)
        assert here(opened()) == expected
    file.write_bytes(content[:70])  # cut off: the checksums are gone, and zeros have none
    again = opened()
    assert here(again) == []
    again.put(2, rows[4:])
    assert here(opened()) == [2]
    del again  # nobody may cut a file off that a process still reads
    gc.collect()
    file.write_bytes(b"")
    assert here(opened()) == []


def test_a_full_disk_is_said_and_survived(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpo_helpers.fast.store.os.posix_fallocate", full, raising=False)
    for file in (None, tmp_path / "kept.rows"):
        store = TrunkStore({0: 2}, 4, torch.device("cpu"), file=file)
        store.put(0, torch.ones(2, 4))
        assert not store.keeps(0)
        assert not store.has(0)
        assert "no room for 0.00 GB of the frozen blocks' output (No space left on device)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "what was begun is gone"


def test_a_place_that_takes_no_file_is_no_room(tmp_path, cpu, capsys):
    """The frozen blocks are run again each time, for the same numbers."""
    (tmp_path / "in").write_text("the way")
    data, model = pairs(), tiny_gpt2()
    freeze(model, 1)
    fast = FastScorer(model, data, 1, file=tmp_path / "in" / "kept.rows")
    assert "no room for" in capsys.readouterr().out
    with torch.no_grad():
        torch.testing.assert_close(fast(model, [3, 1]), PlainScorer(data, 0)(model, [3, 1]), atol=1e-4, rtol=0)


def test_a_gpu_gives_half_of_its_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (170, 999))
    assert room(1e9, torch.device("cuda")) == 85
    assert room(32, torch.device("cuda")) == 32
    assert room(1e9, torch.device("cpu")) == 1e9


def test_stored_rows_come_back_after_their_pages_are_given_up():
    store = TrunkStore({5: 4, 2: 2}, 4, torch.device("cpu"))
    rows = torch.arange(24.0).view(6, 4)
    store.put(5, rows[:4])
    store.put(2, rows[4:])
    store.release()
    assert torch.equal(store.get(5, 3), rows[:3])
    assert torch.equal(store.get(2, 2), rows[4:])
    store.put(3, torch.ones(5, 4))
    assert not store.has(3), "it has no place"
    del store
    gc.collect()


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_50_updates_follow_the_plain_loop(cpu, optimizer, monkeypatch):
    """In micro-batches of two. SGD amplifies no rounding: 1e-4 at each step; the outputs of another trunk fail that."""
    if optimizer == "sgd":
        monkeypatch.setattr("dpo_helpers.training.make_optimizer", lambda _, p, rate: torch.optim.SGD(p, lr=rate))
    data = pairs()
    runs = []
    for trunk_of in (None, tiny_gpt2(), tiny_gpt2(seed=1)):
        model = tiny_gpt2()
        freeze(model, 2)
        objective, scorer = objectives(model, data, cpu)["dpo"], None
        if trunk_of is not None:
            scorer = FastScorer(trunk_of, data, 2)
            scored(trunk_of, data, cpu, scorer)
        rows = train_in_parts(model, data, objective, plan(epochs=17, micro_batch_size=2), cpu, scorer)
        runs.append(torch.tensor([row["loss"] for row in rows]))
    assert len(runs[0]) >= 50
    assert runs[0][-1] < 0.9 * runs[0][0], "it learns; how fast depends on the weights that transformers draws"
    torch.testing.assert_close(runs[1], runs[0], atol=1e-4, rtol=0)
    assert (runs[2] - runs[0]).abs().max() > 0.1


def test_the_first_loss_is_ln_2(cpu):
    data, model = pairs(), tiny_gpt2()
    freeze(model, 2)
    fast = FastScorer(model, data, 2)
    objective = DPOObjective(scored(model, data, cpu, fast), 0.5)
    losses, metrics = objective(range(10), *fast(model, range(10)))
    assert losses.tolist() == pytest.approx([math.log(2)] * 10, abs=1e-6)
    assert metrics["reward_margin"].abs().max() <= 1e-5


def test_scoring_gives_what_the_plain_scoring_gives(cpu):
    data, model = pairs(), tiny_gpt2()
    plain = scored(model, data[:7], cpu, batch_size=3)
    found = scored(model, data[:7], cpu, FastScorer(model, data, 2), batch_size=3)
    torch.testing.assert_close(found.chosen, plain.chosen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.rejected, plain.rejected, atol=1e-5, rtol=1e-5)


def test_evaluation_between_updates_leaves_the_model_whole(cpu, tmp_path):
    """Other pairs, scored before, between and after the updates, change neither the model nor a loss."""
    data, other = pairs(), pairs(seed=5)
    runs = []
    for evaluate in (lambda model, step: {"score": scored(model, other, cpu).chosen.mean().item()}, None):
        model = tiny_gpt2()
        freeze(model, 2)
        objective, fast = objectives(model, data, cpu)["dpo"], FastScorer(model, data, 2)
        before = scored(model, other, cpu).chosen.mean().item()
        watch = RunWatch("x", Checkpoints(tmp_path / f"{len(runs)}", {}), lambda: 0, evaluate, evaluations=3)
        runs.append(train_in_parts(model, data, objective, plan(), cpu, fast, watch))
    held_out = [row for row in runs[0] if row["split"] == "held_out"]
    assert [row["step"] for row in held_out] == [0, 2, 4, 6]
    assert held_out[0]["score"] == pytest.approx(before, abs=1e-6)
    assert [r["loss"] for r in runs[0] if r["split"] == "train"] == [r["loss"] for r in runs[1]]


def test_layout_literals():
    """Prompt 5 6, chosen 7 0, rejected 8 9 0; beside it a one-token prompt with two responses of two tokens.

    Flat: 5 6 7 8 9 and 4 3 2. Rows: (5 6 7), (5 6 8 9) of the first pair, (4 3), (4 2) of the second.
    """
    batch = flatten([EncodedPair([5, 6], [7, 0], [8, 9, 0]), EncodedPair([4], [3, 0], [2, 0])])
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 4, 3, 2]
    assert batch.positions.tolist() == [0, 1, 2, 2, 3, 0, 1, 1]
    assert [group.tolist() for group in batch.groups] == [[[5, 6], [5, 7]], [[0, 1, 2]], [[0, 1, 3, 4]]]
    places = [token for group in batch.groups for token in group.flatten().tolist()]
    assert [places[place] for place in batch.back.tolist()] == list(range(8))
    assert batch.scored.tolist() == [1, 2, 1, 3, 4, 5, 6, 5, 7]
    assert batch.targets.tolist() == [7, 0, 8, 9, 0, 3, 0, 2, 0]
    assert batch.side.tolist() == [0, 0, 2, 2, 2, 1, 1, 3, 3]
    only = flatten([EncodedPair([5, 6], [7, 0], [8, 9, 0])], chosen_only=True)
    assert only.ids.tolist() == [5, 6, 7]
    assert (only.scored.tolist(), only.side.tolist()) == ([1, 2], [0, 0])


def test_rows_of_like_length_share_a_group():
    """Lengths 8, 10 | 16: a group ends where a row would pad the shortest by more than a quarter."""
    data = [EncodedPair([1] * 6, [2] * 3, [2] * 5), EncodedPair([1] * 14, [2] * 3, [2] * 3)]
    assert [tuple(group.shape) for group in flatten(data).groups] == [(2, 10), (2, 16)]


def test_responses_do_not_see_each_other():
    """Another chosen response leaves the rejected one's log-probability bit-equal, and the other way round."""
    model = tiny_gpt2()
    one, two = EncodedPair([3, 4], [5, 6, 0], [7, 8, 0]), EncodedPair([3, 4], [9, 2, 0], [7, 8, 0])
    with torch.no_grad():
        found = [FastScorer(model, [pair], 1)(model, [0]) for pair in (one, two)]
    assert found[0][1].item() == found[1][1].item()
    assert found[0][0].item() != found[1][0].item()


def test_dropout_is_refused():
    model = tiny_gpt2()
    freeze(model, 1)
    with pytest.raises(TrainingError, match="dropout off"):
        FastScorer(model, pairs(), 1)(model.train(), [0])


def test_a_trunk_that_trains_is_refused():
    """It would get no gradient, and nobody would notice."""
    model = tiny_gpt2()
    freeze(model, 1)
    with pytest.raises(TrainingError, match="first 2 blocks without gradient"):
        FastScorer(model, pairs(), 2)(model, [0])
    freeze(model, 1, freeze_embeddings=False)
    with pytest.raises(TrainingError, match="embeddings"):
        FastScorer(model, pairs(), 1)(model, [0])


def test_an_empty_prompt_is_named():
    with pytest.raises(DataError, match="row 7: the prompt is empty"):
        flatten([EncodedPair([], [1, 0], [2, 0], index=7)])


def test_sixteen_bits_follow_the_plain_path(cpu):
    """bf16 inside autocast: both paths are near float32's truth, the fast one no further from it."""
    data, model = pairs(200), with_float32_head(tiny_gpt2())
    half = Compute(torch.device("cpu"), "bf16")
    truth, plain, fast = (
        scored(model, data, compute, scorer)
        for compute, scorer in ((cpu, None), (half, None), (half, FastScorer(model, data, 2)))
    )
    error_plain, error_fast = ((found.chosen - truth.chosen).pow(2).mean().sqrt() for found in (plain, fast))
    assert 0 < error_fast <= 1.1 * error_plain
