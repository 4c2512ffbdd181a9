from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from test_check import FAMILIES, family
from test_evaluation import Tokens
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from conftest import tiny_gpt2
from dpo_helpers.generation import draw, row_uniforms, sample
from dpo_helpers.run.loading import load_model
from dpo_helpers.settings import load_settings
from dpo_helpers.show.texts import distinct_n, ends_in_a_loop, repeated_share

PROMPTS = [
    "\n\nHuman: How can I grow roses?\n\nAssistant:",
    "\n\nHuman: Hello, I have a question.\n\nAssistant: Yes, please go ahead.\n\nHuman: Why?\n\nAssistant:",
    "\n\nHuman: Hi\n\nAssistant:",
]


class Chain(GPT2LMHeadModel):
    """A model by hand: after token t the next one is drawn from chances[t], whatever came before."""

    def __init__(self, chances):
        super().__init__(GPT2Config(vocab_size=len(chances), n_embd=2, n_layer=1, n_head=1, eos_token_id=0))
        self.log_chances = torch.tensor(chances).log()

    def forward(self, input_ids, **_):
        return CausalLMOutputWithPast(logits=self.log_chances[input_ids])


# of end, a, b after each of them; cumulated: after a 1/4, 1/2, 1, after b 1/2, 1, 1
CHANCES = [[1.0, 0.0, 0.0], [0.25, 0.25, 0.5], [0.5, 0.5, 0.0]]


@pytest.fixture(scope="module")
def model():
    return load_model(load_settings("mini"))


def test_a_draw_by_hand():
    """p = (1/8, 2/8, 5/8), cumulated 1/8, 3/8, 1: u picks the first cumulated value above it."""
    logits = torch.tensor([1.0, 2.0, 5.0]).log().repeat(4, 1)
    assert draw(logits, torch.tensor([0.0, 0.13, 0.38, 0.999], dtype=torch.float64)).tolist() == [0, 1, 2, 2]


def test_temperature_sharpens():
    """Temperature 1/2 squares the probabilities: (1, 4, 25)/30, cumulated 0.033, 0.167, 1; at 0 the largest is taken."""
    logits, u = torch.tensor([[1.0, 2.0, 5.0]]).log().repeat(2, 1), torch.tensor([0.16, 0.17], dtype=torch.float64)
    assert draw(logits, u, 0.5).tolist() == [1, 2]
    assert draw(logits, u, 0.0).tolist() == [2, 2]


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    for u in (0.0, 0.5, 1 - 1e-16):
        assert draw(logits, torch.tensor([u], dtype=torch.float64)).item() == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_likeliest_tokens_are_those_of_generate(monkeypatch, name):
    """Prompts of other lengths, one of them twice; rows end at other times and leave."""
    model, ids = family(name, **FAMILIES[name]), {"a": [7, 8, 9], "b": [10, 11, 12, 13, 14, 15, 16], "c": [17]}
    monkeypatch.setattr("dpo_helpers.generation.encode_prompts", lambda _, prompts, most: [ids[p] for p in prompts])
    prompts, length = ["a", "b", "c", "a"], 7
    eos = model.generate(torch.tensor([ids["c"]]), max_new_tokens=4, do_sample=False)[0, -1].item()  # soon comes
    padded = torch.tensor([[eos] * (length - len(ids[p])) + ids[p] for p in prompts])
    mask = torch.tensor([[0] * (length - len(ids[p])) + [1] * len(ids[p]) for p in prompts])
    plain = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    expected = model.generate(padded, attention_mask=mask, generation_config=plain)[:, length:].tolist()
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in expected]
    tokens = SimpleNamespace(eos_token_id=eos, decode=str)
    for batch_size in (1, 3, 4):
        found = sample(model, tokens, prompts, max_new_tokens=12, temperature=0.0, batch_size=batch_size)
        assert [r.ids for r in found] == expected


