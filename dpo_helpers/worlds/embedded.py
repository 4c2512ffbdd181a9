"""A small preference world with a known reward, in the format of HH-RLHF.

People ask about everyday topics; answers differ in how helpful they are. The reward of an answer is a
sum over features that anyone can count (`features`, `WEIGHTS`), so the *true* reward of any text, also
of a generated one, is known. Preferences are drawn from it by Bradley-Terry, so the best accuracy that
any judge can reach on them is known too (`best_possible_accuracy`).

Both answers of a pair come from one unranked mixture of good and bad answers (`sample_answer`). The
embedded GPT-2 was pre-trained on that same mixture (`pretraining_texts`), over all topics, as GPT-2 has
read about Paris before it is asked; no prompt of the training split is about a held-out topic (but
its off-topic answers may give such a topic's tips).

Everything random is drawn with `random.Random(...).random()` alone, whose stream Python keeps stable
between versions, so a seed names the same data everywhere (a test holds its hash).
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TypeVar

T = TypeVar("T")

# Sentences of the world. {ask} is what one wants to do, {name} its short name, {tip} one piece of advice.
QUESTIONS = (
    "How can I {ask}?",
    "What is a good way to {ask}?",
    "I want to {ask}. Where do I start?",
    "Can you help me {ask}?",
    "What should I know about {name}?",
    "Do you have any advice on {name}?",
    "I would like to {ask}. What do you suggest?",
    "My sister asked me about {name}. What should I tell her?",
)
GREETINGS = (
    ("Hello, I have a question.", "Hello! What would you like to know?"),
    ("Hi there, do you have a minute?", "Yes, please go ahead."),
)
FOLLOW_UPS = ("Thank you. What else can I do?", "That is a start. What comes next?", "And what else?")
OPENERS = ("Great question!", "I am happy to help.", "Sure, I can help with that.", "What a nice idea!")
CLOSERS = ("I hope this helps.", "Good luck!", "Enjoy it!", "Please tell me how it goes.")
NAMINGS = ("When it comes to {name}, here is what works.", "Here is some advice on {name}.")
FIRST_TIPS = ("To start, {tip}.", "You can {tip}.", "I would {tip}.", "Try this: {tip}.")
NEXT_TIPS = ("Then {tip}.", "Also, {tip}.", "After that, {tip}.", "It is wise to {tip}.")
VAGUE = (
    "It depends.",
    "There are many ways to do it.",
    "Just do what feels right.",
    "Some people say one thing and some say another.",
    "It is hard to say.",
    "Maybe try a few things.",
)
DISMISSIVE = (
    "That is a silly question.",
    "Look it up yourself.",
    "I do not care about {name}.",
    "Why would anyone want to know that?",
    "This is not my problem.",
    "You will fail anyway.",
)

# Reward of one unit of each feature, in Bradley-Terry's units (a difference of 1 wins 73 times in 100).
WEIGHTS = {
    "tips": 1.0,
    "on_topic": 0.5,
    "courtesy": 0.8,
    "off_topic_tips": -0.3,
    "vague": -1.5,
    "dismissive": -2.0,
    "looping": -3.0,
    "unknown_words": -4.0,
    "unfinished": -1.0,
}
MAX_TIPS = 3  # more advice than this earns nothing: the reward saturates, a policy that pads gains nothing
MAX_FAULTS = 2  # vague, dismissive and off-topic sentences are counted up to this many

# The unranked mixture: share of each kind of answer.
MIXTURE = (("helpful", 0.40), ("vague", 0.19), ("dismissive", 0.17), ("off_topic", 0.08), ("looping", 0.16))


@dataclass(frozen=True)
class Topic:
    """One thing people ask about: split ("train" or "test"), names, four tips, its own question if any."""

    split: str
    ask: str
    name: str
    tips: tuple[str, ...]
    question: str | None = None


def _read_topics() -> tuple[Topic, ...]:
    topics = []
    for line in files(__package__).joinpath("mini/topics.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            split, ask, name, tips, *own = (part.strip() for part in line.split("|"))
            topics.append(Topic(split, ask, name, tuple(t.strip() for t in tips.split(";")), own[0] if own else None))
    return tuple(topics)


TOPICS: tuple[Topic, ...] = _read_topics()


@dataclass(frozen=True)
class Features:
    """What the true reward counts in an answer.

    tips, off_topic_tips, vague, dismissive: counts up to their caps; on_topic, courtesy, unfinished: 0 or 1;
    looping: share of word 3-grams that repeat an earlier one; unknown_words: share of words that the world
    does not have (both in 0..1).
    """

    tips: int
    on_topic: int
    courtesy: int
    off_topic_tips: int
    vague: int
    dismissive: int
    looping: float
    unknown_words: float
    unfinished: int

    def reward(self) -> float:
        """The true reward: the weighted sum of the features."""
        return float(sum(weight * getattr(self, name) for name, weight in WEIGHTS.items()))


@cache
def fingerprint() -> str:
    """sha256 over the embedded world and model as they are installed: it changes when any of them does."""
    digest = hashlib.sha256()
    root = files(__package__)
    model = [f"mini/model/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json")]
    for name in ("embedded.py", "mini/topics.txt", *model):
        digest.update(root.joinpath(name).read_bytes())
    return digest.hexdigest()


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


@cache
def _lexicon() -> frozenset[str]:
    sentences = [*QUESTIONS, *FOLLOW_UPS, *OPENERS, *CLOSERS, *NAMINGS, *FIRST_TIPS, *NEXT_TIPS, *VAGUE, *DISMISSIVE]
    sentences += [line for greeting in GREETINGS for line in greeting]
    for topic in TOPICS:
        sentences += [topic.ask, topic.name, topic.question or "", *topic.tips]
    return frozenset(word for sentence in sentences for word in _words(re.sub(r"\{\w+\}", "", sentence)))


@cache
def _dismissive_sentences() -> tuple[str, ...]:
    plain = [s.lower() for s in DISMISSIVE if "{" not in s]
    return (*plain, "i do not care about")


def find_topic(prompt: str) -> Topic | None:
    """The topic that a prompt asks about: the one named last in it; None if it names none."""
    text = prompt.lower()

    def last_mention(topic: Topic) -> int:
        return max(text.rfind(n.lower()) for n in (topic.ask, topic.name, topic.question or topic.ask))

    best = max(TOPICS, key=last_mention)
    return best if last_mention(best) >= 0 else None


def features(prompt: str, response: str) -> Features:
    """Count what the true reward is made of.

    prompt: HH text up to and including the last "Assistant:"; response: the answer after it, any text.
    A tip that the prompt already gave does not count again. Without a known topic every tip is off topic.
    """
    topic = find_topic(prompt)
    text, asked = response.lower(), prompt.lower()
    own = {tip for tip in topic.tips if tip.lower() in text and tip.lower() not in asked} if topic else set()
    others = {tip for other in TOPICS if other is not topic for tip in other.tips if tip.lower() in text}
    words = _words(response)
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    known = sum(word in _lexicon() for word in words)
    return Features(
        tips=min(len(own), MAX_TIPS),
        on_topic=int(topic is not None and (topic.name.lower() in text or topic.ask.lower() in text)),
        courtesy=int(any(s.lower() in text for s in (*OPENERS, *CLOSERS))),
        off_topic_tips=min(len(others), MAX_FAULTS),
        vague=min(sum(s.lower() in text for s in VAGUE), MAX_FAULTS),
        dismissive=min(sum(s in text for s in _dismissive_sentences()), MAX_FAULTS),
        looping=1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0,
        unknown_words=1 - known / len(words) if words else 1.0,
        unfinished=int(not response.rstrip().endswith((".", "!", "?"))),
    )


def true_reward(prompt: str, response: str) -> float:
    """The embedded world's known reward of a response to a prompt (see `features` and `WEIGHTS`)."""
    return features(prompt, response).reward()


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def _shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    keys = [rng.random() for _ in items]
    return [item for _, item in sorted(zip(keys, items, strict=True), key=lambda pair: pair[0])]


