"""A judge with faults, against numbers derived by hand, and its length control, against a fit that is known."""

import math

import pytest
import torch

from dpo_helpers.worlds.judge import Answers, Judge, at_equal_length, logistic_fit


def answers(rewards, tokens=(0, 0, 0)):
    return Answers(torch.tensor(rewards, dtype=torch.float64), torch.tensor(tokens, dtype=torch.float64))


@pytest.mark.parametrize(
    ("judge", "points"),
    [
        (Judge(), [1.0, 0.5, 0.0]),  # gaps 1, 0, -2
        (Judge(first=2.0), [1.0, 1.0, 0.5]),  # 3, 2, 0
        (Judge(per_token=0.5), [0.5, 0.5, 1.0]),  # 1 - 1, 0 + 0, -2 + 3
        (Judge(first=-1.0, per_token=1.0), [0.0, 0.0, 1.0]),  # 1 - 1 - 2, 0 - 1 + 0, -2 - 1 + 6
    ],
)
def test_points_by_hand(judge, points):
    first, second = answers([2.0, 1.0, 0.0], (4, 5, 9)), answers([1.0, 1.0, 2.0], (6, 5, 3))
    assert judge.points(first, second).tolist() == points


def test_a_fair_judge_says_the_same_in_both_orders_and_one_for_a_place_contradicts_itself():
    a, b = answers([3.0, 1.0, -1.0]), answers([1.0, 1.0, 1.0])
    assert (Judge().points(a, b) + Judge().points(b, a)).tolist() == [1.0, 1.0, 1.0]
    biased = Judge(first=100.0)
    of_a = (biased.points(a, b) + 1 - biased.points(b, a)) / 2
    assert of_a.tolist() == [0.5, 0.5, 0.5], "what is read first wins, in both orders"


def test_noise_is_that_of_bradley_and_terry():
    """A gap of 1 wins σ(1) = 0.7311 of 40,000 times at scale 1, a gap of 1 at scale 2 σ(1/2) = 0.6225; se 0.0025."""
    n = 40_000
    a, b = (Answers(torch.full((n,), r, dtype=torch.float64), torch.zeros(n)) for r in (1.0, 0.0))
    assert Judge(noise=1.0).points(a, b).mean().item() == pytest.approx(0.7311, abs=0.01)
    assert Judge(noise=2.0).points(a, b).mean().item() == pytest.approx(0.6225, abs=0.01)


def test_a_reading_is_repeated_by_its_number_and_another_one_is_another_opinion():
    a = Answers(torch.zeros(200), torch.zeros(200))
    judge = Judge(noise=1.0, seed=3)
    assert torch.equal(judge.points(a, a, 1), judge.points(a, a, 1))
    for other in (judge.points(a, a, 2), Judge(noise=1.0, seed=4).points(a, a, 1)):
        assert 0.3 < (judge.points(a, a, 1) != other).double().mean() < 0.7


def test_the_fit_of_a_table_is_that_of_its_shares():
    """Won are 1 of 4 where x = 0 and 3 of 4 where x = 1: a = log(1/3), a + b = log 3. In a batch, each by itself."""
    x = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64).repeat(200)
    won = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0], dtype=torch.float64).repeat(200)
    a, b = logistic_fit(won, x).tolist()
    assert (a, b) == (pytest.approx(-math.log(3), abs=1e-4), pytest.approx(2 * math.log(3), abs=1e-4))
    both = logistic_fit(torch.stack([won, 1 - won]), torch.stack([x, x]))
    assert torch.allclose(both, torch.tensor([[a, b], [-a, -b]], dtype=torch.float64))


def test_length_is_taken_out_and_nothing_else():
    """Points that follow P(win) = σ(0.4 + 2·tanh(longer/s)) leave σ(0.4) = 0.5987, whatever the lengths are."""
    longer = torch.tensor([-4.0, -1.0, 2.0, 3.0, 8.0, 20.0], dtype=torch.float64).repeat(50)
    points = (0.4 + 2 * (longer / longer.std()).tanh()).sigmoid()
    found = at_equal_length(points, longer, resamples=200)
    assert found.estimate == pytest.approx(0.5987, abs=1e-3)
    assert found.low <= found.estimate <= found.high
    assert points.mean().item() > 0.65, "the plain win rate is another one"


def test_without_a_difference_in_length_it_is_the_win_rate_and_without_a_defeat_it_is_finite():
    points = torch.tensor([1.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    assert at_equal_length(points, torch.zeros(4)).estimate == pytest.approx(0.625, abs=1e-3)
    longer = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    for won in (torch.ones(4).double(), (longer > 0).double()):
        found = at_equal_length(won, longer, resamples=50)
        assert all(0 <= x <= 1 for x in (found.low, found.estimate, found.high))
