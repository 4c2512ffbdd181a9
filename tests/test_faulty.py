"""The bugs to find: each run shows its sign in its numbers, the healthy one shows none, and each guess is judged."""

import math
from dataclasses import fields, replace

import pytest
import torch

from conftest import ROOT, SMALL
from dpo_helpers.errors import CourseError
from dpo_helpers.lesson import exercises, faulty
from dpo_helpers.lesson.exercises import FAULTS
from dpo_helpers.lesson.exercises.core import Verdict
from dpo_helpers.lesson.exercises.faults import PUZZLES, WITH_IT, judge_fault
from dpo_helpers.logprobs import PlainScorer
from dpo_helpers.models import freeze, weights_hash
from dpo_helpers.run.stages import get_base, get_reference, get_sft
from dpo_helpers.settings import load_settings
from dpo_helpers.tokens import EncodedPair

LN_2 = math.log(2)
REWARDS = ("chosen_reward", "rejected_reward")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs by the name of their fault, and "healthy": the mini profile with no more pairs than they need."""
    settings = load_settings(
        "mini", runs_dir=str(tmp_path_factory.mktemp("runs")), max_pairs=faulty.PAIRS, prompts=2, curve_prompts=2,
        held_out_pairs=faulty.HELD_OUT, curve_points=1, max_new_tokens=4,
    )  # fmt: skip
    found = {PUZZLES[letter].fault: rows for letter, rows in faulty.get_faulty_trainings(settings).items()}
    return {"healthy": faulty.get_healthy_training(settings), **found}


def training(rows):
    return [row for row in rows if row["split"] == "train"]


def held_out(rows):
    return [row for row in rows if row["split"] == "held_out"]


def first_rewards(row):
    return max(abs(row[key]) for key in REWARDS)


# what gives each fault away; a run must show its own sign and none of the others


def off_in_training_only(rows):
    """The first training batch has rewards, the held-out points start at ln 2: dropout."""
    return first_rewards(training(rows)[0]) > 0.1 and abs(held_out(rows)[0]["loss"] - LN_2) < 1e-3


def off_before_training(rows):
    """Held-out pairs have rewards before the first update: another reference."""
    return first_rewards(held_out(rows)[0]) > 0.02


def nothing_but_0(rows):
    """All rewards 0 and every loss ln 2, but a gradient: the policy is its own reference."""
    still = all(first_rewards(row) == 0 and abs(row["loss"] - LN_2) < 1e-6 for row in rows)
    return still and min(row["grad_norm"] for row in training(rows)) > 0.5


def opposite(rows):
    """Training gets better, held-out pairs get worse: swapped sides."""
    s = faulty.signs(rows)
    return s["training accuracy at the end"] > 0.6 and s["held-out accuracy at the end"] < 0.4


def jumps(rows):
    """The loss is ln 2 at update 1, and several times that at update 2: too hot."""
    first, second = training(rows)[:2]
    return abs(first["loss"] - LN_2) < 1e-3 and second["loss"] > 3 * LN_2


def small_in_training_only(rows):
    """A tiny first gradient, and held-out margins many times those of training: averaged."""
    s = faulty.signs(rows)
    return s["first gradient norm"] < 0.2 and s["held-out margin at the end"] > 5 * s["training margin at the end"] > 0


SIGNS = {
    "averaged log-probabilities": small_in_training_only,
    "dropout on": off_in_training_only,
    "policy is its own reference": nothing_but_0,
    "rate too high, no warm-up": jumps,
    "sides swapped": opposite,
    "wrong reference": off_before_training,
}


@pytest.mark.slow(60)
@pytest.mark.parametrize("name", ["healthy", *SIGNS])
def test_a_run_shows_its_own_sign_and_no_other(runs, name):
    assert {fault for fault, sign in SIGNS.items() if sign(runs[name])} == ({name} - {"healthy"})


@pytest.mark.slow
def test_the_healthy_run_learns(runs):
    s = faulty.signs(runs["healthy"])
    assert s["held-out loss before"] == pytest.approx(LN_2, abs=1e-6)
    assert s["first training loss"] == pytest.approx(LN_2, abs=1e-5)
    assert s["first gradient norm"] > 0.5
    assert s["highest training loss"] < 1.2
    assert s["training accuracy at the end"] > 0.6
    assert s["held-out accuracy at the end"] > 0.6
    assert held_out(runs["healthy"])[-1]["loss"] < 0.65


@pytest.mark.slow
def test_what_the_sentences_say_holds_in_the_runs(runs):
    """Directions and factors that `exercises.faults` states, beyond the signs above."""
    s = {name: faulty.signs(rows) for name, rows in runs.items()}
    norm = {name: of["first gradient norm"] for name, of in s.items()}
    assert 10 < norm["healthy"] / norm["averaged log-probabilities"] < 60
    assert norm["dropout on"] > 1.3 * norm["healthy"]
    for name in ("sides swapped", "rate too high, no warm-up", "policy is its own reference"):
        assert norm[name] == pytest.approx(norm["healthy"], rel=1e-3)
    hot = training(runs["rate too high, no warm-up"])
    assert all(math.isfinite(row[key]) for row in hot for key in (*REWARDS, "loss", "grad_norm"))
    assert max(row["grad_norm"] for row in hot[1:4]) > 10
    wrong = held_out(runs["wrong reference"])[0]
    assert wrong["loss"] < LN_2
    assert wrong["chosen_reward"] > 0
    drop = s["dropout on"]
    assert drop["first training loss"] > LN_2 + 0.05
    assert drop["held-out accuracy at the end"] > 0.55
    assert held_out(runs["dropout on"])[-1]["loss"] < min(LN_2, training(runs["dropout on"])[-1]["loss"])
    assert s["averaged log-probabilities"]["held-out accuracy at the end"] > 0.6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Settings with which a run is three updates."""
    return load_settings(
        "mini", runs_dir=str(tmp_path_factory.mktemp("tiny")), **{**SMALL, "prompts": 2, "curve_points": 1}
    )


