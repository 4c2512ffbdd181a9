"""The laboratory: closed-form optima by hand, gradient descent against them, and what finite data costs."""

import math

import pytest
import torch

from dpo_helpers.errors import SettingsError
from dpo_helpers.worlds import tabular

BETAS = (0.1, 0.5, 1.0, 5.0)


@pytest.fixture(scope="module")
def world():
    return tabular.make_world()


def two():
    """Two responses, rewards ln 3 and 0, reference 1/2 each: the first wins 3 times in 4."""
    return tabular.TabularWorld(
        torch.tensor([math.log(3), 0.0], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    )


def test_optima_by_hand():
    """β = 1: π* ∝ (3, 1)/2, so (3/4, 1/4); β = 1/2: (9, 1)/10. IPO, β = 1/2: win rates against a response drawn from
    both are (1/2 + 3/4)/2 = 5/8 and 3/8; π ∝ e^(2·5/8), e^(2·3/8), so σ(1/2) = 0.622459 for the first."""
    assert tabular.dpo_optimum(two(), 1.0).tolist() == pytest.approx([0.75, 0.25])
    assert tabular.dpo_optimum(two(), 0.5).tolist() == pytest.approx([0.9, 0.1])
    assert tabular.ipo_optimum(two(), 0.5)[0].item() == pytest.approx(0.6224593)
    assert tabular.infinite_preferences(two()).tolist() == [[0.0, pytest.approx(0.75)], [pytest.approx(0.25), 0.0]]


def test_distances_by_hand():
    p, q = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])
    assert tabular.total_variation(p, q) == pytest.approx(0.25)
    assert tabular.kl_divergence(p, q) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("loss_type", "optimum"), [("sigmoid", tabular.dpo_optimum), ("ipo", tabular.ipo_optimum)])
def test_descent_reaches_the_optimum_with_infinite_preferences(world, beta, loss_type, optimum):
    found = tabular.fit(world, tabular.infinite_preferences(world), beta, loss_type=loss_type).exp()
    assert tabular.total_variation(found, optimum(world, beta)) <= 1e-3
    other = tabular.ipo_optimum if loss_type == "sigmoid" else tabular.dpo_optimum
    assert tabular.total_variation(found, other(world, beta)) > 5e-3, "the two losses have different optima"


def test_finite_preferences_leave_a_gap_that_falls_with_their_number(world):
    """Errors go with 1/√n: 100 times the preferences, about a tenth of the distance (mean of three draws)."""
    gaps = []
    for n in (1000, 100_000):
        fits = [
            tabular.fit(world, tabular.finite_preferences(world, n, seed), 1.0, steps=1500).exp() for seed in range(3)
        ]
        gaps.append(sum(tabular.total_variation(p, tabular.dpo_optimum(world, 1.0)) for p in fits) / 3)
    assert 0.02 < gaps[0] < 0.2
    assert 5 < gaps[0] / gaps[1] < 20


def test_finite_preferences_are_counts(world):
    counts = tabular.finite_preferences(world, 5000) * 5000
    assert counts.sum().item() == pytest.approx(5000)
    torch.testing.assert_close(counts, counts.round(), atol=1e-9, rtol=0)
    assert counts.diagonal().sum() == 0
    expected = tabular.infinite_preferences(world)
    assert (tabular.finite_preferences(world, 200_000) - expected).abs().max() < 1e-3


def test_ipo_keeps_every_probability_where_dpo_with_certain_preferences_does_not(world):
    """Always-won comparisons: DPO's margin grows without end, IPO's stops (Azar et al. 2023, section 4.2)."""
    certain = torch.triu(torch.ones(20, 20, dtype=torch.float64), diagonal=1)
    order = tabular.TabularWorld(torch.zeros(20, dtype=torch.float64), world.reference)
    wins = certain / certain.sum()
    early, late = (tabular.fit(order, wins, 0.1, steps=n).min().item() for n in (300, 3000))
    assert late < early - 5
    early, late = (tabular.fit(order, wins, 0.1, steps=n, loss_type="ipo").min().item() for n in (300, 3000))
    assert late == pytest.approx(early, abs=1e-6)