def test_a_prompt_that_comes_several_times_is_run_once():
    """Five samples of one prompt and three of another: the first pass has two rows."""
    model, rows = tiny_gpt2(vocab=27), []
    model.register_forward_pre_hook(lambda _, args, run: rows.append(len(run["input_ids"])), with_kwargs=True)
    found = sample(model, Tokens(), ["ab"] * 5 + ["cde"] * 3, max_new_tokens=6)
    assert rows[0] == 2
    assert max(rows[1:]) <= 8
    assert len({tuple(r.ids) for r in found[:5]}) > 1, "each has numbers of its own"
    alone = [sample(model, Tokens(), ["", *["ab"] * n], max_new_tokens=6)[-1] for n in (1, 2)]
    assert alone[0].ids == found[1].ids
    assert alone[1].ids == found[2].ids


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_tokens_are_those_that_the_uniforms_pick(monkeypatch, batch_size):
    """What counts is the prompts' last token, a, b, a.

    After a 0.3 → a, 0.9 → b, 0.6 → a, 0.1 → end; after b 0.6 → a, 0.6 → b, 0.2 → end; after a 0.6 → b, 0.4 → end.
    """
    uniforms = [[0.3, 0.9, 0.6, 0.1], [0.6, 0.6, 0.2, 0.9], [0.6, 0.4, 0.9, 0.9]]
    monkeypatch.setattr(
        "dpo_helpers.generation.row_uniforms", lambda i, steps, seed: torch.tensor(uniforms[i], dtype=torch.float64)
    )
    prompts = ["aba", "b", "bbba"]
    found = sample(Chain(CHANCES), Tokens(), prompts, max_new_tokens=4, batch_size=batch_size)
    assert [(r.ids, r.text, r.ended) for r in found] == [
        ([1, 2, 1, 0], "aba", True),
        ([1, 2, 0], "ab", True),
        ([2, 0], "b", True),
    ]


def test_no_token_is_out_of_reach(monkeypatch):
    """40 tokens, the k-th with k/820, cumulated k(k + 1)/1640: k²/1640 picks it, so none is cut off as too unlikely."""
    monkeypatch.setattr(
        "dpo_helpers.generation.row_uniforms",
        lambda i, steps, seed: torch.tensor([(i + 1) ** 2 / 1640], dtype=torch.float64),
    )
    model = Chain([[k / 820 for k in range(1, 41)]] * 40)
    found = sample(model, Tokens(), ["a"] * 40, max_new_tokens=1)
    assert [r.ids for r in found] == [[k] for k in range(40)]


def test_a_long_prompt_keeps_its_last_tokens():
    model, how = tiny_gpt2(vocab=27), {"max_new_tokens": 12}
    (cut,) = sample(model, Tokens(), ["xyzabc"], max_prompt_length=3, **how)
    assert cut.ids == sample(model, Tokens(), ["abc"], **how)[0].ids
    assert cut.ids != sample(model, Tokens(), ["xyzabc"], **how)[0].ids
    assert cut.prompt == "xyzabc"


HOSTILE = {
    "repetition_penalty": 1.3, "encoder_repetition_penalty": 1.3, "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[15]], "suppress_tokens": [15], "begin_suppress_tokens": [15],
    "sequence_bias": [[[15], -9.0]], "min_length": 30, "min_new_tokens": 20, "forced_bos_token_id": 5,
    "forced_eos_token_id": 0, "exponential_decay_length_penalty": (1, 3.0), "guidance_scale": 3.0,
    "watermarking_config": {"bias": 9.0}, "do_sample": True, "temperature": 5.0, "top_k": 1, "top_p": 0.1, "min_p": 0.9,
    "typical_p": 0.1, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "num_beams": 3, "num_return_sequences": 2,
    "eos_token_id": [0, 15], "max_length": 4, "max_new_tokens": 1, "max_time": 1e-9, "stop_strings": ["o"],
    "prompt_lookup_num_tokens": 2, "return_dict_in_generate": True, "cache_implementation": "static",
}  # fmt: skip


@pytest.mark.parametrize("option", HOSTILE)
def test_no_default_of_the_model_changes_a_sample(option):
    """What a generation_config.json may hold, one at a time, sampled and greedy; the model keeps it."""
    own, hostile = tiny_gpt2(vocab=27), tiny_gpt2(vocab=27)
    hostile.generation_config = GenerationConfig(**{"do_sample": True, option: HOSTILE[option]})
    before = hostile.generation_config.to_dict()
    for temperature in (1.0, 0.0):
        found, expected = (
            sample(m, Tokens(), ["a", "bcd"] * 4, max_new_tokens=20, temperature=temperature, batch_size=4)
            for m in (hostile, own)
        )
        assert [r.ids for r in found] == [r.ids for r in expected]
    assert hostile.generation_config.to_dict() == before


