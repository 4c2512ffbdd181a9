"""Each of the fifteen signs on a run that has it and on one that has not; the experiments show what they claim."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from dpo_helpers.errors import ArtefactError
from dpo_helpers.lesson.doctor import SIGNS, Run, describe, examine, read_run
from dpo_helpers.lesson.pains import PAINS
from dpo_helpers.logprobs import PairScores
from dpo_helpers.run import measures

LN_2 = math.log(2)


def scores(shift=0.0, n=400, mean=False):
    """-2 nats per token; under the policy 90 % of the chosen responses gain `shift` on the rejected ones, the rest lose."""
    tokens = torch.arange(n) % 17 + 3
    chosen = -2.0 * tokens
    rejected = chosen.clone()
    chosen = chosen + shift * torch.where(torch.arange(n) % 10 == 0, -1.0, 1.0)
    return PairScores(chosen / tokens if mean else chosen, rejected / tokens if mean else rejected, tokens, tokens)


def row(step, **values):
    first = {"loss": LN_2 - 0.01 * min(step, 20), "chosen_reward": 0.02 * step, "rejected_reward": -0.03 * step}
    return {"step": step, "reward_margin": 0.05 * step, "grad_norm": 1.0, **first, **values}


TEXT = {"ended": 0.98, "looping": 0.01, "repeated_3grams": 0.05, "distinct_2": 0.3}
OFFLINE = (scores(1.0).chosen - scores(1.0).rejected).mean().item() * 0.5
HEALTHY = Run(
    folder=None,
    training=[row(s) for s in range(1, 41)],
    held_out=[row(0), row(40, chosen_reward=0.8, chosen_reward_se=0.1, pairs=400, reward_margin=OFFLINE)],
    about={"peak_memory_gb": 0.6, "settings": {"init_from": "base"}},
    made_from={"reference": "a" * 64, "beta": 0.5, "loss_type": "sigmoid"},
    scores=scores(1.0), reference=scores(),
    reference_about={"weights_sha256": "a" * 64, "pairs": 100, "cut_responses": 1},
    evaluation=TEXT, reference_evaluation=TEXT, kl_by_beta={0.05: (8.7, 0.6), 0.1: (9.0, 0.6), 0.5: (1.5, 0.1), 5.0: (0.3, 0.1)},
)  # fmt: skip

SICK = {
    1: {"held_out": [row(0), row(40, chosen_reward=-0.8, chosen_reward_se=0.1)]},
    2: {"kl_by_beta": {0.1: (1.0, 0.1), 0.5: (3.0, 0.1), 5.0: (0.5, 0.1)}},
    3: {"training": [row(s, loss=LN_2 + 1e-4 * (-1) ** s) for s in range(1, 41)]},
    4: {"held_out": [row(0, loss=1.2, chosen_reward=-0.4)]},
    5: {"made_from": {**HEALTHY.made_from, "reference": "b" * 64}},
    7: {"evaluation": {**TEXT, "ended": 0.1}},
    8: {"reference_about": {"pairs": 100, "cut_responses": 9}},
    9: {"training": [*HEALTHY.training, row(41, loss=float("nan"))]},
    11: {"evaluation": {**TEXT, "looping": 0.4}},
    12: {"scores": scores(1.0, mean=True), "held_out": [row(0)]},
    13: {"held_out": [row(0), row(40, pairs=400, reward_margin=OFFLINE + 0.4)]},
    14: {"scores": scores(1.0, n=30), "reference": scores(n=30)},
    15: {"training": [row(s) for s in (*range(1, 21), *range(15, 41))]},
}


def verdicts(run):
    return {found.pain.number: found.verdict for found in examine(run)}


def test_a_healthy_run_shows_nothing():
    assert set(verdicts(HEALTHY).values()) == {"no sign"}


def test_an_update_that_fp16_skipped_is_no_sign():
    """Its scaler tries how far it can go, in the first updates of most runs."""
    skipped = row(1, grad_norm=float("inf"), skipped=True)
    assert set(verdicts(replace(HEALTHY, training=[skipped, *HEALTHY.training[1:]])).values()) == {"no sign"}
    told_nothing = {key: value for key, value in skipped.items() if key != "skipped"}
    assert verdicts(replace(HEALTHY, training=[told_nothing, *HEALTHY.training[1:]]))[9] == "applies"


@pytest.mark.parametrize("number", SICK)
def test_each_sign_is_found_where_it_is_and_alone(number):
    found = verdicts(replace(HEALTHY, **SICK[number]))
    assert {n for n, verdict in found.items() if verdict == "applies"} == {number}


@pytest.mark.parametrize(
    ("number", "changed"),
    [
        (2, {"kl_by_beta": {1.0: (0.06, 0.02), 5.0: (0.07, 0.03)}}),
        (2, {"kl_by_beta": {0.1: (0.06, 0.02), 1.0: (0.07, 0.02), 5.0: (0.09, 0.03)}}),
        (1, {"held_out": [row(0), row(40, chosen_reward=-0.8, chosen_reward_se=0.5)]}),
        (1, {"held_out": [row(0), row(40, chosen_reward=-0.8, reward_margin=0.1, reward_margin_se=0.2)]}),
        (7, {"evaluation": {**TEXT, "ended": 0.25, "ended_se": 0.25}, "reference_evaluation": {**TEXT, "ended": 0.75, "ended_se": 0.25}}),
        (11, {"evaluation": {**TEXT, "looping": 0.25, "looping_se": 0.25}}),
        (11, {"evaluation": {**TEXT, "repeated_3grams": 0.3, "repeated_3grams_se": 0.2}}),
    ],
)  # fmt: skip
def test_what_chance_alone_would_do_is_no_sign(number, changed):
    """Each is in the sign's direction, and within two standard errors; without the errors it is a sign."""
    run = replace(HEALTHY, **changed)
    assert verdicts(run)[number] == "no sign"
    exact = json.loads(json.dumps(changed), object_hook=lambda d: {k: v for k, v in d.items() if not k.endswith("_se")})
    if number == 2:
        exact = {"kl_by_beta": {beta: (kl, 0.001) for beta, (kl, _) in changed["kl_by_beta"].items()}}
    assert verdicts(replace(HEALTHY, **exact))[number] == "applies"


