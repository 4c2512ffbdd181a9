"""The final model as others get it: in transformers' pipeline, in TRL, and its card as the Hub reads it."""

import json
import math
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from test_hub import run as run_online
from test_training import scored
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.pipelines import SUPPORTED_TASKS

from conftest import SMALL
from dpo_helpers.evaluation import Evaluation, pair_values
from dpo_helpers.generation import sample
from dpo_helpers.hh import single_turn
from dpo_helpers.run import outputs, stages
from dpo_helpers.run.card import model_card
from dpo_helpers.settings import load_settings

STEPS = 24
PROMPTS = [single_turn(question) for question in outputs.WORLD_PROMPTS]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """At ten times the rate, so that the policy says something else than the reference."""
    return load_settings("mini", runs_dir=str(tmp_path_factory.mktemp("runs")), **SMALL, learning_rate=5e-3)


@pytest.fixture(scope="module")
def final(settings):
    return outputs.get_final_model(settings)


def test_the_pipeline_writes_what_our_sampler_and_the_argmax_do(settings, final, cpu):
    """Three ways to the same tokens: transformers' generation from the folder, our sampler on the model that was trained,
    and the likeliest token of a whole pass without a cache, again and again."""
    opened = pipeline("text-generation", model=str(final))
    tokenizer = AutoTokenizer.from_pretrained(final)

    def greedy(model):
        return sample(
            model.load(cpu), stages.get_data(settings).tokenizer, PROMPTS, max_new_tokens=STEPS, temperature=0.0,
        )  # fmt: skip

    ours = greedy(stages.get_dpo(settings))
    assert [r.text for r in ours] != [r.text for r in greedy(stages.get_base(settings))], "or any model would do"
    model = AutoModelForCausalLM.from_pretrained(final)
    for prompt, response in zip(PROMPTS, ours, strict=True):
        start = tokenizer(prompt)["input_ids"]
        (got,) = opened(prompt, do_sample=False, max_new_tokens=STEPS, return_tensors=True)
        assert got["generated_token_ids"] == start + response.ids
        (text,) = opened(prompt, do_sample=False, max_new_tokens=STEPS, return_full_text=False)
        assert text["generated_text"] == response.text
        ids = list(start)
        with torch.inference_mode():
            for _ in response.ids:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids == start + response.ids


