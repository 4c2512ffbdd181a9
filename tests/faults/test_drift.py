"""5 Drift on resume: an unfinished training is not gone on with under other settings or data; the keys are listed."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pressing import ctrl_c_in_update

from conftest import SMALL, tiny_gpt2
from dpo_helpers.errors import ArtefactError
from dpo_helpers.run import stages
from dpo_helpers.run.checkpoints import Checkpoints, TrainState
from dpo_helpers.run.disk import file_hash
from dpo_helpers.run.loading import save_model
from dpo_helpers.run.signals import Interrupted
from dpo_helpers.settings import load_settings
from dpo_helpers.worlds.embedded import preference_rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def own(tmp_path, tokenizer):
    """Settings with a model and data of the user's own, which a test can change on disk."""
    save_model(tiny_gpt2(vocab=len(tokenizer), positions=256), tokenizer, tmp_path / "model")
    write_rows(tmp_path / "pairs.jsonl", preference_rows("train", 40))
    return load_settings(
        "mini", runs_dir=str(tmp_path / "runs"), model=str(tmp_path / "model"), dataset=str(tmp_path / "pairs.jsonl"),
        **SMALL | {"max_pairs": None, "freeze_layers": 1},
    )  # fmt: skip


@pytest.fixture
def interrupted(own):
    """A DPO training that Ctrl-C stopped in its second update."""
    with (
        ctrl_c_in_update(2),
        pytest.raises(Interrupted, match=r"dpo: interrupted after update 2 of 4, saved in .*; run the same again"),
    ):
        stages.get_dpo(own)
    stages._tokenizer.cache_clear()  # a new session reads the files again
    return own


def hashes(folder):
    return {p.relative_to(folder): file_hash(p) for p in folder.rglob("*") if p.is_file()}


def reorder(settings):
    path = Path(settings.dataset)
    write_rows(path, [json.loads(line) for line in path.read_text().splitlines()][::-1])


def other_tokenizer(settings):
    """One merge less: other ids for some words, the same weights."""
    path = Path(settings.model) / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["merges"].pop()
    path.write_text(json.dumps(definition))


def other_reference(settings):
    save_model(
        tiny_gpt2(seed=1, vocab=len(stages._tokenizer(settings)[0]), positions=256),
        stages._tokenizer(settings)[0],
        Path(settings.model),
    )


CASES = {
    "β": ({"beta": 1.0}, None, {"beta"}),
    "loss": ({"loss_type": "hinge"}, None, {"loss_type"}),
    "schedule": ({"schedule": "constant"}, None, {"plan.schedule"}),
    "rate and warm-up": ({"learning_rate": 1e-4, "warmup_steps": 3}, None, {"plan.learning_rate", "plan.warmup_steps"}),
    "frozen blocks": ({"freeze_layers": 2}, None, {"freeze_layers"}),
    "seed": ({"seed": 1}, None, {"plan.seed", "data"}),
    "rows reordered": ({}, reorder, {"data"}),
    "tokenizer": ({}, other_tokenizer, {"tokenizer"}),
    "reference": ({}, other_reference, {"reference"}),
}


@pytest.mark.parametrize("name", CASES)
def test_drift_is_refused_and_lists_exactly_the_changed_keys(interrupted, name, survived):
    changes, on_disk, keys = CASES[name]
    if on_disk:
        on_disk(interrupted)
        stages._tokenizer.cache_clear()
    unfinished = interrupted.run_dir / "dpo.unfinished"
    before = hashes(unfinished)
    with pytest.raises(ArtefactError, match="is an unfinished training from other settings or data") as caught:
        stages.get_dpo(replace(interrupted, **changes))
    listed = set(re.findall(r"([\w.]+): [^;]+? → ", str(caught.value)))
    survived(f"5 drift refused, exactly the changed keys listed: {name}", int(listed == keys), 1)
    assert "--no-resume" in str(caught.value)
    assert hashes(unfinished) == before, "nothing is lost by being refused"


def test_the_same_settings_go_on_to_the_same_model(interrupted, tmp_path, capsys):
    whole = stages.get_dpo(replace(interrupted, runs_dir=str(tmp_path / "other")))
    capsys.readouterr()
    stage = stages.get_dpo(interrupted)
    assert "dpo.unfinished: goes on after update 2" in capsys.readouterr().out
    assert stage.weights_sha256 == whole.weights_sha256
    assert [row["loss"] for row in stage.metrics] == [row["loss"] for row in whole.metrics]
    assert not (interrupted.run_dir / "dpo.unfinished").exists()


def test_what_does_not_decide_the_result_may_change(interrupted):
    """Where the outputs lie, how often is saved, the budget of the store: no reason to refuse."""
    stages.get_dpo(replace(interrupted, save_every=3, trunk_gb=1.0))


def test_no_resume_sets_aside_and_begins_again(interrupted, capsys):
    stage = stages.get_dpo(replace(interrupted, beta=1.0, resume=False))
    assert "dpo.unfinished: not resumed, set aside as dpo.unfinished.old-1" in capsys.readouterr().out
    assert (interrupted.run_dir / "dpo.unfinished.old-1/step-000002/weights.safetensors").is_file()
    assert stage.manifest["made_from"]["beta"] == 1.0


def test_a_finished_artefact_leaves_another_settings_unfinished_training(interrupted, capsys):
    """β = 0.5 is finished, β = 1 interrupted; loading the first must not throw away the second."""
    stages.get_dpo(interrupted)
    other = Checkpoints(interrupted.run_dir / "dpo", {"beta": 1.0})
    other.save(TrainState(3, {"w": torch.ones(2)}, {"w/square_avg": torch.ones(2)}, [], 8, {}))
    capsys.readouterr()
    stages.get_dpo(interrupted)
    assert other.newest().step == 3
    other.discard()
    assert not other.folder.exists()
