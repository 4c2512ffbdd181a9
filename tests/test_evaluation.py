import math

import pytest
import torch

from conftest import tiny_gpt2
from dpo_helpers.evaluation import (
    PairScores,
    mean_and_error,
    measure_kl,
    preference_metrics,
    score_pairs,
    text_measures,
)
from dpo_helpers.generation import Response, sample
from dpo_helpers.logprobs import pair_logprobs
from dpo_helpers.tokens import EncodedPair, collate


def test_mean_and_error_by_hand():
    """1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, variance 14/3, error √(14/3)/2 = 1.0801."""
    assert mean_and_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 3) / 2))
    assert math.isnan(mean_and_error([1.0])[1])


def test_preference_metrics_by_hand():
    """β = 0.5, log-ratios chosen (2, -2, 0), rejected (0, 2, 0): margins 1, -2, 0: one right, one wrong, one tie."""
    policy = PairScores(torch.tensor([-8.0, -12.0, -5.0]), torch.tensor([-10.0, -8.0, -5.0]))
    reference = PairScores(torch.tensor([-10.0, -10.0, -5.0]), torch.tensor([-10.0, -10.0, -5.0]))
    m = preference_metrics(policy, reference, beta=0.5)
    assert m["reward_accuracy"] == pytest.approx(1 / 3)
    assert m["ties"] == pytest.approx(1 / 3)
    assert m["chosen_reward"] == pytest.approx(0.0)
    assert m["rejected_reward"] == pytest.approx(1 / 3)
    assert m["reward_margin"] == pytest.approx(-1 / 3)
    assert m["chosen_logratio"] == pytest.approx(0.0)
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2)) + math.log(2)) / 3
    assert m["loss"] == pytest.approx(expected, abs=1e-6)


def test_batch_size_and_order_change_no_score(cpu):
    model = tiny_gpt2()
    pairs = [EncodedPair([3] * (1 + i % 4), [5 + i, 7, 0][i % 3 :], [9, 0]) for i in range(9)]
    scores = [score_pairs(model, pairs, cpu, pad_id=0, batch_size=size) for size in (1, 4, 9)]
    for other in scores[1:]:
        torch.testing.assert_close(scores[0].chosen, other.chosen, atol=1e-5, rtol=0)
    backwards = score_pairs(model, pairs[::-1], cpu, pad_id=0)
    torch.testing.assert_close(backwards.rejected.flip(0), scores[0].rejected, atol=1e-5, rtol=0)
    with torch.no_grad():
        direct, _ = pair_logprobs(model, collate([pairs[5]], 0))
    assert scores[0].chosen[5].item() == pytest.approx(direct.item(), abs=1e-5)


class Tokens:
    eos_token_id = 0

    def encode(self, text, *, add_special_tokens=True):
        return [ord(c) - 96 for c in text]

    def decode(self, ids):
        return "".join(chr(i + 96) for i in ids)


def test_kl_of_a_model_to_itself_is_zero_and_to_another_is_not(cpu):
    policy, other = tiny_gpt2(0, vocab=27), tiny_gpt2(1, vocab=27)
    responses = sample(policy, Tokens(), ["ab", "cde"] * 5, max_new_tokens=5, compute=cpu)
    same = measure_kl(policy, policy, Tokens(), responses, cpu, max_prompt_length=10)
    assert same["kl"] == same["k1"] == same["k3"] == 0.0
    different = measure_kl(policy, other, Tokens(), responses, cpu, max_prompt_length=10)
    assert different["kl"] > 3 * different["kl_se"] > 0


def test_kl_is_that_of_a_plain_loop(cpu):
    """One unpadded pass a response, full-vocabulary KL at each response position, in float64."""
    policy, other = tiny_gpt2(0, vocab=27), tiny_gpt2(1, vocab=27)
    responses = sample(policy, Tokens(), ["ab", "cdefg", "h"], max_new_tokens=6, compute=cpu)
    got = measure_kl(policy, other, Tokens(), responses, cpu, max_prompt_length=10, batch_size=2)
    totals = []
    for response in responses:
        prompt = Tokens().encode(response.prompt)
        ids = torch.tensor([prompt + response.ids])
        with torch.no_grad():
            p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (policy, other))
        positions = range(len(prompt) - 1, ids.shape[1] - 1)
        totals.append(sum((p[t].exp() * (p[t] - q[t])).sum().item() for t in positions))
    assert got["kl"] == pytest.approx(sum(totals) / 3, rel=1e-4)


def test_text_measures_by_hand():
    responses = [Response("", [1, 2, 0], "a b c", True), Response("", [1, 2, 3, 4, 5], "x y z x y z", False)]
    m = text_measures(responses)
    assert (m["length"], m["ended"], m["repeated_3grams"]) == (4.0, 0.5, 0.125)
    assert m["distinct_2"] == pytest.approx(5 / 7)  # ab bc, xy yz zx xy yz: 5 different of 7
