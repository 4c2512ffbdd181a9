"""Log-probabilities against hand-derived literals, a float64 loop, and transformers' own loss."""

import math

import pytest
import torch

from dpo_helpers.fast.engine import FastScorer
from dpo_helpers.fast.head import head_logprobs
from dpo_helpers.logprobs import PairScores, PlainScorer, pair_logprobs, response_logprobs, token_logprobs
from dpo_helpers.tokens import EncodedPair, collate

PAIRS = [
    EncodedPair([4, 9, 2], [7, 7, 0], [3, 0]),
    EncodedPair([8], [1, 5, 6, 30, 0], [11, 12, 0]),
]


def test_literal_with_three_tokens():
    """Vocabulary of 3, logits ln 1, ln 2, ln 5 at each position: p = 1/8, 2/8, 5/8.

    ids 0, 2, 1: token 1 is "2" with p 5/8, token 2 is "1" with p 2/8. Scored from position 1: ln(10/64).
    """
    logits = torch.tensor([1.0, 2.0, 5.0]).log().repeat(1, 3, 1)
    ids = torch.tensor([[0, 2, 1]])
    expected = torch.tensor([[math.log(5 / 8), math.log(2 / 8)]])
    torch.testing.assert_close(token_logprobs(logits, ids), expected)
    mask = torch.tensor([[False, True, True]])
    torch.testing.assert_close(response_logprobs(logits, ids, mask), torch.tensor([math.log(10 / 64)]))
    only_last = torch.tensor([[False, False, True]])
    torch.testing.assert_close(response_logprobs(logits, ids, only_last), torch.tensor([math.log(2 / 8)]))


def test_the_first_token_has_no_log_probability():
    """A mask that starts at position 0 scores the same as one that starts at 1: nothing predicts the first."""
    logits, ids = torch.randn(1, 4, 5), torch.tensor([[1, 2, 3, 4]])
    everything = torch.ones(1, 4, dtype=torch.bool)
    later = everything.clone()
    later[0, 0] = False
    assert torch.equal(response_logprobs(logits, ids, everything), response_logprobs(logits, ids, later))


def loop_oracle(model, prompt, response):
    """One forward pass a token, no padding, no mask, in float64."""
    total = 0.0
    for t, token in enumerate(response):
        logits = model(input_ids=torch.tensor([prompt + response[:t]])).logits[0, -1]
        total += (logits - logits.logsumexp(0))[token].item()
    return total


def test_equal_to_a_token_by_token_loop_in_float64(gpt2):
    model = gpt2.double()
    with torch.no_grad():
        chosen, rejected = pair_logprobs(model, collate(PAIRS, pad_id=0))
        for i, pair in enumerate(PAIRS):
            assert abs(chosen[i].item() - loop_oracle(model, pair.prompt, pair.chosen)) < 1e-12
            assert abs(rejected[i].item() - loop_oracle(model, pair.prompt, pair.rejected)) < 1e-12
    assert chosen.dtype == torch.float64


def test_equal_to_transformers_loss(gpt2):
    """transformers' language-model loss is the mean over unmasked labels: times their number it is our sum."""
    for pair in PAIRS:
        ids = torch.tensor([pair.prompt + pair.chosen])
        labels = torch.tensor([[-100] * len(pair.prompt) + pair.chosen])
        with torch.no_grad():
            expected = -gpt2(input_ids=ids, labels=labels).loss.item() * len(pair.chosen)
            got, _ = pair_logprobs(gpt2, collate([pair], pad_id=0))
        assert abs(got.item() - expected) < 1e-4


def test_padding_and_neighbours_change_nothing(gpt2):
    with torch.no_grad():
        together, _ = pair_logprobs(gpt2, collate(PAIRS, pad_id=0))
        alone = [pair_logprobs(gpt2, collate([pair], pad_id=0))[0].item() for pair in PAIRS]
    torch.testing.assert_close(together, torch.tensor(alone), atol=1e-5, rtol=0)