@pytest.mark.slow
def test_runs_of_tiny_settings(tiny):
    """A second call gives equal rows, and changing them changes nothing that is kept; nor does a fault change a model."""
    runs = faulty.get_faulty_trainings(tiny)
    assert list(runs) == list("ABCDEF")
    for rows in (*runs.values(), faulty.get_healthy_training(tiny)):
        assert [row["step"] for row in training(rows)] == [1, 2, 3]
        assert held_out(rows)[0]["step"] == 0
        assert all(math.isfinite(value) for value in faulty.signs(rows).values())
    first = runs["A"][0].copy()
    runs["A"][0]["loss"] = -1.0
    runs["B"].clear()
    assert faulty.get_faulty_trainings(tiny)["A"][0] == first
    assert faulty.get_faulty_trainings(tiny)["B"]
    for model in (get_reference(tiny), get_sft(tiny)):
        assert weights_hash(model.load()) == model.weights_sha256


@pytest.mark.slow
def test_the_plain_path_and_a_reference_from_sft(small):
    """Trainable embeddings have no fast path; and with init_from="sft" the plain model has to be scored first."""
    other = replace(small, freeze_embeddings=False, init_from="sft", loss_type="ipo", max_pairs=8, curve_points=1)
    good = faulty.good_setup(other)
    assert isinstance(good.scorer, PlainScorer)
    assert good.reference.name == good.start.name == "sft"
    wrong = faulty.wrong_reference(good)
    assert (wrong.start.name, wrong.reference.name) == ("sft", "reference")
    assert wrong.reference.weights_sha256 == get_base(other).weights_sha256
    assert not torch.equal(wrong.scores.chosen, good.scores.chosen)
    assert first_rewards(held_out(faulty.train_faulty(wrong, "x"))[0]) > 1e-4
    assert first_rewards(held_out(faulty.train_faulty(good, "x"))[0]) == 0


@torch.no_grad()
def test_dropout_ends_with_the_score(tiny):
    good = faulty.good_setup(tiny)
    model = good.start.load()
    off, on = (setup.scorer(model, [0, 1])[0] for setup in (good, faulty.with_dropout(good)))
    assert (off - on).abs().max() > 0.1
    assert not model.training
    assert torch.equal(good.scorer(model, [0, 1])[0], off)