def _tip_sentences(rng: random.Random, tips: Sequence[str]) -> list[str]:
    return [_pick(rng, NEXT_TIPS if i else FIRST_TIPS).format(tip=tip) for i, tip in enumerate(tips)]


def _pick_kind(draw: float) -> str:
    for kind, share in MIXTURE:
        draw -= share
        if draw < 0:
            return kind
    return MIXTURE[-1][0]  # rounding left a draw just below 1 over


def sample_answer(rng: random.Random, topic: Topic, used: str = "") -> str:
    """Draw one answer from the unranked mixture; `used` is a tip that the dialogue already gave."""
    kind = _pick_kind(rng.random())
    source = topic
    if kind == "off_topic":
        while source is topic:
            source = _pick(rng, TOPICS)
    tips = _shuffled(rng, [tip for tip in source.tips if tip != used])
    if kind in ("helpful", "off_topic"):
        sentences = _tip_sentences(rng, tips[: 1 + int(rng.random() * 4)])
        if rng.random() < 0.3:
            sentences.insert(0, _pick(rng, NAMINGS).format(name=source.name))
        if rng.random() < 0.15:
            sentences.append(_pick(rng, VAGUE))
    elif kind == "looping":
        once = _pick(rng, NEXT_TIPS).format(tip=tips[0]) if rng.random() < 0.6 else _pick(rng, VAGUE)
        sentences = [once] * (3 + int(rng.random() * 4))
    else:
        pool = VAGUE if kind == "vague" else DISMISSIVE
        sentences = [s.format(name=topic.name) for s in _shuffled(rng, pool)[: 1 + int(rng.random() * 3)]]
        if rng.random() < 0.3:
            sentences += _tip_sentences(rng, tips[:1])
    if rng.random() < (0.1 if kind == "dismissive" else 0.35):
        sentences.insert(0, _pick(rng, OPENERS))
    if rng.random() < (0.1 if kind == "dismissive" else 0.3):
        sentences.append(_pick(rng, CLOSERS))
    return " ".join(sentences)


