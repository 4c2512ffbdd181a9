"""The losses by hand-derived literals and properties; parity with TRL is in test_trl_parity.py."""

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


def test_literals_of_the_relatives():
    """β = 0.5; log-ratio margins h = 0, 3, -5 as in `test_literals`, so βh = 0, 1.5, -2.5 and 1/(2β) = 1.

    ipo: (h - 1)² = 1, 4, 36. hinge: max(0, 1 - βh) = 1, 0, 3.5. robust, ε = 0.1, of the second: (0.9 · 0.201413 -
    0.1 · 1.701413) / 0.8 = (0.181272 - 0.170141) / 0.8 = 0.013913; of the first: ln 2 · (0.9 - 0.1) / 0.8 = ln 2.
    """
    pairs = t(-10, -9, -12), t(-11, -13, -8), t(-10, -10, -10), t(-11, -11, -11)
    assert dpo_loss(*pairs, beta=0.5, loss_type="ipo")[0].tolist() == [1.0, 4.0, 36.0]
    assert dpo_loss(*pairs, beta=0.5, loss_type="hinge")[0].tolist() == [1.0, 0.0, 3.5]
    robust, chosen, rejected = dpo_loss(*pairs, beta=0.5, loss_type="robust", label_smoothing=0.1)
    assert robust[:2].tolist() == pytest.approx([math.log(2), 0.0139132], abs=1e-6)
    assert (chosen.tolist(), rejected.tolist()) == ([0.0, 0.5, -1.0], [0.0, -1.0, 1.5])


def test_mitchell_s_formula_by_hand():
    """EM's `preference_loss`: logits = (π_w - π_l) - (ref_w - ref_l), loss -log σ(β·logits)(1-ε) - log σ(-β·logits)ε.

    π_w = -20, π_l = -22, ref_w = -21, ref_l = -21: logits = 2 - 0 = 2; β = 0.1: 0.2. -log σ(0.2) = ln(1 + e^-0.2) =
    0.598139, -log σ(-0.2) = 0.798139. ε = 0.2: 0.8 · 0.598139 + 0.2 · 0.798139 = 0.638139.
    EM's ipo: (logits - 1/(2β))² = (2 - 5)² = 9.
    """
    pair = t(-20), t(-22), t(-21), t(-21)
    assert dpo_loss(*pair, beta=0.1)[0].item() == pytest.approx(0.598139, abs=1e-6)
    assert dpo_loss(*pair, beta=0.1, label_smoothing=0.2)[0].item() == pytest.approx(0.638139, abs=1e-6)
    assert dpo_loss(*pair, beta=0.1, loss_type="ipo")[0].item() == pytest.approx(9.0, abs=1e-12)


def test_ipo_of_pairs_of_unequal_length_is_per_token():
    """Log-ratios +8 over 4 tokens and -6 over 2: +2 and -3 per token, h = 5; β = 0.25: (5 - 2)² = 9; rewards from sums."""
    sums, lengths = (t(-2), t(-16), t(-10), t(-10)), (torch.tensor([4]), torch.tensor([2]))
    losses, chosen, rejected = dpo_loss(*sums, beta=0.25, loss_type="ipo", lengths=lengths)
    assert (losses.item(), chosen.item(), rejected.item()) == (9.0, 2.0, -1.5)
    assert dpo_loss(*sums, beta=0.25, loss_type="ipo")[0].item() == (14 - 2) ** 2, "of sums without lengths"
    for loss_type in ("sigmoid", "hinge", "robust", "apo_zero"):
        one, two = (dpo_loss(*sums, beta=0.25, loss_type=loss_type, lengths=given) for given in (lengths, None))
        assert torch.equal(one[0], two[0])


