"""The stages on a small run: artefacts are made once, used again, remade when what they came from changed."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from huggingface_hub import ModelCard
from test_training import pairs
from transformers import GPT2LMHeadModel

from conftest import tiny_gpt2
from dpo_helpers import tokens
from dpo_helpers.device import Compute
from dpo_helpers.errors import ArtefactError
from dpo_helpers.evaluation import score_pairs
from dpo_helpers.fast import architectures
from dpo_helpers.fast.store import TrunkStore
from dpo_helpers.logprobs import PlainScorer
from dpo_helpers.models import freeze, weights_hash
from dpo_helpers.run import measures, outputs, report, stages, trained
from dpo_helpers.run.disk import FROZEN
from dpo_helpers.run.report import check_results, make_report, results_schema
from dpo_helpers.uncertainty import mean_and_error
from dpo_helpers.worlds.embedded import true_reward


def mtimes(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_stage_is_loaded_the_second_time(small, capsys):
    first = stages.get_dpo(small)
    before = mtimes(small.run_dir)
    again = stages.get_dpo(small)
    assert {k: v for k, v in mtimes(small.run_dir).items() if k in before} == before
    assert again.weights_sha256 == first.weights_sha256
    assert "made again" not in capsys.readouterr().out


def test_each_stage_makes_what_it_needs(small):
    """Opened alone, the last stage has everything before it made."""
    outputs.get_generations(small)
    made = {p.name for p in small.run_dir.iterdir() if not p.name.startswith(".")}
    assert made == {"data", "reference", "sft", "dpo", "generations"}


def test_step_0_rewards_and_an_unmoved_reference(small):
    reference, dpo = stages.get_reference(small), stages.get_dpo(small)
    first = dpo.metrics[0]
    assert (first["step"], first["split"]) == (0, "held_out")
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert (first["chosen_reward"], first["rejected_reward"], first["ties"]) == (0.0, 0.0, 1.0)
    assert weights_hash(reference.load()) == reference.weights_sha256
    assert dpo.weights_sha256 != reference.weights_sha256
    start, end = reference.load().state_dict(), dpo.load().state_dict()
    moved = {name.split(".")[2] for name in start if ".h." in name and not torch.equal(start[name], end[name])}
    assert moved == {"8", "9", "10", "11"}
    assert torch.equal(start["transformer.wte.weight"], end["transformer.wte.weight"])


def test_a_changed_setting_remakes_and_keeps_the_old(small, capsys):
    first = stages.get_dpo(small)
    changed = replace(small, learning_rate=2e-3)
    second = stages.get_dpo(changed)
    assert second.weights_sha256 != first.weights_sha256
    out = capsys.readouterr().out
    assert "dpo: made again, the earlier one is set aside" in out
    assert "plan.learning_rate: 0.0005 → 0.002" in out
    old = json.loads((small.run_dir / "dpo.old-1/manifest.json").read_text())
    assert old["about"]["weights_sha256"] == first.weights_sha256
    assert "reference" not in out, "the reference does not depend on the learning rate"


def test_a_damaged_artefact_is_named_and_made_again(small, capsys):
    good = stages.get_base(small).weights_sha256
    weights = small.run_dir / "reference/model.safetensors"
    bad = bytearray(weights.read_bytes())
    bad[-5] ^= 1
    weights.write_bytes(bad)
    assert stages.get_base(small).weights_sha256 == good
    out = capsys.readouterr().out
    assert "model.safetensors is damaged" in out
    assert (small.run_dir / "reference.old-1").is_dir()


def test_data_is_tokenised_once(small, tokenizer, monkeypatch):
    """The ids are kept beside the texts: neither a second call nor another process asks the tokenizer again."""
    calls, encode = [], tokens.encode_texts

    def counting(tokenizer, texts, **how):
        calls.append(len(texts))
        return encode(tokenizer, texts, **how)

    monkeypatch.setattr(tokens, "encode_texts", counting)
    first = stages.get_data(small)
    assert sorted(calls)[-4:] == [12, 24, 24, 48], "prompts, and both responses, of 24 and of 12 pairs"
    calls.clear()
    again = stages.get_data(small)
    stages._tokenizer.cache_clear()  # as in a new process
    stages._read_data.cache_clear()
    later = stages.get_data(small)
    assert {*calls} == {1}, "one letter, to see how the tokenizer begins a text: no pair"
    lengths = {"max_length": small.max_length, "max_prompt_length": small.max_prompt_length}
    for data in (first, again, later):
        for part in ("train", "held_out"):
            assert getattr(data, part) == list(tokens.encode_pairs(tokenizer, getattr(data.pairs, part), **lengths))


def test_values_are_those_that_an_evaluation_averages(small, monkeypatch):
    """Per pair and per response, the KL among them: it is stored, not computed again. Of another β and loss."""
    small = replace(small, loss_type="robust", label_smoothing=0.1)
    model = stages.get_dpo(small, 5.0)
    evaluation = measures.get_evaluation(small, model)
    metrics = evaluation.metrics
    assert evaluation.beta == 5.0
    assert metrics["chosen_reward"] == pytest.approx(5 * metrics["chosen_logratio"]) != 0
    monkeypatch.setattr("dpo_helpers.run.sampled.response_kls", lambda *a, **k: pytest.fail("computed again"))
    values = measures.get_values(small, model)
    per_response = {"kl", "k1", "k3", "length", "ended", "true_reward"}
    per_pair = {"loss", "chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy", "chosen_logratio"}
    assert {key: len(value) for key, value in values.items()} == dict.fromkeys(per_response, 4) | dict.fromkeys(
        per_pair, 12
    )
    assert values["kl"].std() > 0
    for key, value in values.items():
        assert mean_and_error(value) == pytest.approx((metrics[key], metrics[f"{key}_se"]), rel=1e-6, abs=1e-7), key


@pytest.mark.parametrize("freeze_embeddings", [True, False], ids=["fast path", "plain path"])
def test_held_out_pairs_are_scored_in_float32_and_training_pairs_as_the_training_does(small, freeze_embeddings):
    """Of a policy near its reference bf16 gave every fourth margin the other sign (`python -m benchmarks.kl`)."""
    half = replace(small, precision="bf16", device="cpu", freeze_embeddings=freeze_embeddings)
    data, model = stages.get_data(half), stages.get_base(half).load()
    exact = {
        part: score_pairs(model, pairs, PlainScorer(pairs, data.pad_id), Compute(torch.device("cpu"), "fp32"))
        for part in ("train", "held_out")
        for pairs in [getattr(data, part)]
    }
    apart = {
        part: (trained.score_part(half, data, model, part).chosen - exact[part].chosen).abs().max() for part in exact
    }
    assert apart["held_out"] < 1e-4
    assert apart["train"] > 0.01
    assert torch.equal(
        stages.get_base(half).scores("train").chosen, trained.score_part(half, data, model, "train").chosen
    )


@pytest.mark.parametrize("main", ["base", "sft"])
def test_the_other_start_is_sft_whatever_the_main_run_starts_from(small, main):
    settings = replace(small, init_from=main)
    model, sft = stages.get_dpo_from_sft(settings), stages.get_sft(settings)
    assert model.manifest["made_from"]["reference"] == sft.weights_sha256
    assert model.metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert model.weights_sha256 != sft.weights_sha256
    if main == "sft":
        assert model.weights_sha256 == stages.get_dpo(settings).weights_sha256


def test_an_evaluation_is_made_again_when_what_it_measures_changes(small, capsys, monkeypatch):
    """SFT's rewards use the settings' β: 10 times the β, 10 times the reward, on the same samples."""
    sft, settings = stages.get_sft(small), small
    first = measures.get_evaluation(settings, sft)
    for key, value, named in (
        ("beta", 5.0, "beta"), ("label_smoothing", 0.1, "loss"), ("loss_type", "robust", "loss"),
        ("prompts", 3, "prompts"), ("max_new_tokens", 5, "max_new_tokens"), ("seed", 1, "seed"),
        ("max_prompt_length", 100, "max_prompt_length"), ("max_length", 200, "max_length"),
    ):  # fmt: skip
        settings = replace(settings, **{key: value})
        found = measures.get_evaluation(settings, sft)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluation/sft: made"))
        assert f"({named}: " in line or f"; {named}: " in line
        if key == "beta":
            assert found.metrics["chosen_reward"] == pytest.approx(10 * first.metrics["chosen_reward"])
            assert found.metrics["kl"] == first.metrics["kl"]
    base, data = stages.get_base(settings), stages.get_data(settings)
    for function, value, named in (
        ("get_reference", sft, "reference"), ("get_data", replace(data, sha256="another"), "data"),
        ("get_data", replace(data, tokenizer_sha256="another"), "tokenizer"),
    ):  # fmt: skip
        monkeypatch.setattr(measures, function, lambda _, value=value: value)
        measures.get_evaluation(settings, sft)
        assert f"{named}: " in capsys.readouterr().out
    assert measures.get_evaluation(settings, replace(base, name="sft")).metrics["kl"] > 0
    assert "(model: " in capsys.readouterr().out


def test_the_frontier_ends_with_the_evaluation_of_the_trained_model(small, monkeypatch):
    """Rows on the way with a KL; then the last update twice: of the curve's prompts, and as the evaluation has it."""
    ways = {
        "sft": [{"step": 0}, {"step": 1}, {"step": 2, "kl": 2.0}, {"step": 3}, {"step": 4, "kl": 4.0}],
        "dpo": [{"step": 1}, {"step": 1, "kl": 0.1}, {"step": 2, "kl": 0.2}, {"step": 3}, {"step": 3, "loss": 1.0}],
    }
    models = {name: stages.ModelArtefact(name, small.run_dir, rows, {}) for name, rows in ways.items()}
    monkeypatch.setattr(measures, "get_sft", lambda _: models["sft"])
    monkeypatch.setattr(measures, "get_dpo", lambda _, beta: replace(models["dpo"], name=f"{beta}"))
    monkeypatch.setattr(measures, "get_hot_dpo", lambda _: replace(models["dpo"], name="hot"))
    monkeypatch.setattr(measures, "get_evaluation", lambda _, model: SimpleNamespace(metrics={"kl": model.name}))
    monkeypatch.setattr(measures, "get_values", lambda *_: {"kl": torch.tensor([3.0, 5.0, 100.0])})
    settings = replace(small, betas=(0.5, 5.0), frontier_betas=(0.05,), curve_prompts=2)
    same = {"kl": 4.0, "kl_se": 1.0}  # of 3 and 5: mean 4, standard deviation √2, over √2
    on_the_way = [{"step": 1, "kl": 0.1}, {"step": 2, "kl": 0.2}, {"step": 3, **same}]
    assert measures.get_frontier(settings) == {
        "sft": [{"step": 2, "kl": 2.0}, {"step": 4, **same}, {"step": 4, "kl": "sft"}],
        "β = 0.05": [*on_the_way, {"step": 3, "kl": "0.05"}],
        "β = 0.5": [*on_the_way, {"step": 3, "kl": "0.5"}],
        "β = 5": [*on_the_way, {"step": 3, "kl": "5.0"}],
        "hot": [*on_the_way, {"step": 3, "kl": "hot"}],
    }