def sample_prompt(rng: random.Random, topic: Topic) -> tuple[str, str]:
    """Draw a dialogue up to the last "Assistant:"; returns it and the tip it already gave ("" if none)."""
    if topic.question and rng.random() < 0.3:
        question = topic.question
    else:
        question = _pick(rng, QUESTIONS).format(ask=topic.ask, name=topic.name)
    kind = rng.random()
    if kind < 0.7:  # one turn
        return f"\n\nHuman: {question}\n\nAssistant:", ""
    if kind < 0.8:
        hello, reply = _pick(rng, GREETINGS)
        return f"\n\nHuman: {hello}\n\nAssistant: {reply}\n\nHuman: {question}\n\nAssistant:", ""
    tip = _pick(rng, topic.tips)
    reply = _pick(rng, FIRST_TIPS).format(tip=tip)
    more = _pick(rng, FOLLOW_UPS)
    return f"\n\nHuman: {question}\n\nAssistant: {reply}\n\nHuman: {more}\n\nAssistant:", tip


def _split(split: str) -> list[Topic]:
    return [topic for topic in TOPICS if topic.split == split]


def preference_rows(split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """n preference pairs as HH-RLHF rows {"chosen": text, "rejected": text}; split is "train" or "test".

    The two answers are drawn independently from the mixture (redrawn while equal); the first one is chosen
    with Bradley-Terry's probability sigmoid(r1 - r2).
    """
    rng = random.Random(f"preferences-{split}-{seed}")
    topics, rows = _split(split), []
    for i in range(n):
        topic = topics[i % len(topics)]
        prompt, used = sample_prompt(rng, topic)
        first = second = sample_answer(rng, topic, used)
        while second == first:
            second = sample_answer(rng, topic, used)
        gap = true_reward(prompt, first) - true_reward(prompt, second)
        if rng.random() >= 1 / (1 + math.exp(-gap)):
            first, second = second, first
        rows.append({"chosen": f"{prompt} {first}", "rejected": f"{prompt} {second}"})
    return rows


def pretraining_texts(n: int, seed: int = 0) -> list[str]:
    """n dialogues over all topics with one answer each from the unranked mixture: what π_ref has read."""
    rng = random.Random(f"pretraining-{seed}")
    texts = []
    for i in range(n):
        topic = TOPICS[i % len(TOPICS)]
        prompt, used = sample_prompt(rng, topic)
        texts.append(f"{prompt} {sample_answer(rng, topic, used)}")
    return texts


def sampling_prompts(n: int, seed: int = 0) -> list[str]:
    """n prompts about held-out topics, all topics equally often: where answers are sampled and judged."""
    rng = random.Random(f"prompts-{seed}")
    topics = _split("test")
    return [sample_prompt(rng, topics[i % len(topics)])[0] for i in range(n)]


def best_possible_accuracy(reward_gaps: Sequence[float]) -> float:
    """The accuracy that a judge who knows the true reward expects: mean of max(p, 1-p), p = sigmoid(gap).

    reward_gaps: true reward of chosen minus rejected, one per pair, not empty.
    """
    return sum(1 / (1 + math.exp(-abs(gap))) for gap in reward_gaps) / len(reward_gaps)