def test_sigmoid_norm_by_hand():
    """Tülu 3, eq. 6: log-ratios +6 over 4 tokens and -3 over 6, so 1.5 and -0.5 per token; β = 0.75: β · 2 = 1.5, and
    ln(1 + e^-1.5) = 0.201413. Rewards from sums, 4.5 and -2.25. Over 12 and 1 tokens 0.5 and -3, β · 3.5 = 2.625:
    ln(1 + e^-2.625) = 0.069936; over one token each β · 9 = 6.75: 0.001170.
    """
    sums = t(-4, -4, -4), t(-13, -13, -13), t(-10, -10, -10), t(-10, -10, -10)
    lengths = torch.tensor([4, 12, 1]), torch.tensor([6, 1, 1])
    losses, chosen, rejected = dpo_loss(*sums, beta=0.75, loss_type="sigmoid_norm", lengths=lengths)
    assert losses.tolist() == pytest.approx([0.201413, 0.069936, 0.001170], abs=1e-6)
    assert (chosen.tolist(), rejected.tolist()) == ([4.5] * 3, [-2.25] * 3)
    with pytest.raises(SettingsError, match="lengths is None, but loss_type 'sigmoid_norm' needs them"):
        dpo_loss(*sums, beta=0.75, loss_type="sigmoid_norm")


def test_apo_zero_by_hand():
    """β = 0.5; rewards (0, 0), (1, -2), (-1, -2) and (1, 1) from log-ratios of twice that; with σ(1) = 0.731059 and
    σ(2) = 0.880797: σ(0) + σ(0) = 1; σ(-1) + σ(-2) = 0.268941 + 0.119203 = 0.388144; σ(1) + σ(-2) = 0.850262;
    σ(-1) + σ(1) = 1. The second and third pair's margins are 3 and 1; with the same margin 1 at (2, 1) the loss is
    σ(-2) + σ(1) = 0.850262 again, and at (1, 0) σ(-1) + ½ = 0.768941: it is not a function of the margin.
    """
    policy = t(-10, -8, -12, -8, -6, -8), t(-10, -14, -14, -8, -8, -10)
    losses, chosen, rejected = dpo_loss(*policy, t(*[-10] * 6), t(*[-10] * 6), beta=0.5, loss_type="apo_zero")
    assert losses.tolist() == pytest.approx([1.0, 0.388144, 0.850262, 1.0, 0.850262, 0.768941], abs=1e-6)
    assert (chosen.tolist(), rejected.tolist()) == ([0.0, 1.0, -1.0, 1.0, 2.0, 1.0], [0.0, -2.0, -2.0, 1.0, 1.0, 0.0])


LENGTHS = torch.tensor([3]), torch.tensor([5])
OF_THE_MARGIN = [
    ("sigmoid", 0.0), ("sigmoid", 0.1), ("sigmoid", 0.4), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.0), ("robust", 0.3),
]  # fmt: skip
ANY_LOSS = st.sampled_from([*OF_THE_MARGIN, ("sigmoid_norm", 0.0), ("apo_zero", 0.0)])


def loss_of(kind, *logps, beta):
    lengths = LENGTHS if kind[0] == "sigmoid_norm" else None
    logps = (t(x) for x in logps)
    return dpo_loss(*logps, beta=beta, loss_type=kind[0], label_smoothing=kind[1], lengths=lengths)[0].item()


@given(st.sampled_from(OF_THE_MARGIN), LOGP, LOGP, LOGP, LOGP, st.floats(-50, 50), st.floats(0.01, 5))
def test_shifting_both_log_probabilities_of_a_model_changes_nothing(kind, a, b, c, d, shift, beta):
    loss = loss_of(kind, a, b, c, d, beta=beta)
    assert loss_of(kind, a + shift, b + shift, c, d, beta=beta) == pytest.approx(loss, abs=1e-9, rel=1e-9)
    assert loss_of(kind, a, b, c + shift, d + shift, beta=beta) == pytest.approx(loss, abs=1e-9, rel=1e-9)


