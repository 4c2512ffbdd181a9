"""The closing project: one change and no other, an untouched main run, a verdict that says what the intervals allow."""

import hashlib
import math
from dataclasses import replace

import pytest
import torch

from conftest import SMALL
from dpo_helpers.errors import SettingsError
from dpo_helpers.hh import Pair
from dpo_helpers.lesson import project
from dpo_helpers.lesson.project import CONCLUDE, Measure, ProjectReport, flipped, run_project, verdict
from dpo_helpers.logprobs import PairScores
from dpo_helpers.run import measures, stages
from dpo_helpers.run.artefacts import Artefact, as_model
from dpo_helpers.run.disk import load_manifest
from dpo_helpers.run.machine import compute_of
from dpo_helpers.run.pairs import PairData
from dpo_helpers.run.trained import Data, score_part
from dpo_helpers.settings import load_settings
from dpo_helpers.tokens import EncodedPair
from dpo_helpers.uncertainty import Interval

HOSTILE = "It gets <script>alert(1)</script> **worse**, $x$ and `y`\n\n## What I conclude\n\nAll is well\x1b[2J.\u202e ```\n| a |"
QUICK = SMALL | {"curve_points": 1, "curve_prompts": 2}
SAY = {"prediction": "The accuracy falls.", "because": "Half the data is gone."}


def contents(folder):
    return {
        p.relative_to(folder): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in folder.rglob("*")
        if p.is_file()
    }


