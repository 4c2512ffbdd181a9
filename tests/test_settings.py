import math
from dataclasses import fields

import pytest

from dpo_helpers.errors import SettingsError
from dpo_helpers.settings import GPT2_REVISION, HH_REVISION, Settings, load_settings, parse_value


def test_the_study_profile():
    """The study: GPT-2, HH-RLHF, RMSprop, 1e-6, 8 frozen blocks, β 0.5 from 0.1, 0.5, 1, 5; pinned commits."""
    s = load_settings("gpt2")
    assert (s.model, s.model_revision) == ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e")
    assert (s.dataset, s.dataset_revision) == ("Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa")
    assert (s.optimizer, s.learning_rate, s.freeze_layers, s.beta) == ("rmsprop", 1e-6, 8, 0.5)
    assert s.betas == (0.1, 0.5, 1.0, 5.0)
    assert s.init_from == "base"
    assert (s.model_revision, s.dataset_revision) == (GPT2_REVISION, HH_REVISION)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0.0), ("beta", -1.0), ("beta", math.nan), ("beta", math.inf), ("learning_rate", 0.0),
        ("batch_size", 0), ("micro_batch_size", -1), ("epochs", 0), ("freeze_layers", -1), ("warmup_steps", -1),
        ("save_every", 0), ("device", "cuda:x"), ("betas", ()), ("betas", (0.1, 0.1)), ("betas", (0.0,)), ("optimizer", "sgd"),
        ("init_from", "dpo"), ("device", "tpu"), ("precision", "fp8"), ("max_pairs", 0), ("max_prompt_length", 256),
    ],
)  # fmt: skip
def test_a_bad_value_is_an_error_that_names_it(name, value):
    with pytest.raises(SettingsError, match=f"{name} is .*, but must be"):
        load_settings("mini", **{name: value})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("seed", str(10**21), "from 0 to 4,294,967,295"),
        ("sft_learning_rate", "1e308", "from 1e-12 to 1"),
        ("trunk_gb", "1e300", "from 0 to 100,000 GB"),
        ("epochs", str(10**10), "from 1 to 1,000 passes"),
        ("held_out_pairs", str(3 * 10**9), "from 1 to 1,000,000 pairs"),
        ("max_pairs", str(10**9), "from 1 to 1,000,000 pairs"),
        ("max_new_tokens", str(10**9), "from 1 to 1,000,000 tokens"),
        ("betas", "0.1,1e300", "1 or more different values from 1e-06 to 1,000,000"),
        ("frontier_betas", "1e-300", "0 or more different values from 1e-06 to 1,000,000"),
    ],
)
def test_a_number_out_of_range_is_an_error_that_says_the_range_with_its_unit(monkeypatch, name, text, words):
    monkeypatch.setenv(f"DPO_{name.upper()}", text)
    with pytest.raises(SettingsError) as caught:
        load_settings("mini")
    assert str(caught.value) == f"{name} is {parse_value(name, text)!r}, but must be {words}"


MAY_BE_0 = {"freeze_layers", "warmup_steps", "label_smoothing", "trunk_gb", "seed"}


def test_every_number_has_two_ends():
    """No setting can be so large or so small that a run overflows or never ends; the ends themselves are allowed."""
    numbers = {f.name: str(f.type) for f in fields(Settings) if str(f.type).startswith(("int", "float", "tuple"))}
    assert len(numbers) == 24
    for name, kind in numbers.items():
        for far in (-1, 1e13, 10**400, math.inf, math.nan, *([] if name in MAY_BE_0 else [0])):
            with pytest.raises(SettingsError, match=f"{name} is .*, but must be"):
                load_settings("mini", **{name: (far,) if kind.startswith("tuple") else far})
    for ends in ({"seed": 2**32 - 1, "epochs": 1000, "beta": 1_000_000, "trunk_gb": 100_000, "learning_rate": 1},
                 {"held_out_pairs": 1, "epochs": 1, "beta": 1e-6, "learning_rate": 1e-12, **dict.fromkeys(MAY_BE_0, 0)}):  # fmt: skip
        assert load_settings("mini", **ends)


def test_unknown_profile_and_setting():
    with pytest.raises(SettingsError, match="unknown profile 'huge': use one of mini, gpt2"):
        load_settings("huge")
    with pytest.raises(SettingsError, match="unknown setting 'betta'"):
        load_settings("mini", betta=1)


def test_environment(monkeypatch):
    monkeypatch.setenv("DPO_BETA", "0.25")
    monkeypatch.setenv("DPO_BETAS", "1,2")
    monkeypatch.setenv("DPO_FREEZE_EMBEDDINGS", "false")
    s = load_settings("mini")
    assert (s.beta, s.betas, s.freeze_embeddings) == (0.25, (1.0, 2.0), False)
    assert load_settings("mini", beta=3.0).beta == 3.0, "a keyword beats the environment"
    monkeypatch.setenv("DPO_PROFILE", "gpt2")
    assert load_settings("mini").profile == "gpt2"
    monkeypatch.setenv("DPO_BETA", "strong")
    with pytest.raises(SettingsError, match="beta is 'strong', but must be of the form float"):
        load_settings("mini")


def test_another_model_does_not_keep_the_profiles_commit():
    assert load_settings("gpt2", model="openai-community/gpt2-medium").model_revision is None
    assert load_settings("gpt2", dataset="a.jsonl").dataset_revision is None
    assert load_settings("gpt2").model_revision == GPT2_REVISION


def test_the_lessons_numbers_are_float32s_on_every_device():
    assert load_settings("mini").precision == "fp32"
    assert load_settings("gpt2").precision == "auto"


def test_parse_value():
    assert parse_value("betas", "0.1,5") == (0.1, 5.0)
    assert parse_value("max_pairs", "7") == 7
    with pytest.raises(SettingsError, match="epochs is 'two'"):
        parse_value("epochs", "two")


def test_runs_are_kept_beside_the_notebooks(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert load_settings("mini").run_dir == tmp_path / "runs/mini"
    (tmp_path / "pyproject.toml").unlink()
    assert load_settings("mini").run_dir == tmp_path / "notebooks/runs/mini"
