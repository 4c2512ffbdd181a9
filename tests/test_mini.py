"""The embedded world: a seed names the same data everywhere, and its reward is what its docstring says."""

import math

import pytest

from dpo_helpers.hh import HUMAN
from dpo_helpers.run.disk import json_hash
from dpo_helpers.run.pairs import parse_rows
from dpo_helpers.worlds import embedded
from dpo_helpers.worlds.embedded import MIXTURE, _pick_kind

ASKED = "\n\nHuman: How can I grow roses?\n\nAssistant:"
PARIS = "\n\nHuman: What are some fun things to do in Paris?\n\nAssistant:"


def test_the_seed_names_the_data():
    """Literal hashes: if they change, so do all numbers in the notebooks, and the embedded model must be rebuilt."""
    assert json_hash(embedded.preference_rows("train", 50))[:16] == "13221e92a43c5cbf"
    assert json_hash(embedded.preference_rows("test", 50))[:16] == "1609ba219af16681"
    assert json_hash(embedded.pretraining_texts(50))[:16] == "7903a93bc063b330"
    assert embedded.preference_rows("train", 5, seed=1) != embedded.preference_rows("train", 5, seed=0)


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        # one tip, courtesy
        (ASKED, " You can plant them in a sunny bed. Good luck!", {"tips": 1, "courtesy": 1}),
        # the topic is named: 0.5
        (ASKED, " Here is some advice on growing roses.", {"on_topic": 1}),
        # four tips count as three
        (
            ASKED,
            " plant them in a sunny bed. cut the dead wood in spring. feed them with old manure. "
            "check the leaves for insects.",
            {"tips": 3},
        ),
        # a tip of another topic
        (ASKED, " You can bake it on a stone.", {"off_topic_tips": 1}),
        (ASKED, " It depends. It is hard to say. Maybe try a few things.", {"vague": 2}),
        (ASKED, " Look it up yourself. I do not care about growing roses.", {"dismissive": 2, "on_topic": 1}),
        # capital letters in a tip do not hide it
        (PARIS, " You can climb the Eiffel Tower at sunset.", {"tips": 1}),
        (ASKED, " It depends", {"vague": 0, "unfinished": 1}),
        (ASKED, "", {"unknown_words": 1.0, "unfinished": 1}),
        # three words, one of them not of this world
        (ASKED, " You can zxqv.", {"unknown_words": 1 / 3}),
        # words a b c a b c a b c: trigrams abc bca cab abc bca cab abc, 3 different of 7
        (ASKED, " you can do you can do you can do.", {"looping": 4 / 7}),
    ],
)
def test_features_and_reward(prompt, answer, expected):
    got = embedded.features(prompt, answer)
    for name in (
        "tips",
        "on_topic",
        "courtesy",
        "off_topic_tips",
        "vague",
        "dismissive",
        "unknown_words",
        "unfinished",
    ):
        assert getattr(got, name) == pytest.approx(expected.get(name, 0)), name
    if "looping" in expected:
        assert got.looping == pytest.approx(expected["looping"])


def test_reward_literals():
    assert embedded.true_reward(ASKED, " You can plant them in a sunny bed. Good luck!") == pytest.approx(1.0 + 0.8)
    assert embedded.true_reward(ASKED, " It depends.") == pytest.approx(-1.5)
    assert embedded.true_reward(ASKED, " Look it up yourself.") == pytest.approx(-2.0)
    assert embedded.true_reward(ASKED, "") == pytest.approx(-4.0 - 1.0)


def test_a_tip_that_the_dialogue_already_gave_earns_nothing():
    prompt = ASKED + " You can plant them in a sunny bed.\n\nHuman: And what else?\n\nAssistant:"
    assert embedded.features(prompt, " You can plant them in a sunny bed.").tips == 0
    assert embedded.features(prompt, " You can feed them with old manure.").tips == 1


def test_the_last_topic_named_is_the_one_asked_about():
    assert embedded.find_topic(ASKED).name == "growing roses"
    assert embedded.find_topic(PARIS).name == "a day in Paris"
    assert embedded.find_topic("\n\nHuman: Hello\n\nAssistant:") is None


