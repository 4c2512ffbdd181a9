"""What the source study published, and its estimator: the arithmetic that the notebook rests on."""

import pytest

from dpo_helpers.evaluation import Evaluation
from dpo_helpers.show import figures, study


def evaluation(beta, logratio, kl, **more):
    metrics = {
        "chosen_reward": beta * logratio,
        "chosen_logratio": logratio,
        "kl": kl,
        "kl_se": 0.1,
        "chosen_logratio_se": 0.2,
    }
    return Evaluation("x", beta, metrics | more, [], {})


def test_the_published_rewards_are_beta_times_the_published_kl():
    """0.5 · 11.42 = 5.71 ≈ 5.7 and 0.5 · 4.51 = 2.255 ≈ 2.26: to the digits that were printed."""
    for reward, kl in study.REWARD_AND_KL.values():
        assert reward == pytest.approx(study.reward_of_kl(0.5, kl), abs=0.011)
    assert study.reward_of_kl(5.0, study.SWEEP_KL[5.0]) == pytest.approx(17.5)
    assert list(study.SWEEP_KL.values()) == sorted(study.SWEEP_KL.values()), "it reports a KL that rises with β"


def test_loss_by_part_by_hand():
    """Ten updates in five parts of two; evaluations are left out; three updates make three parts."""
    rows = [{"split": "train", "loss": float(i)} for i in range(10)]
    assert study.loss_by_part([{"split": "held_out", "loss": 99.0}, *rows]) == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert study.loss_by_part(rows[:3]) == [0.0, 1.0, 2.0]


def test_columns_pair_the_published_with_ours():
    rows = study.sweep_columns({0.5: evaluation(0.5, -0.6, 1.5), 0.3: evaluation(0.3, -1.0, 2.0)})
    assert [row["β"] for row in rows] == ["0.3", "0.5"]
    assert rows[0]['study: "KL"'] == "–"
    assert (rows[1]['study: "KL"'], rows[1]['study: β × "KL"']) == (2.98, 1.49)
    assert (rows[1]["ours: chosen log-ratio"], rows[1]["ours: chosen reward"], rows[1]["ours: measured KL"]) == (
        -0.6,
        -0.3,
        1.5,
    )


def test_the_figures_say_what_was_measured(tmp_path):
    rows = [{"split": "train", "loss": 0.7 - 0.05 * i} for i in range(5)]
    models = {name: evaluation(0.5, x, 1.0) for name, x in (("sft", 0.2), ("dpo", -0.6))}
    sweep = {0.1: evaluation(0.1, -6.0, 9.0), 5.0: evaluation(5.0, 0.2, 0.3)}
    assert figures.plot_study(rows, models, sweep, tmp_path) == (
        "From β = 0.1 to 5 the chosen log-ratio goes from -6.00 to 0.20, the measured KL from 9.00 to 0.30."
    )
    reward = {"true_reward": 1.0, "true_reward_se": 0.1, "reward_margin": 0.5, "reward_margin_se": 0.1}
    points = [
        {"step": 5, "kl": 1.0, "kl_se": 0.1, **reward},
        {"step": 9, "kl": 2.0, "kl_se": 0.1, **reward, "true_reward": 1.5},
    ]
    start = evaluation(0.5, 0.0, 0.0, true_reward=-0.5, reward_margin=0.0)
    assert figures.plot_frontier({"β = 1": points}, start, tmp_path) == (
        "True reward at the end of each training: β = 1 1.50 at KL 2.00."
    )
    unknown = [{k: v for k, v in p.items() if not k.startswith("true_reward")} for p in points]
    start = evaluation(0.5, 0.0, 0.0, reward_margin=0.0)
    assert figures.plot_frontier({"β = 1": unknown}, start).startswith(
        "Reward margin at the end of each training: β = 1 0.50"
    )
    assert {p.name for p in tmp_path.iterdir()} == {"06-study.png", "06-frontier.png"}