def test_frequencies_are_the_models_probabilities_whatever_its_own_defaults():
    """4,000 samples of two tokens after a, within 4 standard errors: of each response, and of neighbours' first tokens."""
    model, n = Chain(CHANCES), 4000
    model.generation_config = GenerationConfig(
        repetition_penalty=1.3, no_repeat_ngram_size=1, bad_words_ids=[[1]], min_new_tokens=2, do_sample=True, top_k=2
    )
    found = sample(model, Tokens(), ["a"] * n, max_new_tokens=2, batch_size=n)
    responses = {(0,): 1 / 4, (1, 0): 1 / 16, (1, 1): 1 / 16, (1, 2): 1 / 8, (2, 0): 1 / 4, (2, 1): 1 / 4}
    first = dict(enumerate(CHANCES[1]))
    neighbours = {(a, b): first[a] * first[b] for a in first for b in first}
    for draws, chances in (
        ([tuple(r.ids) for r in found], responses),
        ([(a.ids[0], b.ids[0]) for a, b in zip(found[::2], found[1::2], strict=True)], neighbours),
    ):
        counts = Counter(draws)
        assert set(counts) == set(chances)
        for outcome, p in chances.items():
            assert abs(counts[outcome] / len(draws) - p) < 4 * (p * (1 - p) / len(draws)) ** 0.5, outcome


def test_samples_do_not_depend_on_the_batch(model, tokenizer, cpu):
    settings = {"max_new_tokens": 12, "seed": 3}
    together = sample(model, tokenizer, PROMPTS, **settings)
    one_by_one = sample(model, tokenizer, PROMPTS, batch_size=1, **settings)
    assert [r.ids for r in together] == [r.ids for r in one_by_one]
    assert [r.prompt for r in together] == PROMPTS
    torch.manual_seed(5)
    assert [r.ids for r in sample(model, tokenizer, PROMPTS, **settings)] == [r.ids for r in together]
    other = sample(model, tokenizer, PROMPTS, max_new_tokens=12, seed=4)
    assert [r.ids for r in other] != [r.ids for r in together]


def test_greedy_is_the_likeliest_token_each_time(model, tokenizer, cpu):
    (greedy,) = sample(model, tokenizer, PROMPTS[:1], max_new_tokens=6, temperature=0)
    ids = tokenizer.encode(PROMPTS[0])
    for token in greedy.ids:
        with torch.no_grad():
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(token)


def test_an_ended_response_keeps_one_end_of_text_and_no_text_of_it(model, tokenizer, cpu):
    responses = sample(model, tokenizer, PROMPTS, max_new_tokens=60)
    for response in responses:
        assert response.ended == (response.ids[-1] == tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in response.ids[:-1]
        assert "<|endoftext|>" not in response.text
    assert any(response.ended for response in responses)
    (cut,) = sample(model, tokenizer, PROMPTS[:1], max_new_tokens=2)
    assert (len(cut.ids), cut.ended) == (2, False)


def test_uniforms_are_a_function_of_seed_and_row():
    assert torch.equal(row_uniforms(3, 5, seed=1), row_uniforms(3, 5, seed=1))
    assert not torch.equal(row_uniforms(3, 5, seed=1), row_uniforms(4, 5, seed=1))
    assert torch.equal(row_uniforms(3, 9, seed=1)[:5], row_uniforms(3, 5, seed=1))


def test_text_measures_by_hand():
    # a b, b a, a b, b c: three different of four; trigrams aba bab(?): "a b a", "b a b", "a b c", none repeats
    assert distinct_n(["a b a b c"], 2) == 0.75
    assert repeated_share("a b a b c", 3) == 0.0
    # trigrams of "x y z x y z": xyz yzx zxy xyz: one of four repeats
    assert repeated_share("x y z x y z", 3) == 0.25
    assert repeated_share("too short", 3) == 0.0


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("Also water it. Also water it. Also water it.", True),
        ("no no no", True),
        ("First we plant. then then then", True),
        ("Also water it. Also water it.", False),
        ("then then then we plant.", False),  # it loops, and then goes on
        ("You can water them in a sunny bed.", False),
        ("", False),
    ],
)
def test_ends_in_a_loop(text, loops):
    assert ends_in_a_loop(text) is loops