def test_kl_of_the_optimum_falls_with_beta_and_short_rmsprop_runs_hide_it(world):
    optimum = [tabular.kl_divergence(tabular.dpo_optimum(world, b), world.reference) for b in BETAS]
    assert optimum == sorted(optimum, reverse=True)
    assert optimum[0] / optimum[-1] > 100
    wins = tabular.infinite_preferences(world)
    short = [tabular.fit(world, wins, b, optimizer="rmsprop", steps=30, rate=1e-3).exp() for b in BETAS]
    kls = [tabular.kl_divergence(p, world.reference) for p in short]
    assert max(kls) / min(kls) < 3


def test_bad_optimizers(world):
    with pytest.raises(SettingsError, match="rate is None, but optimizer 'rmsprop' needs one"):
        tabular.fit(world, tabular.infinite_preferences(world), 1.0, optimizer="rmsprop")
    with pytest.raises(SettingsError, match="optimizer is 'adam', but must be one of"):
        tabular.fit(world, tabular.infinite_preferences(world), 1.0, optimizer="adam", rate=0.1)


def test_a_table_knows_no_lengths(world):
    with pytest.raises(SettingsError, match="lengths is None, but loss_type 'sigmoid_norm' needs them"):
        tabular.fit(world, tabular.infinite_preferences(world), 1.0, loss_type="sigmoid_norm", steps=1)


def test_label_smoothing_for_flipped_labels(world):
    """20 % of the labels flipped: plain DPO ends elsewhere, "robust" with ε = 0.2 at π* all the same, and cDPO, which
    asks for the flipped preferences to be explained, where plain DPO on clean labels with smoothing would."""
    clean = tabular.infinite_preferences(world)
    flipped = 0.8 * clean + 0.2 * clean.T
    target = tabular.dpo_optimum(world, 1.0)
    plain = tabular.fit(world, flipped, 1.0).exp()
    robust = tabular.fit(world, flipped, 1.0, loss_type="robust", label_smoothing=0.2, steps=6000).exp()
    assert tabular.total_variation(plain, target) > 0.1
    assert tabular.total_variation(robust, target) < 1e-3
    smoothed = tabular.fit(world, clean, 1.0, label_smoothing=0.2).exp()
    assert tabular.total_variation(smoothed, plain) < 1e-3


def test_follow_by_hand():
    """Two even responses, loss -log p₀, rate 1: the logits' difference grows by 2(1-p₀), from 0 to 1, then to 1.53788.

    So p₀ goes ½ → σ(1) = 0.731059 → σ(1.537883) = 0.823157.
    """
    start = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    history = tabular.follow(lambda log_policy: -log_policy[0], start, steps=2, rate=1.0)
    assert history[:, 0].tolist() == pytest.approx([0.5, 0.731059, 0.823157], abs=1e-6)
    assert history.sum(dim=1).tolist() == pytest.approx([1.0] * 3)
    assert not history.requires_grad
    assert start.tolist() == [math.log(0.5)] * 2, "the start is not touched"


def test_follow_with_rmsprop_by_hand():
    """Its first update is 1/√0.01 = 10 times the rate in each logit, whatever the gradient: 0.01 makes σ(0.2)."""
    start = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    history = tabular.follow(lambda log_policy: -log_policy[0], start, 1, 0.01, optimizer="rmsprop")
    assert history[1, 0].item() == pytest.approx(1 / (1 + math.exp(-0.2)), abs=1e-6)


def test_follow_starts_where_it_is_told_and_ends_where_fit_does(world):
    wins = tabular.infinite_preferences(world)
    losses = {"sigmoid": 1.0, "ipo": 0.1}
    for loss_type, beta in losses.items():
        history = tabular.follow(
            lambda log_policy: tabular.expected_loss(world, log_policy, wins, beta, loss_type),  # noqa: B023
            world.reference.log(), steps=40, rate=0.5,
        )  # fmt: skip
        assert history.shape == (41, 20)
        torch.testing.assert_close(history[0], world.reference)
        fitted = tabular.fit(world, wins, beta, loss_type=loss_type, steps=40, rate=0.5)
        assert torch.equal(history[-1], fitted.exp())
        assert tabular.total_variation(history[0], history[-1]) > 0.01
    assert tabular.follow(lambda log_policy: -log_policy[0], world.reference.log(), 0, 1.0).shape == (1, 20)
    with pytest.raises(SettingsError, match="adam"):
        tabular.follow(lambda log_policy: -log_policy[0], world.reference.log(), 1, 1.0, optimizer="adam")
