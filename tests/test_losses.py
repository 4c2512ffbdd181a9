"""The DPO loss by hand-derived literals, properties, autograd, and TRL's implementation of the same formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_helpers.errors import SettingsError
from dpo_helpers.losses import dpo_loss, sft_loss

LOGP = st.floats(-500, 0)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_literals():
    """β = 0.5. Pair 1: policy = reference, margin 0, loss ln 2. Pair 2: log-ratios +1 and -2, rewards 0.5 and
    -1, loss ln(1 + e^-1.5) = 0.201413. Pair 3: log-ratios -2 and +3, margin -2.5, loss ln(1 + e^2.5) = 2.578890.
    """
    losses, chosen, rejected = dpo_loss(t(-10, -9, -12), t(-11, -13, -8), t(-10, -10, -10), t(-11, -11, -11), beta=0.5)
    torch.testing.assert_close(losses, t(0.69314718056, 0.20141327798, 2.57888973429))
    assert chosen.tolist() == [0.0, 0.5, -1.0]
    assert rejected.tolist() == [0.0, -1.0, 1.5]


def test_label_smoothing_literal():
    """Margin 1.5, ε = 0.1: 0.9 · ln(1 + e^-1.5) + 0.1 · ln(1 + e^1.5) = 0.9 · 0.201413 + 0.1 · 1.701413."""
    loss, *_ = dpo_loss(t(-9), t(-13), t(-10), t(-11), beta=0.5, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.9 * 0.20141327798 + 0.1 * 1.70141327798, abs=1e-10)


@given(LOGP, LOGP, LOGP, LOGP, st.floats(-50, 50), st.floats(0.01, 5))
def test_shifting_both_policy_log_probabilities_changes_nothing(a, b, c, d, shift, beta):
    loss, *_ = dpo_loss(t(a), t(b), t(c), t(d), beta=beta)
    shifted, *_ = dpo_loss(t(a + shift), t(b + shift), t(c), t(d), beta=beta)
    torch.testing.assert_close(loss, shifted, atol=1e-9, rtol=1e-9)


@given(LOGP, LOGP, LOGP, LOGP, st.floats(0.01, 5))
def test_swapping_the_sides_negates_the_margin(a, b, c, d, beta):
    loss, chosen, rejected = dpo_loss(t(a), t(b), t(c), t(d), beta=beta)
    swapped, other_chosen, other_rejected = dpo_loss(t(b), t(a), t(d), t(c), beta=beta)
    assert (chosen, rejected) == (other_rejected, other_chosen)
    margin = (chosen - rejected).item()  # -log σ(m) + log σ(-m) = -m
    assert (loss - swapped).item() == pytest.approx(-margin, abs=1e-9)


@given(LOGP, LOGP, LOGP, LOGP, st.floats(0.01, 5))
def test_gradient_has_the_closed_form_weight(a, b, c, d, beta):
    chosen, rejected = t(a).requires_grad_(), t(b).requires_grad_()
    losses, chosen_reward, rejected_reward = dpo_loss(chosen, rejected, t(c), t(d), beta=beta)
    losses.sum().backward()
    weight = beta * torch.sigmoid(-(chosen_reward - rejected_reward))
    torch.testing.assert_close(chosen.grad, -weight)
    torch.testing.assert_close(rejected.grad, weight)


def test_huge_margins_neither_overflow_nor_vanish_wrongly():
    losses, *_ = dpo_loss(torch.tensor([1e4, -1e4]), torch.zeros(2), torch.zeros(2), torch.zeros(2), beta=1.0)
    assert losses.tolist() == [0.0, 1e4]


def test_rewards_carry_no_gradient():
    _, chosen, rejected = dpo_loss(t(-1).requires_grad_(), t(-2).requires_grad_(), t(-1), t(-2), beta=1.0)
    assert not chosen.requires_grad
    assert not rejected.requires_grad


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_bad_beta(beta):
    with pytest.raises(SettingsError, match="beta is"):
        dpo_loss(t(0), t(0), t(0), t(0), beta=beta)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0])
def test_bad_label_smoothing(smoothing):
    with pytest.raises(SettingsError, match="label_smoothing is"):
        dpo_loss(t(0), t(0), t(0), t(0), beta=1.0, label_smoothing=smoothing)


def test_sft_loss_is_the_mean_over_tokens():
    assert sft_loss(t(-12, -3), torch.tensor([4, 3])).tolist() == [3.0, 1.0]