@given(LOGP, LOGP, LOGP, LOGP, st.floats(0.01, 5), st.floats(0, 0.49))
def test_swapping_the_sides_negates_the_margin(a, b, c, d, beta, smoothing):
    loss, chosen, rejected = dpo_loss(t(a), t(b), t(c), t(d), beta=beta)
    swapped, other_chosen, other_rejected = dpo_loss(t(b), t(a), t(d), t(c), beta=beta)
    assert (chosen, rejected) == (other_rejected, other_chosen)
    margin = (chosen - rejected).item()  # -log σ(m) + log σ(-m) = -m
    assert (loss - swapped).item() == pytest.approx(-margin, abs=1e-9)
    for kind in (("sigmoid", smoothing), ("robust", smoothing)):  # (R - W)(1-2ε), and (R - W)/(1-2ε)
        share = 1 - 2 * smoothing if kind[0] == "sigmoid" else 1 / (1 - 2 * smoothing)
        difference = loss_of(kind, a, b, c, d, beta=beta) - loss_of(kind, b, a, d, c, beta=beta)
        assert difference == pytest.approx(-share * margin, abs=1e-6, rel=1e-6)


@given(LOGP, LOGP, st.floats(0.01, 5))
def test_equal_models_start_at_ln_2(a, b, beta):
    for kind in (("sigmoid", 0.0), ("sigmoid", 0.3), ("robust", 0.2), ("sigmoid_norm", 0.0)):
        assert loss_of(kind, a, b, a, b, beta=beta) == pytest.approx(math.log(2), abs=1e-12)
    assert loss_of(("hinge", 0.0), a, b, a, b, beta=beta) == loss_of(("apo_zero", 0.0), a, b, a, b, beta=beta) == 1.0
    assert loss_of(("ipo", 0.0), a, b, a, b, beta=beta) == pytest.approx(1 / (4 * beta**2))


@given(LOGP, LOGP, LOGP, LOGP, st.floats(0.01, 5))
def test_gradient_has_the_closed_form_weight(a, b, c, d, beta):
    chosen, rejected = t(a).requires_grad_(), t(b).requires_grad_()
    losses, chosen_reward, rejected_reward = dpo_loss(chosen, rejected, t(c), t(d), beta=beta)
    losses.sum().backward()
    weight = beta * torch.sigmoid(-(chosen_reward - rejected_reward))
    torch.testing.assert_close(chosen.grad, -weight)
    torch.testing.assert_close(rejected.grad, weight)


@given(ANY_LOSS, st.floats(-60, 60), st.floats(0.05, 2))
def test_gradient_signs_and_closed_forms(kind, h, beta):
    """d loss / dh at margin h. sigmoid: -β(1-ε)σ(-βh) + βεσ(βh), robust: the same with a minus, over 1-2ε;
    hinge: -β where βh < 1, else 0; ipo: 2(h - 1/(2β)). The rejected side has the opposite sign. Of two alone it has
    another size. sigmoid_norm, whose margin m is (h - 3)/3 + 3/5: -βσ(-βm) over 3 tokens and over 5; apo_zero, with the
    log-ratios c = h - 3 and r = -3: -βσ(βc)σ(-βc) and βσ(βr)σ(-βr)."""
    name, e = kind
    chosen, rejected = t(h - 3).requires_grad_(), t(-3).requires_grad_()
    lengths = LENGTHS if name == "sigmoid_norm" else None
    losses, *_ = dpo_loss(chosen, rejected, t(0), t(0), beta=beta, loss_type=name, label_smoothing=e, lengths=lengths)
    losses.sum().backward()
    right, wrong = (1 / (1 + math.exp(x)) for x in (beta * h, -beta * h))
    expected = {
        "sigmoid": -beta * (1 - e) * right + beta * e * wrong,
        "robust": (-beta * (1 - e) * right - beta * e * wrong) / (1 - 2 * e),
        "hinge": -beta if beta * h < 1 else 0.0,
        "ipo": 2 * (h - 1 / (2 * beta)),
        "sigmoid_norm": -beta / (1 + math.exp(beta * ((h - 3) / 3 + 3 / 5))) / 3,
        "apo_zero": -beta / (2 + 2 * math.cosh(beta * (h - 3))),  # σ(x)σ(-x) = 1 / (2 + e^x + e^-x)
    }[name]
    on_rejected = {"sigmoid_norm": -expected * 3 / 5, "apo_zero": beta / (2 + 2 * math.cosh(3 * beta))}
    if name != "hinge" or abs(beta * h - 1) > 1e-9:
        assert chosen.grad.item() == pytest.approx(expected, abs=1e-9, rel=1e-7)
        assert rejected.grad.item() == pytest.approx(on_rejected.get(name, -expected), abs=1e-9, rel=1e-7)