def test_best_possible_accuracy_literal():
    """Gaps 0 and ln 3: max(1/2, 1/2) and max(3/4, 1/4), mean 0.625; the sign does not matter."""
    assert embedded.best_possible_accuracy([0.0, -math.log(3)]) == pytest.approx(0.625)


def test_held_out_topics_never_occur_in_training():
    rows = embedded.preference_rows("train", 3600)
    held_out = [topic for topic in embedded.TOPICS if topic.split == "test"]
    for row in rows:
        topic = embedded.find_topic(row["chosen"].rpartition("\n\nAssistant:")[0] + "\n\nAssistant:")
        assert topic.split == "train"
        for text in row.values():
            prompt = text.rpartition("\n\nAssistant:")[0]
            assert not any(other.name in prompt or other.ask in prompt for other in held_out), text


def test_size_and_form_of_the_world():
    train, test = embedded.preference_rows("train", 3600), embedded.preference_rows("test", 480)
    assert len([t for t in embedded.TOPICS if t.split == "train"]) >= 60
    assert len([t for t in embedded.TOPICS if t.split == "test"]) == 12
    assert all(len(set(topic.tips)) == 4 for topic in embedded.TOPICS)
    for rows in (train, test):
        pairs, dropped = parse_rows(rows)
        assert not dropped
        several = sum(p.prompt.count(HUMAN) > 1 for p in pairs) / len(pairs)
        assert 0.2 < several < 0.4


def test_preferences_follow_bradley_terry():
    """Over 3,600 pairs, chosen wins as often as the rewards say: the expected share within 4 standard errors."""
    pairs, _ = parse_rows(embedded.preference_rows("train", 3600))
    gaps = [embedded.true_reward(p.prompt, p.chosen) - embedded.true_reward(p.prompt, p.rejected) for p in pairs]
    better = sum(gap > 0 for gap in gaps) / sum(gap != 0 for gap in gaps)
    untied = [gap for gap in gaps if gap != 0]
    expected = embedded.best_possible_accuracy(untied)
    assert abs(better - expected) < 4 * math.sqrt(expected * (1 - expected) / len(untied))


def test_mixture_shares_sum_to_one():
    assert sum(share for _, share in MIXTURE) == pytest.approx(1)
    assert (_pick_kind(0.0), _pick_kind(0.5), _pick_kind(1 - 1e-17)) == ("helpful", "vague", "looping")


def test_sampling_prompts_are_about_held_out_topics_only():
    prompts = embedded.sampling_prompts(24)
    assert {embedded.find_topic(p).split for p in prompts} == {"test"}
    assert len({embedded.find_topic(p).name for p in prompts}) == 12


def test_the_embedded_model_is_small_and_a_gpt2_of_12_blocks():
    from importlib.resources import files

    from dpo_helpers.models import blocks
    from dpo_helpers.run.loading import load_model
    from dpo_helpers.settings import load_settings

    assert len(files("dpo_helpers.worlds").joinpath("mini/model/model.safetensors").read_bytes()) <= 8_000_000
    model = load_model(load_settings("mini"))
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert len(blocks(model)) == 12
    assert next(model.parameters()).dtype.itemsize == 4


@pytest.mark.slow
def test_the_rebuild_command_trains_and_saves(tmp_path):
    """One short epoch: the loss falls well below that of guessing (ln of the vocabulary), and the model opens."""
    from dpo_helpers.run.loading import load_model, load_tokenizer
    from dpo_helpers.settings import load_settings
    from dpo_helpers.tools.pretrain import build_mini

    loss = build_mini(
        tmp_path / "m", n_texts=960, epochs=2, batch_size=16, width=48, blocks=2, learning_rate=5e-3, say=lambda _: None
    )
    settings = load_settings("mini", model=str(tmp_path / "m"))
    assert loss < 0.75 * math.log(load_model(settings).config.vocab_size)
    tokenizer = load_tokenizer(settings)
    assert tokenizer.decode(tokenizer.encode("\n\nHuman: Hi")) == "\n\nHuman: Hi"