def test_a_kl_that_rises_slowly_is_seen_at_its_ends():
    """From one β to the next within the errors, from the first to the last beyond them."""
    slowly = {0.1: (1.0, 0.1), 1.0: (1.2, 0.1), 5.0: (1.4, 0.1)}
    assert verdicts(replace(HEALTHY, kl_by_beta=slowly))[2] == "applies"


def test_a_run_that_says_nothing_is_never_called_fine():
    assert set(verdicts(Run(None, [], [])).values()) == {"cannot tell"}


def test_signs_and_pains_are_fifteen_and_agree():
    assert [pain.number for pain in PAINS] == sorted(SIGNS) == list(range(1, 16))


def test_the_text_names_cause_and_remedy_of_what_applies_first():
    text = describe(examine(replace(HEALTHY, **SICK[3])))
    assert text.startswith("APPLIES   3. the loss stays at 0.693: mean loss of the last quarter 0.693")
    assert "do:  check that masks are not empty" in text
    assert text.count("\n") == 16


def numbers(number):
    text = PAINS[number - 1].experiment()
    return text, [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", text)]


def test_experiments_show_what_they_claim():
    text, (_, chosen, rejected, margin, loss) = numbers(1)
    assert chosen < 0 < margin, text
    assert loss < LN_2
    assert margin == pytest.approx(chosen - rejected, abs=0.02)
    text, values = numbers(2)
    assert values[3] > 100 * values[5], text  # the optimum's KL falls fast with β
    assert values[-3] < 3 * values[-1], text  # after 40 updates it hardly differs
    text, values = numbers(3)
    assert values[:3] == [0.6931] * 3, text
    assert values[3] > 1 > 1e-6 >= max(values[4:6]), text
    text, (off, on) = numbers(4)
    assert off == 0 < on, text
    text, (right, _, _, wrong) = numbers(5)
    assert abs(right - LN_2) < 1e-4 < abs(wrong - LN_2), text
    text, (tokens, shared) = numbers(6)
    assert shared == tokens - 1, text
    text, (rows, by_position, by_id) = numbers(7)
    assert (rows, by_position, by_id) == (8, 8, 0), text
    text, values = numbers(8)
    assert values[2] == 0 < min(values[3:]), text
    assert "in fp16 a gradient of 1e-8 is 0 " in PAINS[8].experiment()
    assert "300² is inf" in PAINS[8].experiment()
    text, values = numbers(10)
    assert values[2] == 1.6, text  # 16 rows x 512 positions x 50257 x 4 bytes = 1.65e9
    assert "ends in a loop: False; " in PAINS[10].experiment()
    assert PAINS[10].experiment().endswith("ends in a loop: True")
    text, values = numbers(12)
    assert "margin 2.50 from sums, 0.10 from means" in text  # 0.5·(4 + 1); 0.5·(0.1 + 0.1)
    text, (shifted, unshifted) = numbers(13)
    assert unshifted < 5 * shifted < 0, text
    assert numbers(14)[0].count("[") == 4
    assert "False from a generator's state, True from (seed, epoch)" in PAINS[14].experiment()


@pytest.mark.slow
@pytest.mark.parametrize("start", ["base", "sft"])
def test_a_real_run_is_read_from_its_folder(small, start):
    settings = replace(small, init_from=start)
    measures.get_comparison(settings)
    run = read_run(settings.run_dir)
    assert (len(run.training), run.held_out[0]["step"], run.made_from["beta"]) == (3, 0, 0.5)
    found = verdicts(run)
    assert found[4] == found[5] == found[13] == "no sign"
    assert read_run(settings.run_dir / "sft").folder.name == "sft"
    scores_file = settings.run_dir / "dpo/logprobs.safetensors"
    scores_file.write_bytes((settings.run_dir / "sft/logprobs.safetensors").read_bytes())
    assert verdicts(read_run(settings.run_dir))[13] == "applies", "scores of another model"


def test_a_trl_run_is_read_from_its_trainer_state(tmp_path):
    history = [
        {"step": s, "loss": LN_2, "rewards/chosen": 0.0, "rewards/margins": 0.0, "grad_norm": 0.0} for s in range(1, 30)
    ]
    for step in (10, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"global_step": step, "log_history": history[:step]}
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps(state))
    run = read_run(tmp_path)
    assert len(run.training) == 29
    assert verdicts(run)[3] == "applies"
    assert verdicts(run)[14] == "cannot tell"


def test_a_loss_that_is_not_known_to_be_sigmoid_is_not_judged_by_ln_2():
    """An IPO run of TRL starts at 1/(4β²) = 25 with β = 0.1; an SFT run has a loss of its own."""
    ipo = Run(None, [row(s, loss=25.0, chosen_reward=0.0) for s in range(1, 20)], [])
    assert verdicts(ipo)[4] == verdicts(ipo)[3] == "no sign"
    sft = replace(
        HEALTHY, made_from={"reference": "a" * 64}, training=[{"step": s, "loss": LN_2} for s in range(1, 20)]
    )
    assert verdicts(sft)[3] == "cannot tell"


def test_a_folder_without_a_run_is_one_clear_error(tmp_path):
    with pytest.raises(ArtefactError, match="holds no run: give a run of this course"):
        read_run(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(ArtefactError, match="is not JSON"):
        read_run(tmp_path)