def test_huge_margins_neither_overflow_nor_vanish_wrongly():
    big = torch.tensor([1e4, -1e4], requires_grad=True)
    zero = torch.zeros(2)
    losses, *_ = dpo_loss(big, zero, zero, zero, beta=1.0)
    assert losses.tolist() == [0.0, 1e4]
    losses.sum().backward()
    assert big.grad.tolist() == [0.0, -1.0]
    smooth, *_ = dpo_loss(big.detach(), zero, zero, zero, beta=1.0, label_smoothing=0.1)
    assert smooth.tolist() == pytest.approx([1e3, 9e3])
    for kind in ("hinge", "ipo", "robust"):
        assert dpo_loss(big.detach(), zero, zero, zero, beta=1.0, loss_type=kind)[0].isfinite().all()
    ones = torch.ones(2)
    norm, *_ = dpo_loss(big.detach(), zero, zero, zero, beta=1.0, loss_type="sigmoid_norm", lengths=(ones, ones))
    assert norm.tolist() == [0.0, 1e4]
    apo, *_ = dpo_loss(big.detach(), zero, zero, zero, beta=1.0, loss_type="apo_zero")
    assert apo.tolist() == [0.5, 1.5]


def test_robust_is_unbiased_under_flipped_labels():
    """Labels flip with probability ε = 0.2: the expected robust loss is the clean sigmoid loss (Chowdhury et al.)."""
    pair = (-9.0, -13.0, -10.0, -11.0)
    right, flipped = (
        loss_of(("robust", 0.2), *pair, beta=0.5),
        loss_of(("robust", 0.2), -13.0, -9.0, -11.0, -10.0, beta=0.5),
    )
    assert 0.8 * right + 0.2 * flipped == pytest.approx(loss_of(("sigmoid", 0.0), *pair, beta=0.5), abs=1e-12)


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


def test_nothing_is_ignored():
    """TRL takes label_smoothing with its sigmoid loss and does nothing with it; here it works or is refused."""
    for kind in ("ipo", "hinge", "sigmoid_norm", "apo_zero"):
        with pytest.raises(SettingsError, match=f"is 0.1, but must be 0, since loss_type '{kind}' has none"):
            dpo_loss(t(0), t(0), t(0), t(0), beta=1.0, loss_type=kind, label_smoothing=0.1)
    names = "sigmoid, ipo, hinge, robust, sigmoid_norm, apo_zero"
    with pytest.raises(SettingsError, match=f"loss_type is 'dpo', but must be one of {names}"):
        dpo_loss(t(0), t(0), t(0), t(0), beta=1.0, loss_type="dpo")
    assert loss_of(("sigmoid", 0.1), -9, -13, -10, -11, beta=0.5) != loss_of(
        ("sigmoid", 0.0), -9, -13, -10, -11, beta=0.5
    )


def test_sft_loss_is_the_mean_over_tokens():
    assert sft_loss(t(-12, -3), torch.tensor([4, 3])).tolist() == [3.0, 1.0]
