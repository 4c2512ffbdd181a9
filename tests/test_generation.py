import pytest
import torch

from dpo_helpers.generation import _InverseTransform, row_uniforms, sample
from dpo_helpers.run.loading import load_model
from dpo_helpers.settings import load_settings
from dpo_helpers.show.texts import distinct_n, ends_in_a_loop, repeated_share

PROMPTS = [
    "\n\nHuman: How can I grow roses?\n\nAssistant:",
    "\n\nHuman: Hello, I have a question.\n\nAssistant: Yes, please go ahead.\n\nHuman: Why?\n\nAssistant:",
    "\n\nHuman: Hi\n\nAssistant:",
]


@pytest.fixture(scope="module")
def model():
    return load_model(load_settings("mini"))


def test_inverse_transform_literals():
    """p = (1/8, 2/8, 5/8), cumulated 1/8, 3/8, 1: u picks the first cumulated value above it."""
    scores = torch.tensor([1.0, 2.0, 5.0]).log().repeat(4, 1)
    uniforms = torch.tensor([[0.0], [0.13], [0.38], [0.999]], dtype=torch.float64)
    picked = _InverseTransform(uniforms, 1.0)(torch.zeros(4, 0), scores).argmax(dim=-1)
    assert picked.tolist() == [0, 1, 2, 2]


def test_temperature_sharpens():
    """Temperature 1/2 squares the probabilities: (1, 4, 25)/30, cumulated 0.033, 0.167, 1."""
    scores = torch.tensor([[1.0, 2.0, 5.0]]).log().repeat(2, 1)
    uniforms = torch.tensor([[0.16], [0.17]], dtype=torch.float64)
    assert _InverseTransform(uniforms, 0.5)(torch.zeros(2, 0), scores).argmax(dim=-1).tolist() == [1, 2]


def test_a_token_without_probability_is_never_picked():
    scores = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    for u in (0.0, 0.5, 1 - 1e-16):
        uniforms = torch.tensor([[u]], dtype=torch.float64)
        assert _InverseTransform(uniforms, 1.0)(torch.zeros(1, 0), scores).argmax().item() == 1


def test_samples_do_not_depend_on_the_batch(model, tokenizer, cpu):
    settings = {"max_new_tokens": 12, "compute": cpu, "seed": 3}
    together = sample(model, tokenizer, PROMPTS, **settings)
    one_by_one = sample(model, tokenizer, PROMPTS, batch_size=1, **settings)
    assert [r.ids for r in together] == [r.ids for r in one_by_one]
    assert [r.prompt for r in together] == PROMPTS
    torch.manual_seed(5)
    assert [r.ids for r in sample(model, tokenizer, PROMPTS, **settings)] == [r.ids for r in together]
    other = sample(model, tokenizer, PROMPTS, max_new_tokens=12, compute=cpu, seed=4)
    assert [r.ids for r in other] != [r.ids for r in together]


def test_greedy_is_the_likeliest_token_each_time(model, tokenizer, cpu):
    (greedy,) = sample(model, tokenizer, PROMPTS[:1], max_new_tokens=6, compute=cpu, temperature=0)
    ids = tokenizer.encode(PROMPTS[0])
    for token in greedy.ids:
        with torch.no_grad():
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(token)


def test_an_ended_response_keeps_one_end_of_text_and_no_text_of_it(model, tokenizer, cpu):
    responses = sample(model, tokenizer, PROMPTS, max_new_tokens=60, compute=cpu)
    for response in responses:
        assert response.ended == (response.ids[-1] == tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in response.ids[:-1]
        assert "<|endoftext|>" not in response.text
    assert any(response.ended for response in responses)
    (cut,) = sample(model, tokenizer, PROMPTS[:1], max_new_tokens=2, compute=cpu)
    assert (len(cut.ids), cut.ended) == (2, False)


def test_the_sampler_has_the_models_distribution(model, tokenizer, cpu):
    """First tokens of 400 samples of one prompt: the likeliest token's frequency within 4 standard errors."""
    prompt = PROMPTS[0]
    with torch.no_grad():
        p = model(torch.tensor([tokenizer.encode(prompt)])).logits[0, -1].softmax(-1)
    top = p.argmax().item()
    first = [r.ids[0] for r in sample(model, tokenizer, [prompt] * 400, max_new_tokens=1, compute=cpu, batch_size=400)]
    error = (p[top] * (1 - p[top]) / 400).sqrt().item()
    assert abs(first.count(top) / 400 - p[top].item()) < 4 * error


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