def test_init_from_sft_starts_both_models_there(small):
    """The paper's variant: π_ref is the SFT model, so at step 0 loss is ln 2 against it."""
    settings = replace(small, init_from="sft")
    sft, dpo = stages.get_sft(settings), stages.get_dpo(settings)
    assert stages.get_reference(settings).weights_sha256 == sft.weights_sha256
    assert dpo.manifest["made_from"]["reference"] == sft.weights_sha256
    assert dpo.metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert measures.get_evaluation(settings, sft).metrics["kl"] == pytest.approx(0.0, abs=1e-5)
    # along its training SFT's KL was to the plain model: one point, at the start of the others
    assert [row["kl"] for row in measures.get_frontier(settings)["sft"]] == [pytest.approx(0.0, abs=1e-5)]


def test_a_sweep_shares_the_main_run_and_names_the_rest(small):
    sweep = stages.get_sweep(small)
    assert sweep[0.5].folder == small.run_dir / "dpo"
    assert sweep[5.0].folder == small.run_dir / "sweep/beta-5"
    assert sweep[5.0].manifest["made_from"]["reference"] == sweep[0.5].manifest["made_from"]["reference"]


def test_two_beta_that_are_almost_the_same_have_two_names(small, monkeypatch):
    almost = 0.1000000001
    sweep = stages.get_sweep(replace(small, betas=(0.1, almost, 5.0)))
    assert [model.folder.name for model in sweep.values()] == ["beta-0.1", "beta-0.1000000001", "beta-5"]
    for beta, model in sweep.items():
        model.require_unchanged()  # the second one has not taken the first one's place
        assert model.manifest["made_from"]["beta"] == beta
    for name in ("get_sft", "get_hot_dpo", "get_dpo"):
        monkeypatch.setattr(measures, name, lambda settings, beta=None: beta)
    monkeypatch.setattr(measures, "_points", lambda settings, model: model)
    points = measures.get_frontier(replace(small, betas=(0.1, almost, 5.0), frontier_betas=(1e-05,)))
    assert points == {
        "sft": None, "β = 1e-05": 1e-05, "β = 0.1": 0.1, "β = 0.1000000001": almost, "β = 5": 5.0, "hot": None
    }  # fmt: skip


