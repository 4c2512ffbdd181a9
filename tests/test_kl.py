"""KL by enumeration: a vocabulary of three tokens and responses of two, so that all nine can be listed."""

import itertools
import math

import pytest
import torch

from dpo_helpers.evaluation import exact_token_kl, sequence_kl
from dpo_helpers.logprobs import log_softmax

torch.manual_seed(0)
# logits of the next token after nothing and after each first token, for two models
P0, Q0 = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
P1, Q1 = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)


def enumerated_kl():
    p0, q0, p1, q1 = (x.log_softmax(-1) for x in (P0, Q0, P1, Q1))
    total = 0.0
    for a, b in itertools.product(range(3), repeat=2):
        log_p, log_q = (p0[a] + p1[a, b]).item(), (q0[a] + q1[a, b]).item()
        total += math.exp(log_p) * (log_p - log_q)
    return total


def all_sequences():
    """Every response with its probability: ids [9, 3] with a prompt token before it, logits [9, 3, 3]."""
    pairs = list(itertools.product(range(3), repeat=2))
    ids = torch.tensor([[0, a, b] for a, b in pairs])
    p = torch.stack([torch.stack([P0, P1[a], torch.zeros(3)]) for a, _ in pairs])
    q = torch.stack([torch.stack([Q0, Q1[a], torch.zeros(3)]) for a, _ in pairs])
    probability = torch.stack([P0.softmax(-1)[a] * P1.softmax(-1)[a, b] for a, b in pairs])
    mask = torch.tensor([[False, True, True]]).expand(9, 3)
    return ids, p, q, mask, probability


def test_all_three_estimators_have_the_right_mean():
    ids, p, q, mask, probability = all_sequences()
    for name, value in sequence_kl(p, q, ids, mask).items():
        assert abs((value * probability.float()).sum().item() - enumerated_kl()) < 1e-5, name


def test_the_exact_one_varies_least():
    ids, p, q, mask, probability = all_sequences()
    estimates = sequence_kl(p, q, ids, mask)

    def variance(x):
        mean = (x * probability).sum()
        return ((x - mean) ** 2 * probability).sum().item()

    assert variance(estimates["kl"]) < variance(estimates["k1"])
    assert variance(estimates["kl"]) < variance(estimates["k3"])


def test_the_direction_matters_and_is_policy_first():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p‖q) = ½ ln 2 + ½ ln(2/3) = 0.143841, KL(q‖p) = 0.130812."""
    p, q = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    assert abs(exact_token_kl(p, q).item() - 0.1438410362) < 1e-6
    assert abs(exact_token_kl(q, p).item() - 0.1308120359) < 1e-6


@pytest.mark.parametrize(
    ("given", "computed"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_the_exact_kl_is_computed_in_32_bits_or_more_and_never_negative(given, computed):
    """Of two models that are almost the same: rounding makes sums such as -1e-8."""
    p = torch.randn(1, 500, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = p.to(given), (p + 1e-5 * p.flip(-1)).to(given)
    found = exact_token_kl(log_softmax(p), log_softmax(q))
    kls = torch.nn.functional.kl_div(*(x.double().log_softmax(-1) for x in (q, p)), reduction="none", log_target=True)
    assert found.dtype == computed
    assert found.min() >= 0
    torch.testing.assert_close(found.double(), kls.sum(-1), atol=1e-14 if computed == torch.float64 else 1e-6, rtol=0)


def test_k1_can_be_negative_and_the_others_cannot():
    ids, p, q, mask, _ = all_sequences()
    estimates = sequence_kl(p, q, ids, mask)
    assert estimates["k1"].min() < 0
    assert estimates["k3"].min() >= 0
    assert estimates["kl"].min() >= 0


def test_only_response_tokens_count():
    ids, p, q, _, _ = all_sequences()
    nothing = torch.zeros(9, 3, dtype=torch.bool)
    assert all((value == 0).all() for value in sequence_kl(p, q, ids, nothing).values())


def test_equal_models_have_no_kl():
    ids, p, _, mask, _ = all_sequences()
    assert all((value == 0).all() for value in sequence_kl(p, p, ids, mask).values())


def test_200_seeds_against_enumeration():
    """Each seed draws 40 responses from the policy: no estimator is biased (3 standard errors of its mean over the
    seeds), and the exact one has the smallest variance, of single responses and of the means."""
    ids, p, q, mask, probability = all_sequences()
    estimates = sequence_kl(p.double(), q.double(), ids, mask)
    truth, spread = enumerated_kl(), {}
    for name, value in estimates.items():
        means = []
        for seed in range(200):
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.multinomial(probability, 40, replacement=True, generator=generator)
            means.append(value[drawn].mean())
        means = torch.stack(means)
        error = means.std().item() / math.sqrt(200)
        assert abs(means.mean().item() - truth) < 3 * error, name
        assert error < 0.05 * truth, "200 seeds are enough to see a bias of a few per cent"
        spread[name] = means.var().item()
    assert spread["kl"] < 0.5 * min(spread["k1"], spread["k3"])


def test_a_biased_estimator_would_be_found():
    """The single token's KL instead of the sum, and the other direction: both are far outside three errors."""
    ids, p, q, mask, probability = all_sequences()
    drawn = torch.multinomial(probability, 8000, replacement=True, generator=torch.Generator().manual_seed(0))
    first_only = sequence_kl(p, q, ids, mask & (torch.arange(3) < 2))["kl"][drawn]
    reverse = sequence_kl(q, p, ids, mask)["kl"][drawn]
    for wrong in (first_only, reverse):
        assert abs(wrong.mean().item() - enumerated_kl()) > 3 * wrong.std().item() / math.sqrt(8000)