def first_loss(settings, folder, policy, reference):
    """TRL's loss of all training pairs before its first update."""
    trl = pytest.importorskip("trl", reason="TRL needs Python 3.11 or later")
    from datasets import Dataset

    losses = []

    class Recorder(trl.DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    train = stages.get_data(settings).pairs.train
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in train]
    options = trl.DPOConfig(
        output_dir=str(folder), beta=settings.beta, max_steps=1, per_device_train_batch_size=len(rows), max_length=None,
        bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Recorder(policy, reference, options, train_dataset=Dataset.from_list(rows)).train()
    return losses[0]


@pytest.mark.parametrize("policy", ["path", "model"])
@pytest.mark.parametrize("reference", ["none", "model"])
def test_trl_takes_it_as_policy_and_as_reference(settings, final, tmp_path, policy, reference):
    """The tokenizer is found by the folder's name. Where no reference is given, TRL opens the policy's folder again."""
    given = str(final) if policy == "path" else AutoModelForCausalLM.from_pretrained(final)
    other = AutoModelForCausalLM.from_pretrained(final) if reference == "model" else None
    assert first_loss(settings, tmp_path, given, other) == pytest.approx(math.log(2), abs=1e-6)


def test_trl_measures_it_against_the_reference_as_we_do(settings, final, tmp_path, cpu):
    """The mean loss of the training pairs, from the folder in TRL and from our own scores of them."""
    train = stages.get_data(settings).train
    policy, base = (scored(m.load(cpu), train, cpu) for m in (stages.get_dpo(settings), stages.get_reference(settings)))
    ours = pair_values(policy, base, settings.beta)["loss"].mean().item()
    assert abs(ours - math.log(2)) > 0.01
    start = AutoModelForCausalLM.from_pretrained(settings.run_dir / "reference")
    assert first_loss(settings, tmp_path, str(final), start) == pytest.approx(ours, abs=1e-5)


# What a card of this package may say, of the lists that the Hub's documentation gives: licences, libraries. Its names of
# tasks are those of transformers' pipelines; a language is its ISO 639 code.
LICENSES, LIBRARIES = {"mit", "apache-2.0"}, {"transformers"}


def problems(metadata):
    """What the Hub would refuse, as far as that is known without it, and what no rule here is about."""

    def is_id(name):
        try:
            validate_repo_id(name)
        except HFValidationError:
            return False
        return isinstance(name, str)

    rules = {
        "license": lambda x: x in LICENSES,
        "language": lambda x: re.fullmatch("[a-z]{2,3}", x),
        "library_name": lambda x: x in LIBRARIES,
        "pipeline_tag": lambda x: x in SUPPORTED_TASKS,
        "tags": lambda xs: isinstance(xs, list) and all(isinstance(x, str) and x for x in xs) and len({*xs}) == len(xs),
        "base_model": is_id,
        "datasets": lambda xs: isinstance(xs, list) and all(map(is_id, xs)),
    }
    return [key for key, value in metadata.items() if key not in rules or not rules[key](value)]


SAID = {
    "library_name": "transformers", "pipeline_tag": "text-generation",
    "tags": ["dpo", "preference-optimization", "course"],
}  # fmt: skip
GPT2 = {"license": "mit", "base_model": "openai-community/gpt2"}
CARDS = {
    "embedded": ({}, {"license": "mit", "language": "en"}),
    "the study's": ({"model": "openai-community/gpt2", "dataset": "Anthropic/hh-rlhf"},
                    {**GPT2, "language": "en", "datasets": ["Anthropic/hh-rlhf"]}),
    "another data set of the Hub": ({"model": "openai-community/gpt2", "dataset": "some/pairs"},
                                    {**GPT2, "datasets": ["some/pairs"]}),
    "another model of the Hub": ({"model": "some/model"}, {"base_model": "some/model", "language": "en"}),
    "a model and data of one's own": ({"model": "my/model", "dataset": "Anthropic/hh-rlhf"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", CARDS)
def test_what_a_card_says_of_itself_is_known_to_the_hub(kind, tmp_path, monkeypatch):
    """A licence where it is known, names where they are the Hub's: a folder may be called like a data set of the Hub."""
    changed, more = CARDS[kind]
    if not more:
        monkeypatch.chdir(tmp_path)
        for name in changed.values():
            (tmp_path / name).mkdir(parents=True)
    measured = {name: Evaluation(name, 0.5, {"kl": 0.1}, [], {}) for name in ("reference", "sft", "dpo")}
    text = model_card(replace(load_settings("mini"), **changed), measured, "x", "0" * 64)
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == SAID | more
    assert card.data.eval_results is None, "its numbers are of no benchmark that the Hub knows"
    assert problems(card.data.to_dict()) == []


BROKEN = {
    "license": "MIT", "language": "English", "library_name": "Transformers", "pipeline_tag": "chat", "tags": [1],
    "base_model": "/home/me/model", "datasets": ["the embedded world"], "made_with": "love",
}  # fmt: skip


@pytest.fixture
def hub():
    """Stands in for the Hub's check of metadata: keeps what is posted to it, refuses with what `problems` finds."""

    class Handler(BaseHTTPRequestHandler):
        posted: list[tuple[str, dict]] = []

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.posted.append((self.path, body))
            found = problems(ModelCard(body["content"]).data.to_dict())
            answer = f"not valid: {', '.join(found)}".encode() if found else b"{}"
            self.send_response(400 if found else 200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


VALIDATED = """
import sys
from huggingface_hub import ModelCard
for path in sys.argv[1:]:
    try:
        ModelCard.load(path).validate()
        print("valid")
    except ValueError as error:
        print(error)
"""


def test_the_final_model_s_card_passes_validation(final, hub, tmp_path):
    """`validate` posts the card to the Hub, here to a stand-in; what it gets is the file, to the last character."""
    written = (final / "README.md").read_text(encoding="utf-8")
    paths = [final / "README.md"]
    for key, value in BROKEN.items():
        card = ModelCard(written)
        card.data[key] = value
        paths.append(tmp_path / f"{key}.md")
        card.save(paths[-1])
    result = run_online(tmp_path, VALIDATED, *map(str, paths), HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines() == ["valid", *(f"not valid: {key}" for key in BROKEN)]
    assert hub.RequestHandlerClass.posted[0] == ("/api/validate-yaml", {"repoType": "model", "content": written})