def test_results_are_on_disk_before_anything_is_drawn_or_shown(small, monkeypatch):
    def _fail(settings):
        raise OSError("a figure that cannot be drawn, or said")

    monkeypatch.setattr(report, "collect_results", lambda settings: {"measured": 1})
    monkeypatch.setattr(report, "get_generations", lambda settings: {})
    monkeypatch.setattr(report, "get_final_model", lambda settings: None)
    monkeypatch.setattr(report, "draw_figures", _fail)
    with pytest.raises(OSError, match="a figure that cannot be drawn"):
        make_report(small)
    assert json.loads((small.run_dir / "results.json").read_text()) == {"measured": 1}
    assert json.loads((small.run_dir / "generations.json").read_text()) == {}


def test_an_unwritable_folder_is_one_clear_error(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="use another --runs-dir"):
        stages.get_data(replace(small, runs_dir=str(tmp_path / "file")))


@pytest.mark.slow
def test_report_and_final_model(small):
    small = replace(small, curve_prompts=2)
    path = make_report(small)
    results = json.loads((small.run_dir / "results.json").read_text())
    check_results(results)
    assert set(results["models"]) == {"reference", "sft", "dpo"}
    assert set(results["sweep"]) == {"0.5", "5"}
    assert results["models"]["reference"]["metrics"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert results["models"]["dpo"]["metrics"] == results["sweep"]["0.5"]["metrics"]
    gaps = [
        true_reward(pair.prompt, pair.chosen) - true_reward(pair.prompt, pair.rejected)
        for pair in stages.get_data(small).pairs.held_out
    ]
    best = sum(1 / (1 + math.exp(-abs(gap))) for gap in gaps) / 12
    assert results["data"]["accuracy_baselines"]["best possible"] == pytest.approx(best)
    assert 0 < results["data"]["accuracy_baselines"]["longer wins"] < 1
    assert set(results["frontier"]) == {"sft", "β = 0.05", "β = 0.5", "β = 5", "hot"}
    points = results["frontier"]["β = 5"]
    assert [point["step"] for point in points] == [1, 2, 3, 3], "the end twice: of the curve's prompts, and of all"
    assert points[-1]["kl"] == results["sweep"]["5"]["metrics"]["kl"]
    kls = measures.get_values(small, stages.get_dpo(small, 5.0))["kl"]
    assert points[-2]["kl"] == pytest.approx(kls[: small.curve_prompts].mean().item(), rel=1e-6)
    assert points[-2]["kl"] != points[-1]["kl"]
    assert [len(results["frontier"][name]) for name in ("sft", "hot")] == [4, 1], "hot has no curve"
    low, high = results["models"]["dpo"]["intervals"]["true_reward"]
    assert low <= results["models"]["dpo"]["metrics"]["true_reward"] <= high
    for record in (*results["models"].values(), *results["sweep"].values()):
        beta, intervals = record["beta"], record["intervals"]
        assert intervals["chosen_reward"] == pytest.approx([beta * end for end in intervals["chosen_logratio"]])
    gain = results["differences"]["true_reward: dpo - reference"]
    of = {name: results["models"][name]["metrics"]["true_reward"] for name in ("dpo", "reference")}
    assert gain["estimate"] == pytest.approx(of["dpo"] - of["reference"], abs=1e-5)

    page = path.read_text(encoding="utf-8")
    for figure in ("05-reward-kl", "06-beta-sweep", "07-text-measures"):
        assert (small.run_dir / f"figures/{figure}.png").read_bytes()[:4] == b"\x89PNG"
    assert page.count("data:image/png;base64,") == 9
    assert "http://" not in page
    assert "https://" not in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("– (all tie)") == 1, "the reference against itself has no accuracy"
    assert results["models"]["dpo"]["weights_sha256"] in page

    final = outputs.get_final_model(small)
    assert final.name == "dpo_gpt2_model_final"
    card = ModelCard.load(final / "README.md")
    assert card.data.to_dict()["license"] == "mit"
    assert "β = 0.5, loss sigmoid, rmsprop" in card.text
    assert stages.get_dpo(small).weights_sha256 in card.text
    assert str(small.run_dir.parent) not in card.text
    model = GPT2LMHeadModel.from_pretrained(final)
    assert weights_hash(model) == stages.get_dpo(small).weights_sha256


def test_the_schema_refuses_what_it_does_not_know_and_names_it():
    jsonschema.Draft202012Validator.check_schema(results_schema())
    with pytest.raises(ArtefactError, match="does not fit its schema at results: .*'models' is a required property"):
        check_results({"schema_version": 1, "about": {}, "data": {}})


def test_a_model_card_gives_no_local_path_and_renders_no_hostile_name(small, tmp_path):
    from dpo_helpers.evaluation import Evaluation
    from dpo_helpers.run.card import model_card

    (tmp_path / "my-model").mkdir()
    evaluation = {
        name: Evaluation(name, 0.5, {"kl": 0.1, "kl_se": 0.01}, [], {}) for name in ("reference", "sft", "dpo")
    }
    local = replace(small, model=str(tmp_path / "my-model"), dataset=str(tmp_path))
    text = model_card(local, evaluation, "x`<img src=x>`\x1b[31m", "0" * 64)
    assert str(tmp_path) not in text
    assert "`my-model` trained" in text
    assert "`x'<img src=x>'\\x1b[31m`" in text, "in a code span, and its backticks cannot end it"
    assert "base_model" not in text
    hub = replace(small, model="openai-community/gpt2", dataset="Anthropic/hh-rlhf")
    metadata = ModelCard(model_card(hub, evaluation, "x", "0" * 64)).data.to_dict()
    assert (metadata["base_model"], metadata["datasets"]) == ("openai-community/gpt2", ["Anthropic/hh-rlhf"])


def test_the_frozen_blocks_run_once_for_all_stages(small, monkeypatch):
    """Reference, SFT, DPO and the sweep with their scores and curves: each pair meets the frozen blocks once."""
    kept = []
    put = TrunkStore.put

    def counting(store, pair, rows):
        kept.append((id(store), pair))
        put(store, pair, rows)

    monkeypatch.setattr(TrunkStore, "put", counting)
    monkeypatch.setattr(trained, "_FAST", {})
    stages.get_sft(small)
    stages.get_sweep(small)
    data = stages.get_data(small)
    assert len(kept) == len(set(kept)) == len(data.train) + len(data.held_out)
    trained._FAST.clear()  # as the next process, which finds them in the run's folder
    stages.get_dpo_from_sft(small)
    assert len(kept) == len(data.train) + len(data.held_out)
    assert len(list((small.run_dir / FROZEN).iterdir())) == 2
    stages.get_dpo(replace(small, freeze_layers=small.freeze_layers - 1))
    assert len(kept) == 2 * (len(data.train) + len(data.held_out))
    assert len(list((small.run_dir / FROZEN).iterdir())) == 2, "those of other frozen blocks are gone"


def test_what_is_kept_of_frozen_blocks_serves_no_other_model_and_no_other_pairs(small, monkeypatch):
    """Each has the plain path's numbers, whatever was scored before it."""
    monkeypatch.setattr(trained, "_FAST", {})
    small.run_dir.mkdir(parents=True)
    settings, eos = replace(small, freeze_layers=2), SimpleNamespace(eos_token_id=0)
    data = trained.Data(None, pairs(), pairs(seed=1), eos, "one", "")
    cut = replace(data, train=[replace(pair, prompt=pair.prompt[1:]) for pair in data.train])
    other_norms = tiny_gpt2(1)  # the same weights
    other_norms.config.layer_norm_epsilon = 0.5
    for module in other_norms.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.5
    for model, of, part, how in (
        (tiny_gpt2(), data, "train", settings),
        (tiny_gpt2(1), data, "train", settings),
        (other_norms, data, "train", settings),
        (tiny_gpt2(1), data, "held_out", settings),
        (tiny_gpt2(1), replace(data, train=pairs(seed=2), sha256="another"), "train", settings),
        (tiny_gpt2(1), data, "train", settings),
        (tiny_gpt2(1), cut, "train", replace(settings, max_prompt_length=3)),
        (tiny_gpt2(1), data, "train", settings),
        (tiny_gpt2(1), data, "train", replace(settings, freeze_layers=1)),
    ):
        freeze(model, how.freeze_layers)
        found = trained.scorer_of(how, of, model, part)(model, range(10))
        expected = PlainScorer(getattr(of, part), 0)(model, range(10))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert len({id(scorer) for scorer in trained._FAST.values()}) == 1, "of the latest frozen blocks"


def test_what_is_kept_serves_a_model_before_and_after_it_is_saved(small, monkeypatch):
    """Saving writes the kind of model into its configuration, and opening the folder."""
    monkeypatch.setattr(trained, "_FAST", {})
    data = trained.Data(None, pairs(), pairs(seed=1), SimpleNamespace(eos_token_id=0), "one", "")
    found, saved = tiny_gpt2(), tiny_gpt2()
    found.config.architectures, saved.config.architectures = None, ["GPT2LMHeadModel"]
    found.config._name_or_path, saved.config._name_or_path = "a.gguf", "runs/reference"
    settings = replace(small, freeze_layers=2)
    assert trained.scorer_of(settings, data, found, "train") is trained.scorer_of(settings, data, saved, "train")


def test_a_model_of_another_family_takes_the_plain_path_and_says_so_once(small, monkeypatch, capsys):
    monkeypatch.setattr(trained, "_FAST", {})
    trained._say_plain.cache_clear()
    expected = stages.get_dpo(small)
    monkeypatch.setattr(architectures, "FAMILIES", {})
    other = replace(small, runs_dir=str(small.run_dir / "plain"))
    plain = stages.get_dpo(other)
    assert capsys.readouterr().out.count("model type gpt2: the plain path is used") == 1
    losses = [[row["loss"] for row in stage.metrics if row["split"] == "train"] for stage in (expected, plain)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_trainable_embeddings_take_the_plain_path(small, monkeypatch, capsys):
    """The other reading of "8 blocks frozen": their gradient must not be lost."""
    trained._say_plain.cache_clear()
    free = replace(small, freeze_embeddings=False)
    stage = stages.get_dpo(free)
    assert "the embeddings train: the plain path" in capsys.readouterr().out
    moved, start = stage.load().state_dict(), stages.get_reference(free).load().state_dict()
    assert not torch.equal(moved["transformer.wte.weight"], start["transformer.wte.weight"])