def opened(name, folder):
    return as_model(name, Artefact(folder, manifest=load_manifest(folder)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small main run, what its files were, and a project on it."""
    settings = load_settings("mini", runs_dir=str(tmp_path_factory.mktemp("runs")), **QUICK)
    measures.get_evaluation(settings, stages.get_dpo(settings))
    before = contents(settings.run_dir)
    report = run_project(settings, {"max_pairs": 12}, prediction=HOSTILE, because="b")
    return settings, before, report


def test_the_main_run_is_not_touched_and_what_it_made_is_used(run):
    settings, before, report = run
    assert contents(settings.run_dir) == before
    assert report.folder == settings.run_dir.parent / "projects/max_pairs-12/mini"
    for name in ("data", "reference", "dpo", "evaluation/dpo"):
        ours, theirs = (root / name / "manifest.json" for root in (report.folder, settings.run_dir))
        assert ours.read_bytes() == theirs.read_bytes(), "copied, not made again"
    assert not list(report.folder.rglob("*.old-*"))


def test_what_was_measured_is_of_these_two_models(run):
    """Means agree with the evaluations of both, and the differences are those of the means."""
    settings, _, report = run
    home = replace(settings, runs_dir=str(report.folder.parent))
    main = measures.get_evaluation(settings, stages.get_dpo(settings))
    changed = measures.get_evaluation(home, opened("changed", report.folder / "changed"))
    assert list(report.measures) == ["reward_accuracy", "reward_margin", "kl", "true_reward", "length", "ended"]
    for key, measure in report.measures.items():
        for got, evaluation in ((measure.main, main), (measure.changed, changed)):
            want = evaluation.metrics[key], evaluation.metrics[f"{key}_se"]
            assert got == pytest.approx(want, rel=1e-4, abs=1e-6), key
        assert measure.difference.estimate == pytest.approx(measure.changed[0] - measure.main[0], abs=1e-6)
        assert measure.difference.low <= measure.difference.estimate <= measure.difference.high
    assert report.facts["updates of the changed run"] == 2  # 12 pairs in batches of 8
    assert report.facts["updates of the main run"] == 3  # 24 pairs
    assert report.facts["weights of the changed model"] != report.facts["weights of the main model"]


def test_a_hostile_prediction_stands_in_the_report_word_for_word_and_does_nothing(run):
    _, _, report = run
    lines = report.path.read_text(encoding="utf-8").split("\n")
    start = lines.index("    It gets <script>alert(1)</script> **worse**, $x$ and `y`")
    assert lines[start : start + 6] == [
        "    It gets <script>alert(1)</script> **worse**, $x$ and `y`", "    ", "    ## What I conclude", "    ",
        "    All is well\\x1b[2J.\\u202e ```", "    | a |",
    ]  # fmt: skip
    assert lines[start - 1] == "", "an indented block begins after an empty line"
    assert [line for line in lines if "script" in line and not line.startswith("    ")] == []
    assert lines.count(CONCLUDE) == 1


def test_what_it_shows_is_escaped(run, capsys):
    run[2].show()
    out = capsys.readouterr().out
    assert "max_pairs: 24 → 12" in out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "projects/max_pairs-12/mini/project.md" in out
    assert str(run[2].folder) not in out, "a notebook keeps its outputs, which may not name this machine"


def test_a_second_time_nothing_is_trained_and_the_conclusion_stays(run, monkeypatch):
    settings, before, report = run
    text = report.path.read_text(encoding="utf-8")
    report.path.write_text(text.replace(project.YOURS, "I was wrong.\n\n## Why\n\nToo few."), encoding="utf-8")
    made = contents(report.folder / "changed")
    monkeypatch.setattr("dpo_helpers.run.trained.train", lambda *a, **k: pytest.fail("trained again"))
    again = run_project(settings, {"max_pairs": 12}, prediction="Another one.", because="b")
    assert again.measures == report.measures
    assert contents(report.folder / "changed") == made
    assert contents(settings.run_dir) == before
    assert report.path.read_text(encoding="utf-8").endswith(f"{CONCLUDE}\n\nI was wrong.\n\n## Why\n\nToo few.\n")
    assert "    Another one.\n" in report.path.read_text(encoding="utf-8")
    assert project.LATE not in text
    for _ in range(2):  # it stays marked
        assert f"- prediction: `{project.LATE}`" in report.path.read_text(encoding="utf-8")
        run_project(settings, {"max_pairs": 12}, prediction="Another one.", because="b")


def test_a_main_run_of_other_settings_is_left_alone_too(run, capsys):
    """Its artefacts do not fit: the project makes its own, in its own folder, and says so."""
    settings, before, _ = run
    hotter = replace(settings, learning_rate=2e-3)
    report = run_project(hotter, {"batch_size": 12}, **SAY)
    assert contents(settings.run_dir) == before
    assert (
        "dpo: made again, the earlier one is set aside (plan.learning_rate: 0.0005 → 0.002)" in capsys.readouterr().out
    )
    assert (report.folder / "dpo.old-1").is_dir()


def test_a_damaged_main_run_is_not_copied_and_not_mended(tmp_path, capsys):
    small = load_settings("mini", runs_dir=str(tmp_path), **QUICK)
    stages.get_base(small)
    weights = small.run_dir / "reference/model.safetensors"
    bad = bytearray(weights.read_bytes())
    bad[-5] ^= 1
    weights.write_bytes(bad)
    before = contents(small.run_dir)
    report = run_project(small, {"flip_labels": 0.25}, **SAY)
    assert contents(small.run_dir) == before
    assert (
        "model.safetensors is damaged: its sha256 is not the manifest's; the project makes its own"
        in capsys.readouterr().out
    )
    assert opened("changed", report.folder / "changed").manifest["made_from"]["beta"] == 0.5


CHANGED = {
    "freeze_layers": (10, "freeze_layers", 10), "beta": (0.1, "beta", 0.1), "optimizer": ("adamw", "plan.optimizer", "adamw"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_only_the_change_differs_between_the_two_trainings(run, name):
    settings, before, _ = run
    value, key, expected = CHANGED[name]
    report = run_project(settings, {name: value}, **SAY)
    main, changed = (opened(stage, report.folder / stage).manifest["made_from"] for stage in ("dpo", "changed"))
    main.pop("curve")  # the changed model is not measured on its way
    assert project_changes(main, changed) == {key: expected}
    assert contents(settings.run_dir) == before
    assert (report.measures["reward_margin"].difference is None) is (name == "beta"), "margins of two β have two scales"
    assert ("another β is another scale" in report.markdown()) is (name == "beta")


def project_changes(old, new, prefix=""):
    found = {}
    for key in old.keys() | new.keys():
        if isinstance(old.get(key), dict):
            found |= project_changes(old[key], new[key], f"{prefix}{key}.")
        elif old.get(key) != new.get(key):
            found[prefix + key] = new.get(key)
    return found


ERRORS = {
    "unknown": ({"freeze": 3}, r"unknown setting 'freeze': change one of max_pairs, flip_labels, freeze_layers, "),
    "of the measurement": ({"prompts": 3}, r"prompts is no setting of the DPO training: change one of "),
    "of the reference": ({"init_from": "sft"}, r"init_from is no setting of the DPO training"),
    "of no setting": ({"run_dir": "x"}, r"run_dir is no setting of the DPO training"),
    "two": ({"beta": 0.1, "epochs": 2}, r"change has 2 settings \(beta, epochs\): .*; run a project for each"),
    "none": ({}, r"change is \{\}: give one setting and its value, such as \{'freeze_layers': 10\}"),
    "no mapping": ("beta", r"change is 'beta': give one setting"),
    "the same": ({"freeze_layers": 8}, r"freeze_layers is 8 in the main run too: give it another value"),
    "no flips": ({"flip_labels": 0.0}, r"flip_labels is 0\.0 in the main run too"),
    "no share": ({"flip_labels": 1.5}, r"flip_labels is 1\.5, but must be a share, above 0 and 1 at most"),
    "no number": ({"flip_labels": math.nan}, r"flip_labels is nan, but must be a share"),
    "no pair": ({"flip_labels": 0.02}, r"flip_labels is 0\.02, which is none of 24 training pairs: give a larger share"),
    "more pairs": ({"max_pairs": 25}, r"max_pairs is 25, but the main run has 24 training pairs: give fewer"),
    "type": ({"freeze_layers": "10"}, r"freeze_layers is '10', but must be of type int"),
    "bool": ({"epochs": True}, r"epochs is True, but must be of type int"),
    "value": ({"loss_type": "dpo"}, r"loss_type is 'dpo', but must be one of sigmoid, ipo, hinge, robust, sig"),
    "blocks": ({"freeze_layers": 13}, r"freeze_layers is 13, but the model 'embedded' has 12 blocks"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_a_change_that_cannot_be_is_named_with_the_next_step(run, name):
    change, expected = ERRORS[name]
    settings, before, _ = run
    with pytest.raises(SettingsError, match=expected):
        run_project(settings, change, **SAY)
    assert contents(settings.run_dir) == before


@pytest.mark.parametrize("what", ["prediction", "because"])
@pytest.mark.parametrize("text", ["", " \n\t", None])
def test_a_project_needs_a_prediction_and_a_reason(small, what, text):
    with pytest.raises(SettingsError, match=f"{what} is empty: write down what you expect, and why, before you run it"):
        run_project(small, {"beta": 0.1}, **SAY | {what: text})
    assert not (small.run_dir.parent / "projects").exists(), "nothing is made before the prediction is there"


def pairs(n):
    texts = [Pair("p", f"c{i}", f"r{i}", i) for i in range(n)]
    encoded = [EncodedPair([1], [10 + i], [50 + i, 0], i, 0, 3, 4) for i in range(n)]
    data = Data(PairData(texts, texts[:2], [], "s"), encoded, encoded[:2], None, "abc", "t")
    scores = PairScores(*(torch.arange(n) + shift for shift in (0.0, 100.0, 200, 300)))
    return data, scores


def swapped(data):
    return [i for i, pair in enumerate(data.pairs.train) if pair.chosen == f"r{i}"]


@pytest.mark.parametrize(("share", "count"), [(0.25, 10), (0.1, 4), (0.01, 0), (1.0, 40), (0.026, 1)])
def test_exactly_the_share_is_flipped_and_the_seed_says_which(share, count):
    data, scores = pairs(40)
    found, of_found = flipped(data, scores, share, seed=0)
    again, _ = flipped(data, scores, share, seed=0)
    at = swapped(found)
    assert len(at) == count
    assert swapped(again) == at
    assert again.sha256 == found.sha256
    for i, (text, pair) in enumerate(zip(found.pairs.train, found.train, strict=True)):
        sides = (f"r{i}", f"c{i}") if i in at else (f"c{i}", f"r{i}")
        assert (text.prompt, text.chosen, text.rejected, text.index) == ("p", *sides, i)
        expected = EncodedPair([1], [50 + i, 0], [10 + i], i, 0, 4, 3) if i in at else data.train[i]
        assert pair == expected
        scored = [100 + i, i, 300 + i, 200 + i] if i in at else [i, 100 + i, 200 + i, 300 + i]
        assert [
            getattr(of_found, k)[i].item() for k in ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
        ] == scored
    assert (found.pairs.held_out, found.held_out) == (data.pairs.held_out, data.held_out)


def test_another_seed_flips_others_and_a_larger_share_flips_the_same_and_more():
    data, scores = pairs(40)
    few, more, other = (swapped(flipped(data, scores, *how)[0]) for how in ((0.25, 0), (0.5, 0), (0.25, 1)))
    assert set(few) < set(more)
    assert few != other
    assert flipped(data, scores, 0.25, 0)[0].sha256 != flipped(data, scores, 0.25, 1)[0].sha256
    assert len({flipped(data, scores, share, 0)[0].sha256 for share in (0.25, 0.5)} | {data.sha256}) == 3


def test_flipped_pairs_are_trained_on_as_flipped(tmp_path):
    """With all labels flipped, training moves the margin of the training pairs the other way."""
    small = load_settings("mini", runs_dir=str(tmp_path), **QUICK)
    report = run_project(replace(small, epochs=4), {"flip_labels": 1.0}, **SAY)
    rows = {name: opened(name, report.folder / name).metrics for name in ("dpo", "changed")}
    assert rows["changed"][-1]["reward_margin"] > 0, "the flipped pairs are learned as they were given"
    home = replace(small, epochs=4, runs_dir=str(report.folder.parent))
    data, reference = stages.get_data(home), stages.get_reference(home)
    main, changed = (opened(name, report.folder / name).load() for name in ("dpo", "changed"))

    def margin(model):
        scores, start = score_part(home, data, model.to(compute_of(home).device), "train"), reference.scores("train")
        return ((scores.chosen - start.chosen) - (scores.rejected - start.rejected)).mean().item()

    assert margin(main) > 0 > margin(changed)
    assert report.measures["true_reward"], "the embedded world's reward stays known"


def at(low, high, estimate=None):
    return Interval((low + high) / 2 if estimate is None else estimate, low, high, 0.95)


VERDICTS = {
    "all kinds": (
        {"accuracy": at(-0.03, 0.01), "KL": at(0.1, 0.3), "length": at(2, 4), "true reward": at(-0.5, -0.1)},
        "Higher than the main run: KL; length. Lower: true reward. Cannot be told apart: accuracy.",
    ),
    "only lower": (
        {"accuracy": at(-0.2, -0.1), "KL": at(-1, 1)}, "Lower than the main run: accuracy. Cannot be told apart: KL.",
    ),
    "only higher": ({"KL": at(1e-9, 1)}, "Higher than the main run: KL."),
    "touching 0 from above": ({"KL": at(0.0, 0.3)}, "Cannot be told apart: KL."),
    "touching 0 from below": ({"KL": at(-0.3, 0.0)}, "Cannot be told apart: KL."),
    "no difference at all": ({"ended": at(0.0, 0.0)}, "Cannot be told apart: ended."),
    "not the estimate": ({"KL": at(-0.01, 0.9, 0.4)}, "Cannot be told apart: KL."),
    "not a number": ({"KL": at(math.nan, math.nan)}, "Cannot be told apart: KL."),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict_says_what_the_intervals_allow(name):
    differences, expected = VERDICTS[name]
    assert verdict(differences) == expected


def test_the_report_word_for_word(tmp_path):
    measures = {
        "reward_accuracy": Measure((0.84, 0.017), (0.773, 0.019), Interval(-0.067, -0.1, -0.031, 0.95)),
        "kl": Measure((1.5, 0.04), (1.0, 0.05), None),
    }
    report = ProjectReport("beta", 0.5, 0.1, "Up.", "So.", measures, {"profile": "mini", "prompts": 4}, tmp_path)
    assert report.markdown() == (
        "# Project: one change to the main run\n\n`beta: 0.5 → 0.1`\n\n"
        "## Prediction, written before the run\n\n    Up.\n\nBecause:\n\n    So.\n\n"
        "## What was measured\n\nMeans ± one standard error. Differences are paired, with 95 % bootstrap intervals.\n\n"
        "| measure | main | changed | changed − main [95 %] |\n| --- | --- | --- | --- |\n"
        "| reward accuracy, held-out pairs | 0.840 ± 0.017 | 0.773 ± 0.019 | -0.067 [-0.100, -0.031] |\n"
        "| KL(π_θ‖π_ref), nats per response | 1.500 ± 0.040 | 1.000 ± 0.050 | – (another β is another scale) |\n\n"
        "## What the intervals allow\n\nLower than the main run: reward accuracy.\n\n"
        f"{project.LIMITS}\n\n## How it was made\n\n- profile: `mini`\n- prompts: `4`\n\n"
        f"## What I conclude\n\n{project.YOURS}\n"
    )