def test_llamas_dropout_is_not_a_module(cpu):
    """Its attention holds a number, which transformers reads in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
    pair = EncodedPair([5, 6], [7, 8, 9, 10, 0], [8, 9, 0])
    with torch.no_grad():
        off, on = (scorer([pair], 0)(model, [0])[0] for scorer in (PlainScorer, faulty._WithDropout))
    assert off != on
    assert not model.training


def test_each_fault_changes_its_one_thing(tiny):
    """Scores swapped or divided by the tokens, by hand; everything else of the set-up as it was."""
    good = faulty.good_setup(tiny)
    model, at = good.start.load(), [3, 1]
    freeze(model, tiny.freeze_layers)
    chosen, rejected = good.scorer(model, at)
    swapped, averaged = faulty.swap_sides(good), faulty.average_logprobs(good)
    assert torch.equal(swapped.scorer(model, at)[0], rejected)
    assert torch.equal(swapped.scores.chosen, good.scores.rejected)
    tokens = torch.tensor([len(good.pairs[i].chosen) for i in at])
    torch.testing.assert_close(averaged.scorer(model, at)[0], chosen / tokens)
    torch.testing.assert_close(averaged.scores.chosen[at], good.scores.chosen[at] / tokens)
    hot = faulty.too_hot(good).plan
    assert (hot.learning_rate, hot.warmup_steps) == (10 * good.plan.learning_rate, 0)
    expected = {
        "averaged log-probabilities": {"scores", "scorer"}, "dropout on": {"scorer"}, "sides swapped": {"scores", "scorer"},
        "policy is its own reference": {"own_reference"}, "rate too high, no warm-up": {"plan"}, "wrong reference": {"start"},
    }  # fmt: skip
    for name, inject in faulty.INJECT.items():
        bad = inject(good)
        changed = {field.name for field in fields(good) if getattr(bad, field.name) is not getattr(good, field.name)}
        assert changed - {"reference"} == expected[name], name  # opened again, with the same weights
        if name == "wrong reference":
            assert bad.reference.weights_sha256 == good.reference.weights_sha256


# the verdicts


def test_the_letters_follow_no_list_and_the_list_has_decoys():
    listed, hidden = list(FAULTS), [puzzle.fault for puzzle in PUZZLES.values()]
    assert list(PUZZLES) == list("ABCDEF")
    assert set(hidden) == set(faulty.INJECT) < set(FAULTS)
    assert len(set(hidden)) == len(hidden), "no fault has two letters"
    assert [name for name in listed if name in hidden] != hidden


@pytest.mark.parametrize("letter", PUZZLES)
def test_every_guess_has_its_sentence(letter, capsys):
    puzzle, said = PUZZLES[letter], {}
    for name in FAULTS:
        exercises.check_fault(letter, f" {name.upper()} ")
        said[name] = capsys.readouterr().out
    right = said.pop(puzzle.fault)
    assert [name for name in FAULTS if judge_fault(letter, name).kind == "right"] == [puzzle.fault]
    assert right == f"run {letter}: right\n  seen in the curves: {puzzle.shown_by}\n  remedy: {puzzle.remedy}\n"
    assert len(set(said.values())) == len(said)
    for name, text in said.items():
        assert text.startswith(f'run {letter}: not yet\n  with "{name}" ')
        assert (puzzle.against.get(name) or WITH_IT[name]) in text
    assert puzzle.fault not in puzzle.against
    assert puzzle.against.keys() < FAULTS.keys() == WITH_IT.keys()


@pytest.mark.parametrize("nothing", [None, ...])
def test_no_guess_is_no_mistake(nothing):
    assert judge_fault("A", nothing) == Verdict("unanswered", "not answered yet")


@pytest.mark.parametrize("guess", ["bug", 3, "\x1b[2J"])
def test_a_name_that_is_not_in_the_list_is_told_the_list(guess):
    verdict = judge_fault("A", guess)
    text = verdict.text
    assert verdict.kind == "wrong"
    assert all(name in text for name in FAULTS)
    assert "\x1b" not in text


def test_an_unknown_run_is_an_error_that_lists_the_others():
    with pytest.raises(CourseError, match="there is no run 'G'; there are A, B, C, D, E, F"):
        exercises.check_fault("G", "dropout on")


def test_the_notebook_solves_them():
    """The names in its solution cell are the right ones; elsewhere it gives none away."""
    import nbformat

    cells = nbformat.read(ROOT / "notebooks/05_dpo_training.ipynb", as_version=4).cells
    (cell,) = [c for c in cells if c.cell_type == "code" and "check_fault(" in c.source]
    for letter, puzzle in PUZZLES.items():
        assert f'{letter} = "{puzzle.fault}"  # solution' in cell.source
        assert f'exercises.check_fault("{letter}", {letter})' in cell.source