def test_changing_the_chosen_response_leaves_the_rejected_one_alone(gpt2):
    other = EncodedPair(PAIRS[0].prompt, [7, 8, 0], PAIRS[0].rejected)
    with torch.no_grad():
        chosen, rejected = pair_logprobs(gpt2, collate([PAIRS[0]], pad_id=0))
        other_chosen, other_rejected = pair_logprobs(gpt2, collate([other], pad_id=0))
    assert torch.equal(rejected, other_rejected)
    assert not torch.equal(chosen, other_chosen)


def test_sixteen_bit_logits_are_summed_in_float32():
    logits = torch.zeros(1, 300, 50, dtype=torch.bfloat16)
    ids, mask = torch.zeros(1, 300, dtype=torch.int64), torch.ones(1, 300, dtype=torch.bool)
    got = response_logprobs(logits, ids, mask)
    assert got.dtype == torch.float32
    assert abs(got.item() + 299 * math.log(50)) < 1e-2


@pytest.mark.parametrize("size", [3 * 4 * 7, 1])
def test_the_head_in_chunks_is_autograd(monkeypatch, size):
    """Chunks of 3 rows, or of one where not even that has room, 10 rows: float64 values and gradients against
    log_softmax."""
    monkeypatch.setattr("dpo_helpers.fast.head.CHUNK_BYTES", size)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    targets, upstream = torch.arange(10) % 7, torch.linspace(-1, 2, 10, dtype=torch.float64)
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(10), targets]
    found = head_logprobs(hidden, weight, targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(logps, hidden, upstream)[0] for logps in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trains", [False, True])
def test_the_head_reckons_in_32_bits_what_comes_in_16(trains):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 5, generator=generator).bfloat16()
    weight, targets = 20 * torch.randn(7, 5, generator=generator), torch.arange(10) % 7
    with torch.autocast("cpu", torch.bfloat16):
        found = head_logprobs(hidden, weight.requires_grad_(trains), targets)
    expected = (hidden.double() @ weight.double().T).log_softmax(-1)[torch.arange(10), targets]
    torch.testing.assert_close(found, expected.float(), atol=1e-3, rtol=0)


def test_the_plain_scorer_runs_the_pairs_at_these_positions_and_no_side_that_is_not_asked_for(gpt2):
    rows = []
    gpt2.register_forward_pre_hook(
        lambda model, _, given: rows.append(given["input_ids"].tolist()) or None, with_kwargs=True
    )
    scorer = PlainScorer([*PAIRS, EncodedPair([9], [4, 0], [5, 5, 0])], pad_id=0)
    with torch.no_grad():
        chosen, rejected = scorer(gpt2, [1, 0])
        (only,) = scorer(gpt2, [1, 0], ("chosen",))
        expected = pair_logprobs(gpt2, collate([PAIRS[1], PAIRS[0]], pad_id=0))
    torch.testing.assert_close(chosen, expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(rejected, expected[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(only, expected[0], atol=1e-6, rtol=0)
    of_both = [[8, 1, 5, 6, 30, 0], [4, 9, 2, 7, 7, 0], [8, 11, 12, 0, 0, 0], [4, 9, 2, 3, 0, 0]]
    assert rows[:2] == [of_both, of_both[:2]]


@pytest.mark.parametrize("sides", [("chosen",), ("rejected",), ("chosen", "rejected"), ("rejected", "chosen")])
@pytest.mark.parametrize("scorer", [PlainScorer(PAIRS, 0), lambda *given: FastScorer(given[0], PAIRS, 1)(*given)])
def test_a_scorer_gives_the_sides_that_are_named_in_their_order(gpt2, scorer, sides):
    with torch.no_grad():
        found = scorer(gpt2, [1, 0], sides)
        expected = dict(zip(("chosen", "rejected"), pair_logprobs(gpt2, collate(PAIRS[::-1], pad_id=0)), strict=True))
    assert len(found) == len(sides)
    for side, logps in zip(sides, found, strict=True):
        torch.testing.assert_close(logps, expected[side], atol=1e-5, rtol=0)


def test_some_of_the_pairs_keep_what_is_theirs():
    scores = PairScores(*(torch.arange(4) + 10 * k for k in range(4)))
    found = scores[[2, 0]]
    assert [values.tolist() for values in vars(found).values()] == [[2, 0], [12, 10], [22, 20], [32, 30]]
